"""A signal at any point ends a run with its state saved and exit code 75; a second signal ends it at once."""

from __future__ import annotations

import contextlib
import os
import signal
import time

import miniature
import pytest

from pcpvt.checkpoints import checkpoint
from pcpvt.distributed.signals import ENDED_BY_LAUNCHER, LAUNCHER, ONE_SIGNAL, PEER_LOST, PREEMPTED, STOPPING
from pcpvt.errors import UserError


def saved(workdir) -> list[int]:
    """Steps of the checkpoints."""
    return list(checkpoint.steps(workdir / "checkpoints"))


def test_signal_before_the_first_step_saves_nothing(tmp_path):
    ended = miniature.run(miniature.words(tmp_path), {"at": "start", "n": 1, "do": "SIGHUP"})
    assert ended.code == PREEMPTED, ended.err
    assert ended.err == "pcpvt: stopped by a signal with nothing new to save; the same command starts again\n"
    assert saved(tmp_path) == [] and (tmp_path / "lock").read_text() == ""


def test_signal_during_the_imports(tmp_path):
    process = miniature.start(miniature.words(tmp_path), cold=True)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    ended = miniature.end(process)
    assert ended.code == PREEMPTED and ended.err.count("\n") == 1, ended.err


def test_signal_during_a_slow_first_step(tmp_path):
    process = miniature.start(miniature.words(tmp_path), {"at": "inside step", "n": 1, "do": "sleep:60"})
    miniature.await_line(process, "fault:")
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert miniature.end(process).code == PREEMPTED
    assert time.monotonic() - began < 10 and saved(tmp_path) == []


def test_a_rank_that_its_launcher_stops_does_not_say_that_somebody_has_asked_for_it(tmp_path):
    slow = {"at": "step", "n": 5, "do": "sleep:1"}
    process = miniature.start(miniature.words(tmp_path), slow, env={LAUNCHER: "1"})
    miniature.await_line(process, "fault:")
    os.kill(process.pid, signal.SIGUSR2)  # as `Agent` does
    process.send_signal(signal.SIGTERM)
    ended = miniature.end(process)
    assert ended.code == PEER_LOST and ended.err == ENDED_BY_LAUNCHER, ended.err
    assert saved(tmp_path) == [4, 5] and "stopped by the launcher at step 5; saved" in ended.out


def test_signal_while_a_checkpoint_is_written(tmp_path):
    # The writer of step 4 sleeps; the signal comes after step 5.
    slow = {"at": "save", "n": 2, "do": "sleep:1"}
    ended = miniature.run(miniature.words(tmp_path), slow, {"at": "step", "n": 5, "do": "SIGTERM"})
    assert ended.code == PREEMPTED, ended.err
    assert saved(tmp_path) == [4, 5]


@pytest.mark.parametrize("arg", ["cpu", pytest.param("cpu2", marks=pytest.mark.slow)])
def test_a_save_in_progress_is_finished_after_the_grace_period(arg, tmp_path):
    """The disk takes longer for the last checkpoint than the grace period, and than processes wait for one another."""
    slow = {"at": "save", "n": 2, "do": f"sleep:{4 if arg == 'cpu' else 12}"}
    words = miniature.words(tmp_path, arg, grace=1, timeout=10, save_every="0", eval_every="0")
    ended = miniature.run(words, slow, {"at": "step", "n": 5, "do": "SIGTERM", "to": "group"})
    assert ended.code == PREEMPTED and ended.err == STOPPING, ended.err
    assert saved(tmp_path) == [5] or (arg == "cpu2" and saved(tmp_path))


