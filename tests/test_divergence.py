"""Steps whose loss or gradient is not finite: they are skipped by all processes, and too many end the run."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import miniature
import pytest

from pcpvt.checkpoints import checkpoint


@pytest.fixture(scope="module")
def diverged(tmp_path_factory) -> tuple[Path, miniature.Ended]:
    """The workdir of a run in bfloat16 whose steps from the 6th on are not finite, and how it ended."""
    workdir = tmp_path_factory.mktemp("diverged")
    words = miniature.words(workdir, max_skipped=3, precision="bfloat16")
    return workdir, miniature.run(words, {"at": "gradient", "n": 6, "again": True})


def test_steps_that_are_not_finite_one_after_another_end_the_run_with_a_report(diverged):
    workdir, ended = diverged
    assert ended.code == 2
    assert "3 times in a row, up to step 8" in ended.error and "step-00000004" in ended.error
    report = json.loads((workdir / "nonfinite.json").read_text())
    assert [step["step"] for step in report["steps"]] == [6, 7, 8]
    ids = [sample["id"] for sample in report["steps"][-1]["samples"]]
    assert len(ids) == 48 and f"samples {', '.join(map(str, ids[:8]))} and 40 more" in ended.error
    assert report["steps"][0]["samples"][0]["name"].startswith("digits/train[")
    assert ended.err.count("updates skipped in a row") == 3
    assert list(checkpoint.steps(workdir / "checkpoints")) == [4]


def test_the_remedy_named_after_divergence_works(diverged, tmp_path):
    """The same command would diverge again; a run that has not diverged refuses another learning rate."""
    workdir, ended = diverged
    remedies = re.findall(r"--config\.[\w.=]+", ended.error)
    assert remedies == ["--config.lr=0.001", "--config.precision=float32"], ended.error
    for name in ("rate", "precision"):
        shutil.copytree(workdir, tmp_path / name)
    words = miniature.words(tmp_path / "rate", max_skipped=3, precision="bfloat16")
    ended = miniature.run([*words, remedies[0]])
    assert ended.code == 0 and "resumed: step 4" in ended.out, ended.err
    assert "note: config.lr: 0.002 -> 0.001" in ended.out
    refused = miniature.run([*words, "--config.lr=0.0005"])
    assert refused.code == 2 and "config.lr" in refused.error
    assert miniature.run([*words[:-1], f"--workdir={tmp_path / 'precision'}", remedies[1]]).code == 0


def test_divergence_before_the_first_checkpoint_names_no_checkpoint(tmp_path):
    words = miniature.words(tmp_path, max_skipped=2)
    ended = miniature.run(words, {"at": "gradient", "n": 1, "again": True})
    assert ended.code == 2 and "it goes on from step 0" in ended.error and "float32" not in ended.error
    assert miniature.run([*words, "--config.lr=0.001", "--config.steps=4"]).code == 0


def test_one_rank_that_is_not_finite_makes_all_skip(tmp_path):
    words = miniature.words(tmp_path, "cpu2", log_every="1 step", eval_every="0", steps=4)
    ended = miniature.run(words, {"at": "gradient", "n": 2, "rank": 1})
    assert ended.code == 0 and ended.err.count("updates skipped in a row: 1") == 1, ended.err
    found = miniature.records(tmp_path)
    assert [r["skipped"] for r in found] == [0, 1, 0, 0] and found[1]["loss"] is None
    last = checkpoint.read(checkpoint.steps(tmp_path / "checkpoints")[4])
    assert last.tensors["opt/count"] == 3 and last.tensors["params/head.weight"].isfinite().all()
