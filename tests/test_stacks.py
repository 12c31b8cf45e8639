"""A process that hangs says where: stacks in debug/, and the function and the step in the error of the others."""

from __future__ import annotations

import datetime
import os
import re
import signal
import socket
import sys
import time

import miniature
import pytest
import torch
import torch.distributed as dist

from pcpvt.distributed import collectives, signals

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def test_a_rank_that_hangs_in_c_is_named_with_its_function_and_step(tmp_path):
    stuck = {"at": "inside step", "n": 4, "do": "hold:30", "rank": 1}
    ended = miniature.run(miniature.words(tmp_path, "cpu2", timeout=3, grace=2, eval_every="0", save_every="0"), stuck)
    assert ended.code == signals.PEER_LOST
    place = re.search(r"rank 1 is in step of functional/step\.py, line \d+, after step 3; all stacks are in", ended.err)
    assert place, ended.err
    text = (tmp_path / "debug/rank-1.txt").read_text()
    assert "after step 3" in text and "sitecustomize.py" in text and "train/loop.py" in text
    assert "train/loop.py" in (tmp_path / "debug/rank-0.txt").read_text()


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


def test_a_run_without_a_hang_leaves_no_folder(tmp_path):
    assert miniature.run(miniature.words(tmp_path, steps=1, eval_every="0")).code == 0
    assert not (tmp_path / "debug").exists()


def test_the_limit_of_waiting_follows_the_slowest_step_up_to_the_configured_one(monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", datetime.timedelta(seconds=900), world_size=1, rank=0)
    try:
        monkeypatch.setattr(collectives, "_group", collectives._Group())
        collectives._group.timeout = collectives._group.longest = 900
        for seconds, limit in ((300.0, 300), (412.3, 413), (5000.0, 900)):
            collectives.limit_waiting(seconds)
            group = dist.group.WORLD._get_backend(torch.device("cpu"))
            assert group.options._timeout == datetime.timedelta(seconds=limit)
            assert collectives._group.timeout == limit
    finally:
        dist.destroy_process_group()


def test_every_rank_has_a_log_with_what_it_did_and_its_traceback(tmp_path):
    broken = {"at": "inside step", "n": 4, "do": "error:a fault", "rank": 1}
    ended = miniature.run(miniature.words(tmp_path, "cpu2", log_every="1 step"), broken)
    assert ended.code == 1
    logs = [(tmp_path / f"logs/rank-{rank}.log").read_text() for rank in (0, 1)]
    assert "step 3/12" in logs[0] and "device: 2 x cpu" in logs[1]
    assert "RuntimeError: a fault" in logs[1] and "rank 1 lost" in logs[0]
    assert all(re.match(r"\d\d-\d\d \d\d:\d\d:\d\d ", text) for text in logs)
