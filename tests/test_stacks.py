"""A process that hangs says where: stacks in debug/, and the function and the step in the error of the others."""

from __future__ import annotations

import datetime
import json
import os
import re
import signal
import socket
import sys
import time
from pathlib import Path

import miniature
import pytest
import torch
import torch.distributed as dist

from pcpvt.distributed import collectives, flight, group, signals, stacks
from pcpvt.distributed.restart import Failure, what_failed

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def test_a_rank_that_hangs_in_c_is_named_with_its_function_and_step(tmp_path):
    stuck = {"at": "inside step", "n": 4, "do": "hold:30", "rank": 1}
    ended = miniature.run(miniature.words(tmp_path, "cpu2", timeout=3, grace=2, eval_every="0", save_every="0"), stuck)
    assert ended.code == signals.PEER_LOST and "rank 1 gave no answer within 3 s (config.timeout)" in ended.error
    place = re.search(r"rank 1 is in step of functional/step\.py, line \d+, after step 3; all stacks are in", ended.err)
    assert place, ended.err
    text = (tmp_path / "debug/rank-1.txt").read_text()
    assert "after step 3" in text and "sitecustomize.py" in text and "train/loop.py" in text
    assert "train/loop.py" in (tmp_path / "debug/rank-0.txt").read_text()
    waits, hangs = (collective(tmp_path, rank) for rank in (0, 1))
    assert (waits["step"], hangs["step"]) == (4, 3)
    assert sequence(waits) == sequence(hangs) + 1  # rank 1 has not come to the one that rank 0 waits in


def collective(workdir: Path, rank: int) -> dict:
    """What the flight recorder of a rank has written."""
    return json.loads((workdir / f"debug/rank-{rank}-collectives.json").read_text())


def sequence(record: dict) -> int:
    """The number of the last collective that a rank has begun."""
    last = record["gloo"]["entries"][-1]
    assert last["profiling_name"] == "gloo:all_reduce" and len(record["gloo"]["entries"]) > 3
    return last["collective_seq_id"]


@pytest.mark.parametrize("arg", ["cpu", pytest.param("cpu2", marks=pytest.mark.slow)])
def test_a_signal_writes_the_stacks_of_every_rank_and_the_run_goes_on(arg, tmp_path):
    process = miniature.start(miniature.words(tmp_path, arg), {"at": "inside step", "n": 4, "do": "hold:3"})
    miniature.await_line(process, "fault:")
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGUSR1)
    ended = miniature.end(process)
    assert ended.code == 0, ended.err
    files = sorted(tmp_path.glob("debug/rank-*.txt"))
    assert len(files) == (2 if arg == "cpu2" else 1)
    assert all("functional/step.py" in file.read_text() for file in files)
    if arg == "cpu2":
        assert all(sequence(collective(tmp_path, rank)) for rank in (0, 1))


def test_a_rank_that_a_library_crashes_leaves_its_stacks_and_a_restart_keeps_them(tmp_path):
    crash = {"at": "inside step", "n": 4, "do": "SIGSEGV", "rank": 1}
    ended = miniature.run(miniature.words(tmp_path, "cpu2", restarts=1, steps=6, eval_every="0"), crash)
    assert ended.code == 0, ended.err
    file = tmp_path / "debug/rank-1.txt"
    assert "rank 1 was killed by SIGSEGV; its stacks are in the workdir's debug/rank-1.txt; restart 1" in ended.err
    assert "Segmentation fault" in file.read_text() and "functional/step.py" in file.read_text()
    assert ended.err.count("Segmentation fault") == 0  # absl's are on standard error


