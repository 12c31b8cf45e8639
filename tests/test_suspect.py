"""After an audit the suspect's host leaves, and the others end the run as if it had not erred; or all say why not."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import miniature
import nodes as machines
import pytest
import test_chaos as chaos
import torch
from test_chaos import wholes  # noqa: F401 - a fixture

from pcpvt.checkpoints import checkpoint
from pcpvt.checkpoints.writer import Saver
from pcpvt.data.audited import Turns
from pcpvt.distributed import signals, suspect
from pcpvt.distributed.restart import Failure, Rule
from pcpvt.distributed.suspect import Attempt, Finding, LeftError, choose
from pcpvt.functional.state import TrainState

LAST = 8  # the step whose audit finds the fault; it is there from step 6 on, and the audit of step 4 was good


@pytest.mark.slow
def test_the_others_go_on_without_the_suspects_host_as_if_it_had_not_erred(tmp_path, wholes):  # noqa: F811
    """The gradients of steps 6 and 7 have reached the weights, and checkpoints, before the audit of step 8."""
    (tmp_path / "samples").mkdir()
    run, whole = tmp_path / "run", wholes(4)
    fields = {"audit_every": 4, "audit_action": "restart", "elastic": 2}
    words = miniature.words(run, "cpu4", **{**chaos.RECIPE, **fields})
    # Calls of Flat.gather: one in each step, and one more in that of an audit. With this bit the number is 256 times as
    # large: one step later the loss differs by 1e-3 of itself.
    device = {"at": "bit of a gradient", "n": 7, "bit": 26, "local_rank": 1, "again": True, "restarted": True}
    with machines.hosts(2, tmp_path / "out") as nodes:
        nodes[1].faults = [device]
        log = {"at": "samples", "folder": str(tmp_path / "samples")}
        machines.schedule(nodes, words, [log], 540, away={1: math.inf})
        codes = [node.codes for node in nodes]
        said = [node.errors.read_text() for node in nodes]
        assert codes == [[0], [signals.FAULTY]] and not nodes[1].pids(), machines.told(nodes)
        (left,) = [line for line in said[1].splitlines() if "this host leaves the run" in line]
        evidence = run / "debug" / f"audit-{LAST:08d}-gradient"
        (rank,) = json.loads((evidence / "verdict.json").read_text())["suspects"]
        assert f"rank {rank} ({os.uname().nodename}, cpu 1)" in left and str(evidence) in left, left
        assert "whose host leaves the run; restart 1, from step-00000004" in said[0], said[0]
        assert "stopping after this step" not in said[0] + said[1]  # nobody has asked for it
        # Its command does not bring it back.
        nodes[1].start(words, [])
        assert nodes[1].process.wait(60) == signals.FAULTY
        assert "check the device, then remove this file" in nodes[1].errors.read_text()

    assert chaos.samples(tmp_path / "samples") == chaos.samples(whole / "samples")
    chaos.assert_equal_within_rounding(run, whole / "run")
    assert chaos.sizes(tmp_path / "samples") == [4, 2]
    (entry,) = miniature.restarts(run)
    assert entry["step"] == 4 and f"rank {rank} (" in entry["reason"] and "leaves the run" in entry["reason"]
    assert sorted(path.name for path in evidence.glob("step-*")) == [checkpoint.name_of(6), checkpoint.name_of(7)]


def test_a_lasting_error_on_one_host_ends_the_run_at_once(tmp_path):
    device = {"at": "bit of a gradient", "n": 1, "rank": 1, "again": True, "restarted": True}
    fields = {"audit_every": 4, "audit_action": "restart", "save_every": "1 step", "keep": 1, "restarts": 3}
    ended = miniature.run(miniature.words(tmp_path, "cpu3", **fields), device)
    assert ended.code == signals.FAULTY and "restart 1" not in ended.err, ended.err
    assert "cannot be left out: the run has one host" in ended.error
    assert not list(tmp_path.glob("checkpoints/step-*")) and len(list(tmp_path.glob("debug/audit-*/step-*"))) == 1
    assert not list(tmp_path.glob("debug/found-*"))


# The parts.


def found(*suspects: int, certain: bool = True, persistent: bool = True, what: str = "gradient") -> Finding:
    return Finding(LAST, what, list(suspects), certain, persistent, ["host, npu 1"] * len(suspects), "debug/audit")


POD = Attempt(host=1, hosts=3, each=4, store=0)


@pytest.mark.parametrize(
    ("finding", "attempt", "fewest", "leaves", "why"),
    [
        (found(5), POD, 8, 1, ""),
        (found(5, persistent=False), POD, 8, 1, ""),  # once in one audited step: not for the first time, by odds
        (found(9, what="state"), POD, 1, 2, ""),
        (found(4, 7), POD, 8, 1, ""),  # the same host
        (found(5, 9), POD, 4, None, "not certain"),
        (found(5, certain=False), POD, 8, None, "not certain"),
        (found(5), POD, 0, None, "config.elastic is not set"),
        (found(5), POD, 9, None, "8 processes would be left"),
        (found(3), POD, 8, None, "keeps the store"),
        (found(5), POD._replace(store=None), 8, None, "not known which host keeps the store"),
        (found(5), POD._replace(hosts=4), 8, None, "cannot be cut evenly over them"),
        (found(1), POD._replace(hosts=1), 1, None, "one host"),
    ],
)
def test_which_host_leaves(finding, attempt, fewest, leaves, why):
    choice = choose(finding, attempt, fewest, batch=64)
    assert choice.leaves == leaves and why in choice.why and bool(choice.why) == (leaves is None)
    assert choice.ends == (leaves is None)  # all of these that stay have erred twice, in a gradient


def test_a_suspect_that_stays_is_started_again_only_where_that_may_help():
    assert choose(found(5), POD, 0, 64).ends
    assert not choose(found(5, persistent=False), POD, 0, 64).ends
    assert not choose(found(5, what="state"), POD, 0, 64).ends


def test_launchers_decide_alike_from_what_their_ranks_tell(tmp_path, monkeypatch, capsys):
    path = suspect.path_for_ranks(tmp_path)
    monkeypatch.setenv(suspect.FOUND, str(path))
    for host in range(3):
        suspect.tell(found(5))
        rule = Rule(lambda: Path("step-4"), tmp_path, path, fewest=8, batch=64)
        for _ in range(2):  # without progress in between, but also without the suspect
            reason = rule({0: Failure(signals.FAULTY, 5)}, POD._replace(host=host))
            assert rule.left == (host == 1) and bool(reason) == (host != 1)
            suspect.tell(found(5))
        assert not reason or "rank 5 (host, npu 1)" in reason
    assert path.exists() and suspect.take(path) and not path.exists()
    capsys.readouterr()
    assert not rule({0: Failure(signals.FAULTY, 5)}, POD) and "cannot read" in capsys.readouterr().err


def test_a_host_that_has_left_stays_away_until_it_was_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(suspect, "BOOT", tmp_path / "boot")
    suspect.BOOT.write_text("first\n")
    suspect.refuse_left(tmp_path)
    noted = suspect.note_left(tmp_path, found(5))
    with pytest.raises(LeftError, match=r"rank 5 \(host, npu 1\) computed wrongly in step 8"):
        suspect.refuse_left(tmp_path)
    suspect.BOOT.write_text("second\n")  # another machine of this name, or this one started anew
    suspect.refuse_left(tmp_path)
    suspect.BOOT.write_text("first\n")
    noted.unlink()
    suspect.refuse_left(tmp_path)


def save(folder: Path, turns: Turns, *steps: int) -> Saver:
    """What a run with audits keeps of the checkpoints of these steps, beside the newest."""
    meta = {"config": {}, "classes": ["a"], "metrics": None, "best": None, "records": 1, "stale": 0}
    saver = Saver(folder, keep_checkpoints=1, warn=lambda text: None, passed=turns.passed)
    for step in steps:
        state = TrainState(torch.tensor(step), {"w": torch.ones(1)}, {}, {}, {}, torch.tensor(0))
        saver.save(state, meta)
    saver.finish()
    return saver


def test_a_restart_goes_on_from_a_step_before_the_last_good_audit(tmp_path):
    folder = tmp_path / "checkpoints"
    saver = save(folder, Turns(10, 4), *range(1, 20, 3))
    assert list(checkpoint.steps(folder)) == [10, 19]
    saver.withdraw(10, tmp_path / "evidence")
    assert list(checkpoint.steps(folder)) == [10]
    assert [path.name for path in (tmp_path / "evidence").iterdir()] == [checkpoint.name_of(19)]
    saver = save(folder, Turns(100, 4), 110, 120)  # audits were switched on late
    (folder / checkpoint.name_of(10)).unlink(missing_ok=True)
    saver.withdraw(100, tmp_path / "evidence")
    assert list(checkpoint.steps(folder)) == [120]
