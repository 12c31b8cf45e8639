"""Resuming: a run interrupted anywhere and continued by the same command equals an uninterrupted run bit for bit."""

from __future__ import annotations

import json
import random
import shlex
import shutil
import signal
from pathlib import Path

import miniature
import pytest
from absl import flags

from pcpvt.config import cli
from pcpvt.distributed.signals import PREEMPTED
from pcpvt.train import preflight

SIGTERM_AFTER = {"at": "step", "do": "SIGTERM"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run with everything that could be forgotten: averages, mixing, drop path, a changing best."""
    workdir = tmp_path_factory.mktemp("whole")
    ended = miniature.run(miniature.words(workdir, ema=0.9))
    assert ended.code == 0 and ended.err == "", ended.err
    (workdir / "stdout.txt").write_text(ended.out)
    return workdir


def test_preflight_says_in_a_few_lines_what_the_run_will_be(whole):
    lines = (whole / "stdout.txt").read_text().splitlines()
    lines = lines[: next(i for i, line in enumerate(lines) if line.startswith("epoch "))]
    assert len(lines) <= 12 and all(len(line) <= 200 for line in lines)
    size = sum(t.numel() * t.element_size() for t in miniature.newest(whole).tensors.values()) / 1e6
    for part in (
        "model: pcpvt_nano, 136,498 parameters, 10 classes, 32x32 px, params=float32",
        "data: digits : 1433 training, 364 validation images",
        "batch: 48 = 1 processes x 48 (1 x 48); 12 steps = 0.402 epochs; peak lr 0.002",
        "model.name=pcpvt_nano",
        f"disk: 4 checkpoints of {size:.3g} MB need {4 * size:.3g} MB of ",
        "trial save ",
        "first step ",
        "memory ",
        "expected duration: ",
        "reading: ",
    ):
        assert any(part in line for line in lines), part


@pytest.mark.parametrize(
    ("reading", "computing", "workers", "said"),
    [
        (0.9, 0.25, 1, "config.data.workers=4 would keep it fed where there are cores for them; it is 1"),
        (0.9, 0.25, 8, "config.data.workers=8 keeps it fed (4 would)"),
        (0.03, 0.12, 0, "20% of the time, in this process; config.data.workers=1 would hide it"),
    ],
)
def test_preflight_names_the_loader_processes_that_keep_a_step_fed(reading, computing, workers, said):
    line = preflight.feeding(reading, computing, workers)
    assert line.startswith(f"reading: {reading} s a batch, a step computes {computing} s: {said}")


def test_two_stops_within_one_epoch_and_other_workers_change_no_bit(whole, tmp_path):
    for n, workers, code in ((2, 0, PREEMPTED), (3, 1, PREEMPTED), (99, 0, 0)):
        words = miniature.words(tmp_path, ema=0.9, data__workers=workers)
        ended = miniature.run(words, {**SIGTERM_AFTER, "n": n})
        assert ended.code == code, ended.err
        if code:
            assert f"stopped by a signal at step {miniature.newest(tmp_path).meta['step']}; saved" in ended.out
    assert "resumed: step 5 of 12" in ended.out
    miniature.assert_same_run(tmp_path, whole)


def test_stop_in_the_last_evaluation_leaves_only_that_to_do(whole, tmp_path):
    words = miniature.words(tmp_path, ema=0.9)
    # 364 images in 8 batches of weights and averages: the first evaluation, at step 8, has the first 16.
    ended = miniature.run(words, {"at": "evaluation", "n": 19, "do": "SIGTERM"})
    assert ended.code == PREEMPTED, ended.err
    assert miniature.newest(tmp_path).meta["metrics"] is None
    ended = miniature.run(words)
    assert ended.code == 0 and "top-1" in ended.out
    assert "first step" not in ended.out and "  step " not in ended.out
    miniature.assert_same_run(tmp_path, whole)


def test_finished_run_does_nothing_and_gives_the_same_summary(whole, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    ended = miniature.run(miniature.words(workdir, ema=0.9))
    assert ended.code == 0 and "nothing to do" in ended.out
    result = json.loads((whole / "result.json").read_text())
    assert f"top-1 {result['acc1']:.3f} %" in ended.out and f"{result['images_per_sec']:.1f}" in ended.out
    assert {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()} == before


def test_loss_scale_of_float16_goes_on_to_the_bit(tmp_path):
    fields = {"precision": "float16", "steps": 6, "eval_every": "0", "log_every": "1 step"}
    overflow = {"at": "gradient", "n": 2}
    whole = miniature.start(miniature.words(tmp_path / "whole", **fields), overflow)
    ended = miniature.run(miniature.words(tmp_path / "cut", **fields), overflow, {**SIGTERM_AFTER, "n": 3})
    assert ended.code == PREEMPTED, ended.err
    assert miniature.run(miniature.words(tmp_path / "cut", **fields)).code == 0
    assert miniature.end(whole).code == 0
    tensors = miniature.newest(tmp_path / "cut").tensors
    assert (tensors["scale/factor"], tensors["scale/good"], tensors["opt/count"]) == (2.0**14, 4, 5)
    assert [r["skipped"] for r in miniature.records(tmp_path / "cut")] == [0, 1, 0, 0, 0, 0]
    miniature.assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_other_numbers_of_processes_and_micro_batches_see_the_same_samples(whole, tmp_path):
    ended = miniature.run(miniature.words(tmp_path, "cpu2", ema=0.9), {**SIGTERM_AFTER, "n": 5, "rank": 1})
    assert ended.code == PREEMPTED, ended.err
    ended = miniature.run(miniature.words(tmp_path, "cpu3", ema=0.9), {**SIGTERM_AFTER, "n": 4, "rank": 0})
    assert ended.code == PREEMPTED, ended.err
    ended = miniature.run(miniature.words(tmp_path, ema=0.9, accumulate=4))
    assert ended.code == 0 and "note: config.processes: 3 -> 1" in ended.out
    ours, theirs = miniature.records(tmp_path), miniature.records(whole)
    assert [(r["kind"], r["step"]) for r in ours] == [(r["kind"], r["step"]) for r in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        # Measured: 3e-7. Other samples would differ in the first digits.
        assert mine["loss"] == pytest.approx(other["loss"], rel=2e-5)


def test_a_workdir_has_the_command_that_made_it_and_alone_goes_on_with_it(whole, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    comment, line = (workdir / "command.txt").read_text().splitlines()
    assert comment.startswith("# 2") and comment.endswith(f" UTC, in {miniature.ROOT}")
    made, again = (cli.parse(["pcpvt", *words], ["train"], flags.FlagValues()) for words in
                   (shlex.split(line)[3:], miniature.words(whole, ema=0.9)))  # fmt: skip
    assert made._replace(get_config=None) == again._replace(get_config=None)
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    ended = miniature.run([f"--workdir={workdir}"])
    assert ended.code == 0 and "nothing to do" in ended.out, ended.err
    assert f"note: the config is that of {workdir}/config.json" in ended.out
    assert {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()} == before


def test_refused_change_touches_nothing(whole, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    before = (workdir / "config.json").read_bytes(), (workdir / "metrics.jsonl").read_bytes()
    ended = miniature.run(miniature.words(workdir, ema=0.9, label_smoothing=0.3))
    assert ended.code == 2 and "config.label_smoothing: 0.3 but" in ended.error
    assert ended.error.endswith(f" --config.label_smoothing=0.3 --workdir={workdir}-2")
    assert ((workdir / "config.json").read_bytes(), (workdir / "metrics.jsonl").read_bytes()) == before


# Kills at random points, from a fixed seed.


def random_kill(draw: random.Random, rank: int | None = None) -> dict:
    at, most = draw.choice([("disk", 30), ("step", 6), ("inside step", 6), ("evaluation", 10), ("save", 4)])
    return {"at": at, "n": draw.randint(1, most), "do": "SIGKILL", **({} if rank is None else {"rank": rank})}


def survive(workdir: Path, kills: int, seed: int) -> None:
    """Kills a run again and again, then lets it end."""
    draw = random.Random(seed)
    words = miniature.words(workdir, ema=0.9)
    codes = []
    for _ in range(kills):
        codes.append(miniature.run(words, random_kill(draw)).code)
        assert codes[-1] in (0, -signal.SIGKILL), codes
    assert -signal.SIGKILL in codes
    ended = miniature.run(words)
    assert ended.code == 0, ended.err


def test_three_random_kills_change_no_bit(whole, tmp_path):
    survive(tmp_path, 3, seed=6)
    miniature.assert_same_run(tmp_path, whole)


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(6))
def test_many_random_kills_change_no_bit(whole, tmp_path, seed):
    survive(tmp_path, 5, seed=100 + seed)
    miniature.assert_same_run(tmp_path, whole)


@pytest.mark.nightly
@pytest.mark.parametrize("world", [2, 3])
def test_random_kills_of_any_rank_keep_the_samples(whole, tmp_path, world):
    draw = random.Random(world)
    words = miniature.words(tmp_path, f"cpu{world}", ema=0.9)
    for _ in range(4):
        ended = miniature.run(words, random_kill(draw, rank=draw.randrange(world)))
        assert ended.code in (0, 128 + signal.SIGKILL), (ended.code, ended.err)
    assert miniature.run(words).code == 0
    for mine, other in zip(miniature.records(tmp_path), miniature.records(whole), strict=True):
        assert (mine["step"], mine["loss"]) == (other["step"], pytest.approx(other["loss"], rel=2e-5))
