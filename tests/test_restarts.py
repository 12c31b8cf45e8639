"""Processes that fail are started again from the newest checkpoint, exactly, unless that cannot help."""

from __future__ import annotations

import signal
from pathlib import Path

import miniature
import pytest

from pcpvt.distributed import signals
from pcpvt.distributed.hosts import Hosts, exit_code, from_environment
from pcpvt.distributed.restart import Failure, Rule
from pcpvt.distributed.suspect import Attempt
from pcpvt.errors import UserError


@pytest.mark.parametrize(
    "fault",
    [
        {"at": "step", "n": 6, "do": "SIGKILL", "rank": 0},
        pytest.param({"at": "inside step", "n": 6, "do": "error:a fault", "rank": 1}, marks=pytest.mark.slow),
        pytest.param({"at": "evaluation", "n": 3, "do": "SIGKILL", "rank": 1}, marks=pytest.mark.slow),
        pytest.param({"at": "inside step", "n": 6, "do": "hold:60", "rank": 1}, marks=pytest.mark.slow),
    ],
    ids=lambda fault: f"{fault['do']} {fault['at']}",
)
def test_a_restarted_run_is_the_same_to_the_bit(fault, two_ranks, tmp_path):
    ended = miniature.run(miniature.words(tmp_path, "cpu2", restarts=2, timeout=5, grace=2), fault)
    assert ended.code == 0 and "restart 1, from step-0000000" in ended.err, ended.err
    assert signals.STOPPING not in ended.err  # nobody has asked for it
    miniature.assert_same_run(tmp_path, two_ranks)
    (entry,) = miniature.restarts(tmp_path)
    assert (
        entry["restart"] == 1 and "rank" in entry["reason"] and entry["step"] in (4, 5, 6, 8)
    )  # the step of the evaluation
    assert f"restart 1, from step {entry['step']}: {entry['reason']}" in ended.out


def test_restarts_without_progress_end_the_run(tmp_path):
    fault = {
        "at": "step",
        "n": 1,
        "do": "SIGKILL",
        "restarted": True,
    }  # of all ranks: a single one's loss saves the rest
    ended = miniature.run(miniature.words(tmp_path, "cpu2", restarts=5, save_every="0", eval_every="0"), fault)
    assert ended.code == 128 + signal.SIGKILL, ended.err
    assert ended.err.count("restart 1,") == 1 and "restart 2" not in ended.err
    assert "not started again: there is no newer checkpoint than after restart 1" in ended.err


def test_a_single_process_is_started_again_on_demand(tmp_path):
    killed = {"at": "step", "n": 6, "do": "SIGKILL"}
    ended = miniature.run(miniature.words(tmp_path, restarts=1), killed)
    assert ended.code == 0 and "rank 0 was killed by SIGKILL; restart 1," in ended.err, ended.err
    assert len(miniature.restarts(tmp_path)) == 1


def test_restarts_follow_the_exit_codes(monkeypatch, tmp_path):
    newest = ["step-4"]
    found, attempt = tmp_path / "found.json", Attempt(host=0, hosts=1, each=2, store=None)
    decide = Rule(lambda: Path(newest[0]), Path("debug"), found)

    def rule(failures):
        return decide(failures, attempt)

    for codes in ((2,), (75, -15), (76, 2), (-9, 75)):
        assert not rule({rank: Failure(code, 5) for rank, code in enumerate(codes)}), codes
    for codes in ((1,), (-9, 76), (76, 143)):
        newest[0] += "1"
        assert rule({rank: Failure(code, 5) for rank, code in enumerate(codes)}), codes
    assert not rule({0: Failure(1, 5)})  # no newer checkpoint
    monkeypatch.setattr(signals, "_request", signals._Request())
    signals._request.signal = 15
    newest[0] += "1"
    assert not rule({0: Failure(1, 5)})


PYTORCH_JOB = {"PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_NPROC_PER_NODE": "8", "MASTER_ADDR": "m"}
ASCEND_JOB = {
    "MASTER_ADDR": "m", "MASTER_PORT": "2222", "RANK": "1", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8",
    "LOCAL_RANK": "0,1,2,3,4,5,6,7",
}  # fmt: skip


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, Hosts()),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, Hosts()),  # a process that torchrun has started
        ({"RANK": "1", "WORLD_SIZE": "2"}, Hosts()),
        (PYTORCH_JOB, Hosts(2, 1, "m:29500", 8)),
        (PYTORCH_JOB | {"PET_NNODES": "1:4", "PET_RDZV_ENDPOINT": "e:1"}, Hosts(4, 1, "e:1", 8)),
        ({"PET_NNODES": "1", "PET_NPROC_PER_NODE": "auto"}, Hosts()),
        (ASCEND_JOB, Hosts(2, 1, "m:2222", 8)),
    ],
)
def test_hosts_of_each_scheduler(environ, expected):
    assert from_environment(environ) == expected


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (PYTORCH_JOB | {"PET_NNODES": "two"}, "PET_NNODES: 'two'"),
        (PYTORCH_JOB | {"PET_NODE_RANK": "2"}, "PET_NODE_RANK: 2: the hosts are 0 to 1"),
        (PYTORCH_JOB | {"MASTER_ADDR": ""}, "PET_MASTER_ADDR: not set"),
        (ASCEND_JOB | {"WORLD_SIZE": "15"}, "WORLD_SIZE: 15 is no multiple of LOCAL_WORLD_SIZE, 8"),
    ],
)
def test_wrong_variables_are_named(environ, message):
    with pytest.raises(UserError) as caught:
        from_environment(environ)
    assert message in str(caught.value)


@pytest.mark.parametrize(("code", "told"), [(0, 0), (2, 2), (1, 138), (75, 138), (76, 138), (137, 138)])
def test_a_scheduler_that_tells_only_ranges_of_codes_apart_is_told_another(code, told):
    environ = {"PCPVT_RETRY_CODE": "138"}
    assert exit_code(environ, code) == told and exit_code({}, code) == code
    assert exit_code(environ | {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "2"}, code) == code  # for the launcher


@pytest.mark.parametrize(
    ("arg", "fault", "told"),
    [
        ("cpu2", {"at": "step", "n": 3, "do": "SIGTERM", "rank": 1}, 138),
        ("cpu", {"at": "inside step", "n": 3, "do": "error:a fault"}, 138),
        ("cpu", {"at": "start of a mode", "n": 1, "do": "EDQUOT"}, 2),
    ],
)
def test_the_program_ends_with_the_code_that_the_scheduler_is_told(arg, fault, told, tmp_path):
    restarts = 0 if fault["do"].startswith("error") else 5  # a signal and an error of the user start nothing again
    ended = miniature.run(miniature.words(tmp_path, arg, restarts=restarts), fault, env={"PCPVT_RETRY_CODE": "138"})
    assert ended.code == told and "restart" not in ended.err, ended.err


def test_the_total_of_an_ascend_job_must_fit_the_config(tmp_path, monkeypatch):
    for name, value in ASCEND_JOB.items():
        monkeypatch.setenv(name, value)
    assert "config.processes: 3" in miniature.refusal(miniature.words(tmp_path, "cpu3"))
