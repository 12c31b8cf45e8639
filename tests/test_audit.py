"""Audits: a flipped bit on one rank is found and its rank named, without a false alarm, and a run stays as it is."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import miniature
import pytest
from safetensors.torch import load_file

from pcpvt.data.audited import Turns
from pcpvt.distributed import signals
from pcpvt.train.evidence import KEPT
from pcpvt.train.verdict import Result, judge, same

QUIET = {"eval_every": "0", "save_every": "0", "tensorboard": False}
OWN, CHECK = 4, 5  # calls of Flat.gather: the 4th step's own gradient, and the repetition of another rank's


def audited(workdir: Path, arg: str = "cpu3", **fields) -> list[str]:
    return miniature.words(workdir, arg, **{"audit_every": 4, **QUIET, **fields})


def evidence(workdir: Path, what: str) -> tuple[Path, dict]:
    folder, *more = sorted(workdir.glob("debug/audit-*"))
    assert folder.name.endswith(what) and not more, [folder, *more]
    return folder, json.loads((folder / "verdict.json").read_text())


@pytest.mark.parametrize(
    ("fault", "suspect"),
    [
        ({"at": "bit of a gradient", "n": OWN, "rank": 2}, 2),
        pytest.param({"at": "bit of a gradient", "n": CHECK, "rank": 0}, 0, marks=pytest.mark.slow),
        pytest.param({"at": "bit of a gradient", "n": OWN, "rank": 1, "again": True}, 1, marks=pytest.mark.slow),
        ({"at": "bit of an activation", "n": 4 * (OWN - 1) + 2, "bit": 20, "rank": 1}, 1),
    ],
    ids=str,
)
def test_a_bit_of_a_gradient_or_activation_is_found_in_the_audited_step(fault, suspect, tmp_path):
    ended = miniature.run(audited(tmp_path, steps=6, audit_action="end"), fault)
    assert ended.code == signals.FAULTY, ended.err
    assert f"audit of step 4: rank {suspect} (" in ended.error and "another gradient" in ended.error
    folder, verdict = evidence(tmp_path, "gradient")
    assert verdict["suspects"] == [suspect] and verdict["certain"] and verdict["persistent"] == ("again" in fault)
    assert len(verdict["results"]) == 5 and verdict["tolerance"] == 0
    found = json.loads((folder / "differences.json").read_text())["gradient"]
    assert found and all(entry["differing"] and entry["first"] for entry in found.values())
    owner, checker = (load_file(folder / f"batch-{role}.safetensors") for role in ("owner", "checker"))
    assert owner["image"].equal(checker["image"]) and len(owner["image"]) == 16
    assert miniature.newest(tmp_path).meta["step"] == 3  # the wrong gradient was not applied


@pytest.mark.parametrize(
    ("arg", "suspects"), [("cpu3", [1]), pytest.param("cpu2", [0, 1], marks=pytest.mark.slow)], ids=str
)
def test_a_bit_of_a_weight_is_found_in_the_next_audit_and_is_not_saved(arg, suspects, tmp_path):
    fault = {"at": "bit of a weight", "n": 2, "rank": 1}
    ended = miniature.run(audited(tmp_path, arg, steps=6, audit_action="end"), fault)
    assert ended.code == signals.FAULTY, ended.err
    folder, verdict = evidence(tmp_path, "state")
    assert verdict["step"] == 4 and verdict["suspects"] == suspects and "params" in verdict["parts"]
    assert verdict["certain"] == (arg == "cpu3") and ("no majority" in ended.error) == (arg == "cpu2")
    assert json.loads((folder / "differences.json").read_text())["params"]
    assert not list((tmp_path / "checkpoints").glob("step-*"))


@pytest.mark.slow
def test_every_random_bit_of_gradients_and_activations_is_found_with_its_rank(tmp_path):
    """20 flips in one run that goes on. Each step has two calls of the work, and one more after a difference."""
    draw, faults, ranks = random.Random(0), [], []
    for done in range(20):
        work, rank = 2 * (done + 1) + done + 1, draw.randrange(3)
        ranks.append(rank)
        if done % 2:
            bits = {"at": "bit of a gradient", "n": work, "bit": draw.randrange(32), "index": draw.randrange(130_000)}
        else:
            call = 4 * (work - 1) + draw.randint(1, 4)
            bits = {
                "at": "bit of an activation",
                "n": call,
                "bit": draw.randrange(16, 31),
                "index": draw.randrange(500),
            }
        faults.append({**bits, "rank": rank})
    ended = miniature.run(audited(tmp_path, steps=24, audit_every=1), *faults)
    assert ended.code == 0, ended.err
    found = re.findall(r"audit of step (\d+): rank (\d) \([^)]*\) computed another gradient", ended.err)
    assert found == [(str(done + 2), str(rank)) for done, rank in enumerate(ranks)], ended.err
    assert len(list(tmp_path.glob("debug/audit-*/verdict.json"))) == 20
    assert len(list(tmp_path.glob("debug/audit-*/differences.json"))) == KEPT


def test_states_that_differ_are_found_before_a_save(tmp_path):
    fault = {"at": "bit of a weight", "n": 2, "rank": 1}
    ended = miniature.run(audited(tmp_path, steps=6, audit_every=100, audit_action="end"), fault)
    assert ended.code == signals.FAULTY and "held another state" in ended.error, ended.err
    assert not list((tmp_path / "checkpoints").glob("step-*"))


def test_a_batch_that_was_read_wrongly_is_told_from_a_wrong_gradient(tmp_path):
    fault = {"at": "bit of a batch", "n": OWN, "rank": 2}  # each step reads one, and the 4th another rank's too
    ended = miniature.run(audited(tmp_path, steps=6), fault)
    assert ended.code == 0 and "rank 2 (" in ended.err and "read another batch" in ended.err, ended.err
    assert "the run goes on (config.audit_action=warn)" in ended.err
    folder, verdict = evidence(tmp_path, "batch")
    owner, checker = (load_file(folder / f"batch-{role}.safetensors") for role in ("owner", "checker"))
    assert verdict["suspects"] == [2] and (owner["image"] != checker["image"]).sum() == 1


@pytest.mark.parametrize(
    "fault",
    [
        {"at": "bit of a weight", "n": 6, "rank": 1},
        pytest.param({"at": "bit of a gradient", "n": 5, "rank": 1}, marks=pytest.mark.slow),
    ],
    ids=lambda fault: fault["at"],
)
def test_a_restart_after_an_audit_heals_the_run_to_the_bit(fault, two_ranks, tmp_path):
    fields = {"restarts": 1, "audit_every": 4, "audit_action": "restart"}
    ended = miniature.run(miniature.words(tmp_path, "cpu2", **fields), fault)
    assert ended.code == 0 and re.search("an audit found a fault: .*; restart 1, ", ended.err), ended.err
    assert ended.err.count(", the suspect included: ") == 1, ended.err
    miniature.assert_same_run(tmp_path, two_ranks)


@pytest.mark.parametrize("arg", ["cpu2", pytest.param("cpu", marks=pytest.mark.slow)])
def test_audits_change_nothing_and_find_nothing(arg, two_ranks, tmp_path):
    ended = miniature.run(miniature.words(tmp_path / "audited", arg, audit_every=1))
    assert ended.code == 0 and not ended.err and "audit: every 1 steps" in ended.out, ended.err
    plain = two_ranks if arg == "cpu2" else tmp_path / "plain"
    if arg == "cpu":
        assert "audit: " not in miniature.run(miniature.words(plain, arg)).out
    miniature.assert_same_run(tmp_path / "audited", plain)


def test_one_process_that_does_not_repeat_its_own_gradient_is_found(tmp_path):
    ended = miniature.run(audited(tmp_path, "cpu", steps=6), {"at": "bit of a gradient", "n": OWN})
    assert ended.code == 0 and "audit of step 4: rank 0" in ended.err, ended.err
    assert evidence(tmp_path, "gradient")[1]["certain"]


@pytest.mark.nightly
def test_no_false_alarm(tmp_path):
    words = audited(
        tmp_path, "cpu2", steps=10_000, audit_every=1, audit_action="end", batch_size=8, log_every="100 steps"
    )
    ended = miniature.end(miniature.start(words), timeout=3600)
    assert ended.code == 0 and not ended.err and not (tmp_path / "debug").exists(), ended.err


# The parts.


def test_each_process_is_audited_once_and_by_every_other_in_turn():
    for world in (2, 3, 5):
        turns, seen = Turns(10, world), set()
        for step in range(10, 10 * world, 10):
            assert turns.due(step) and not turns.due(step + 1)
            owners = [turns.audited_by(step, rank) for rank in range(world)]
            assert sorted(owners) == list(range(world)) and all(owner != rank for rank, owner in enumerate(owners))
            seen |= set(enumerate(owners))
        assert len(seen) == world * (world - 1)
    assert Turns(1, 1).audited_by(7, 0) == 0 and not Turns(0, 4).due(8)


def results(*rows: tuple[int, float, bool]) -> list[Result]:
    return [Result(rank, (value,), again) for rank, value, again in rows]


def test_verdicts():
    once = judge(results((0, 1.0, False), (1, 2.0, False), (0, 1.0, True), (1, 1.0, True)), 0)
    assert once.suspects == [1] and once.certain and not once.persistent  # two processes, one error
    two = judge(results((0, 1.0, False), (1, 2.0, False), (0, 1.0, True), (1, 2.0, True)), 0)
    assert two.suspects == [0, 1] and not two.certain
    third = judge(results((0, 1.0, False), (1, 2.0, False), (0, 1.0, True), (1, 2.0, True), (2, 2.0, True)), 0)
    assert third.suspects == [0] and third.certain and third.persistent
    none = judge(results((0, 1.0, False), (1, 2.0, False), (0, 3.0, True), (1, 4.0, True)), 0)
    assert none.agreeing == 1 and not none.certain


def test_digests_within_a_tolerance():
    assert same((10.0, 3.0), (10.0, 3.09), 0.01) and not same((10.0, 3.0), (10.0, 3.2), 0.01)
    nan, inf = float("nan"), float("inf")
    assert same((nan, 1.0), (inf, 2.0), 0.01) and not same((nan, 1.0), (1.0, 1.0), 0.01)