def test_a_save_that_takes_too_long_is_named(tmp_path, monkeypatch):
    """The limit of the save counts from its start; after it the grace period starts anew."""
    from pcpvt.distributed import signals

    now = [100.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(signals, "_request", signals._Request())
    signals.finish_step_first(2.0)
    assert signals._limit(90.0) == 102.0 - 10.0
    with signals.finish_save_first():
        now[0] = 150.0
        assert signals._limit(90.0) == 100.0 + signals.SAVE_LIMIT
    assert signals._limit(90.0) == 152.0


def test_signal_to_the_process_group_with_loader_processes(tmp_path):
    data = miniature.image_folder(tmp_path / "data")
    words = miniature.words(
        tmp_path / "run", "cpu,folder", data__path=data, image_size=32, batch_size=8, augment__randaugment="",
        data__workers=2, steps=400, eval_every="8 steps",
    )  # fmt: skip
    process = miniature.start(words)
    miniature.await_line(process, "step 9/400")
    os.killpg(process.pid, signal.SIGTERM)
    ended = miniature.end(process)
    assert ended.code == PREEMPTED and ended.err == STOPPING, ended.err
    assert f"at step {saved(tmp_path / 'run')[-1]}; saved" in ended.out


def test_second_signal_ends_at_once(tmp_path):
    """Also while C code runs, where Python's handlers do not run; all descendants end too."""
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


def test_run_ends_after_the_grace_period_without_a_step(tmp_path):
    words = miniature.words(tmp_path, grace=2)
    process = miniature.start(words, {"at": "inside step", "n": 6, "do": "hold:60"})
    miniature.await_line(process, "fault:")
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.stderr.readline() == STOPPING and time.monotonic() - began < 1.5  # an answer at once
    ended = miniature.end(process)
    assert ended.code == 128 + signal.SIGTERM and "config.grace" in ended.error
    assert 1.5 < time.monotonic() - began < 8 and saved(tmp_path) == [4]


@pytest.mark.parametrize(
    "target", [pytest.param("launcher", marks=pytest.mark.slow), "group"]
)  # to one rank: see test_resume.py
def test_processes_agree_on_the_step_to_stop_at(target, tmp_path):
    words = miniature.words(tmp_path, "cpu2", steps=5000, eval_every="0", save_every="0", log_every="1 step")
    process = miniature.start(words)
    miniature.await_line(process, "step 3/")
    (os.killpg if target == "group" else os.kill)(process.pid, signal.SIGTERM)
    ended = miniature.end(process)
    assert ended.code == PREEMPTED and ended.err == STOPPING, ended.err
    assert f"at step {saved(tmp_path)[-1]}; saved" in ended.out


def test_signal_before_the_launcher_has_started_ranks(tmp_path):
    ended = miniature.run(miniature.words(tmp_path, "cpu2"), {"at": "launch", "n": 1, "do": "SIGINT"})
    assert ended.code == PREEMPTED and ended.err.count("\n") == 1 and ended.out == "fault: SIGINT\n", ended.err


def test_killed_launcher_leaves_no_orphans_and_the_ranks_save(tmp_path):
    words = miniature.words(tmp_path, "cpu2", steps=5000, eval_every="0", save_every="0", log_every="1 step")
    process = miniature.start(words)
    miniature.await_line(process, "step 3/")
    process.kill()
    process.wait()
    assert miniature.members(process) == {}
    assert len(saved(tmp_path)) == 1


def test_launcher_killed_before_its_ranks_are_set_up_leaves_no_orphans(tmp_path):
    """They must notice although they have never seen it alive."""
    late = [{"at": "begin", "do": "sleep:3", "rank": rank} for rank in (0, 1)]
    process = miniature.start(miniature.words(tmp_path, "cpu2"), *late)
    miniature.await_line(process, "fault:")
    process.kill()
    process.wait()
    assert miniature.members(process) == {}


@pytest.mark.nightly
def test_signal_interrupts_compilation(tmp_path):
    process = miniature.start(miniature.words(tmp_path, compile="inductor"))
    miniature.await_line(process, "disk:")
    time.sleep(5)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    ended = miniature.end(process)
    assert ended.code == PREEMPTED and time.monotonic() - began < 10, ended.err


@pytest.mark.parametrize("error", [RecursionError, ImportError, AttributeError, OSError, SystemError, UserError])
def test_an_error_that_a_stop_causes_during_an_import_is_that_stop(monkeypatch, capsys, error):
    """numpy turns an exception inside its lazy imports into a RecursionError; other modules may raise other errors."""
    from absl import app

    from pcpvt import main
    from pcpvt.distributed import signals

    def interrupted(*args, **options):
        with contextlib.suppress(signals.Stopped):
            signals._handle(signal.SIGTERM, None)
        raise error("of a module that was being imported")

    monkeypatch.setattr(app, "run", interrupted)
    monkeypatch.setattr(signals, "install", lambda: None)
    monkeypatch.setattr(signals, "ignore_from_now", lambda: None)
    monkeypatch.setattr(signals, "_request", signals._Request())
    with pytest.raises(SystemExit) as ended:
        main.entry()
    assert ended.value.code == PREEMPTED
    line = capsys.readouterr().err
    assert line.startswith("pcpvt: stopped by a signal with nothing new to save") and line.count("\n") == 1