def test_a_watchdog_that_ends_a_rank_outside_python_is_told_as_what_it_is(tmp_path):
    aborted, debug = {3: Failure(-signal.SIGABRT, int(time.time()))}, tmp_path / "debug"
    debug.mkdir()
    assert "rank 3 was killed by SIGABRT, by a library (its own lines" in what_failed(aborted, debug)
    trace = flight.watchdog_file(debug, 3)
    trace.write_bytes(b"")
    told = what_failed(aborted, debug)
    assert "by the watchdog of its collectives: one has failed or was not over in time" in told
    assert "debug/watchdog-rank-3" in told and told.endswith("its stacks are in the workdir's debug/rank-3.txt")
    os.utime(trace, (0, 0))  # an earlier run's
    assert "by a library" in what_failed(aborted, debug)
    assert what_failed({3: Failure(-signal.SIGKILL, 5)}, debug) == "rank 3 was killed by SIGKILL"


@pytest.fixture
def recorder(tmp_path, monkeypatch):
    """Installs a flight recorder that is read by a function of the test."""
    monkeypatch.setattr(flight, "_recorder", flight._Recorder())
    monkeypatch.setattr(flight, "LIMIT", 0.5)
    monkeypatch.delenv("TORCH_A", raising=False)
    monkeypatch.setenv("TORCH_B", "mine")
    stacks.install(tmp_path / "debug", None)
    yield lambda read: flight.install({"TORCH_A": "{file}", "TORCH_B": "2000"}, read, 3)
    stacks.uninstall()
    monkeypatch.delenv("TORCH_A", raising=False)


def test_the_flight_recorder_is_switched_on_and_read_by_library(recorder, tmp_path):
    recorder(lambda: {"gloo": b'{"entries": []}', "hccl": b'{"entries": [1]}'})
    assert os.environ["TORCH_A"] + "3" == str(flight.watchdog_file(tmp_path / "debug", 3))
    assert os.environ["TORCH_B"] == "mine"
    flight.write()
    assert collective(tmp_path, 3)["hccl"] == {"entries": [1]}


@pytest.mark.parametrize("read", [lambda: {}["none"], lambda: time.sleep(60)], ids=["fails", "hangs"])
def test_a_flight_recorder_that_cannot_be_read_delays_nothing(read, recorder, tmp_path):
    recorder(read)
    began = time.monotonic()
    flight.write()
    assert time.monotonic() - began < 30 and not list(tmp_path.glob("debug/*.json"))


def test_a_run_without_a_hang_leaves_no_folder(tmp_path):
    assert miniature.run(miniature.words(tmp_path, steps=1, eval_every="0")).code == 0
    assert not (tmp_path / "debug").exists()


def test_the_limit_of_waiting_follows_the_slowest_step_up_to_the_configured_one(monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", datetime.timedelta(seconds=900), world_size=1, rank=0)
    try:
        monkeypatch.setattr(group, "joined", group.Group())
        group.joined.timeout = group.joined.longest = 900
        for seconds, limit in ((300.0, 300), (412.3, 413), (5000.0, 900)):
            collectives.limit_waiting(seconds)
            backend = dist.group.WORLD._get_backend(torch.device("cpu"))
            assert backend.options._timeout == datetime.timedelta(seconds=limit)
            assert group.joined.timeout == limit
        with monkeypatch.context() as patch:
            patch.setattr(dist.ProcessGroup, "set_timeout", refuse)
            collectives.limit_waiting(400.0)
        assert group.joined.fixed and group.joined.timeout == 900
    finally:
        dist.destroy_process_group()


def refuse(group: dist.ProcessGroup, timeout: datetime.timedelta) -> None:
    """What a library says that cannot change its limit."""
    raise RuntimeError("Backend does not support setting timeout")


def test_every_rank_has_a_log_with_what_it_did_and_its_traceback(tmp_path):
    broken = {"at": "inside step", "n": 4, "do": "error:a fault", "rank": 1}
    ended = miniature.run(miniature.words(tmp_path, "cpu2", log_every="1 step"), broken)
    assert ended.code == 1
    logs = [(tmp_path / f"logs/rank-{rank}.log").read_text() for rank in (0, 1)]
    assert "step 3/12" in logs[0] and "device: 2 x cpu" in logs[1]
    assert "RuntimeError: a fault" in logs[1] and "rank 1 lost" in logs[0]
    assert all(re.match(r"\d\d-\d\d \d\d:\d\d:\d\d ", text) for text in logs)
