"""A signal, wherever it comes, ends a run with its state saved and exit code 75; a second one ends it at once."""

from __future__ import annotations

import os
import signal
import time

import miniature
import pytest

from pcpvt.checkpoints import checkpoint
from pcpvt.distributed.signals import ONE_SIGNAL, PREEMPTED


def saved(workdir) -> list[int]:
    return list(checkpoint.steps(workdir / "checkpoints"))


def test_before_the_first_step_there_is_nothing_to_save(tmp_path):
    ended = miniature.run(miniature.words(tmp_path), {"at": "start", "n": 1, "do": "SIGHUP"})
    assert ended.code == PREEMPTED, ended.err
    assert ended.err == "pcpvt: stopped by a signal with nothing new to save; the same command starts again\n"
    assert saved(tmp_path) == [] and (tmp_path / "lock").read_text() == ""


def test_during_the_imports(tmp_path):
    process = miniature.start(miniature.words(tmp_path), cold=True)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    ended = miniature.end(process)
    assert ended.code == PREEMPTED and ended.err.count("\n") == 1, ended.err


def test_during_the_first_step_which_compiles(tmp_path):
    process = miniature.start(miniature.words(tmp_path), {"at": "inside step", "n": 1, "do": "sleep:60"})
    miniature.await_line(process, "fault:")
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert miniature.end(process).code == PREEMPTED
    assert time.monotonic() - began < 10 and saved(tmp_path) == []


def test_while_a_checkpoint_is_written(tmp_path):
    # The writer of step 4 sleeps before its first fsync; the signal comes after step 5.
    slow = {"at": "disk", "n": 7, "do": "sleep:1"}
    ended = miniature.run(miniature.words(tmp_path), slow, {"at": "step", "n": 5, "do": "SIGTERM"})
    assert ended.code == PREEMPTED, ended.err
    assert saved(tmp_path) == [4, 5]


def test_to_the_whole_group_with_loader_processes(tmp_path):
    data = miniature.image_folder(tmp_path / "data")
    words = miniature.words(
        tmp_path / "run", "cpu,folder", data__path=data, image_size=32, batch_size=8, augment__randaugment="",
        data__workers=2, steps=400, eval_every="8 steps",
    )  # fmt: skip
    process = miniature.start(words)
    miniature.await_line(process, "step 9/400")
    os.killpg(process.pid, signal.SIGTERM)
    ended = miniature.end(process)
    assert ended.code == PREEMPTED and ended.err == "", ended.err
    assert f"at step {saved(tmp_path / 'run')[-1]}; saved" in ended.out


def test_second_signal_ends_at_once(tmp_path):
    """Also in C code, where no handler of Python's gets a turn, and with all processes below."""
    data = miniature.image_folder(tmp_path / "data", 8)
    words = miniature.words(
        tmp_path / "run", "cpu,folder", data__path=data, image_size=32, batch_size=8, augment__randaugment="",
        data__workers=1, eval_every="4 steps",
    )  # fmt: skip
    process = miniature.start(words, {"at": "evaluation", "n": 1, "do": "hold:60"})
    miniature.await_line(process, "fault:")
    process.send_signal(signal.SIGTERM)
    time.sleep(ONE_SIGNAL + 0.3)
    assert process.poll() is None
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.wait(10)
    assert time.monotonic() - began < 2
    ended = miniature.end(process)
    assert ended.code == 128 + signal.SIGTERM and "a second signal" in ended.error
    assert saved(tmp_path / "run") == [4]  # written before the evaluation began


def test_grace_bounds_the_wait_for_a_step(tmp_path):
    words = miniature.words(tmp_path, grace=2)
    process = miniature.start(words, {"at": "inside step", "n": 6, "do": "hold:60"})
    miniature.await_line(process, "fault:")
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    ended = miniature.end(process)
    assert ended.code == 128 + signal.SIGTERM and "config.grace" in ended.error
    assert 1.5 < time.monotonic() - began < 8 and saved(tmp_path) == [4]


@pytest.mark.parametrize(
    "whom", [pytest.param("launcher", marks=pytest.mark.slow), "group"]
)  # to one rank: see test_resume.py
def test_processes_agree_on_the_step_to_stop_at(whom, tmp_path):
    words = miniature.words(tmp_path, "cpu2", steps=5000, eval_every="0", save_every="0", log_every="1 step")
    process = miniature.start(words)
    miniature.await_line(process, "step 3/")
    (os.killpg if whom == "group" else os.kill)(process.pid, signal.SIGTERM)
    ended = miniature.end(process)
    assert ended.code == PREEMPTED and ended.err == "", ended.err
    assert f"at step {saved(tmp_path)[-1]}; saved" in ended.out


def test_launcher_stops_before_its_ranks_have_started(tmp_path):
    process = miniature.start(miniature.words(tmp_path, "cpu2"))
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    ended = miniature.end(process)
    assert ended.code == PREEMPTED and "Traceback" not in ended.err, ended.err


def test_killed_launcher_leaves_no_orphans_and_the_ranks_save(tmp_path):
    words = miniature.words(tmp_path, "cpu2", steps=5000, eval_every="0", save_every="0", log_every="1 step")
    process = miniature.start(words)
    miniature.await_line(process, "step 3/")
    process.kill()
    process.wait()
    assert miniature.members(process) == {}
    assert len(saved(tmp_path)) == 1


@pytest.mark.nightly
def test_real_compilation_is_interrupted(tmp_path):
    process = miniature.start(miniature.words(tmp_path, compile="inductor"))
    miniature.await_line(process, "disk:")
    time.sleep(5)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    ended = miniature.end(process)
    assert ended.code == PREEMPTED and time.monotonic() - began < 10, ended.err
