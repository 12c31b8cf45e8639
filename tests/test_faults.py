"""Faults of disks, data, loader processes, ranks and numbers: one clear line in bounded time, no saved state lost."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import miniature
import pytest

from pcpvt.checkpoints import checkpoint
from pcpvt.checkpoints.checkpoint import CheckpointError
from pcpvt.distributed.signals import ONE_SIGNAL
from pcpvt.errors import UserError
from pcpvt.runtime import lock, records


def steps(workdir: Path) -> list[int]:
    """Steps of the whole checkpoints."""
    return [step for step, path in checkpoint.steps(workdir / "checkpoints").items() if checkpoint.is_whole(path)]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return miniature.image_folder(tmp_path_factory.mktemp("images"))


def on_images(images: Path, workdir: Path, **fields: object) -> list[str]:
    fields = {"image_size": 32, "batch_size": 8, "augment__randaugment": "", "data__path": images, **fields}
    return miniature.words(workdir, "cpu,folder", **fields)


@contextlib.contextmanager
def small_disk(at: Path, size: str):
    """A file system of its own, where the tests may mount one."""
    at.mkdir(parents=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(at)], capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        yield at
    finally:
        subprocess.run(["umount", "-l", str(at)], check=True)


# One run per workdir.


def test_second_run_is_refused_and_a_killed_one_leaves_no_lock(tmp_path):
    words = miniature.words(tmp_path, steps=100_000, eval_every="0", save_every="0", log_every="1 step")
    first = miniature.start(words)
    miniature.await_line(first, "step 2/")
    refused = miniature.run(words)
    who = f"process {first.pid} on {socket.gethostname()}"
    assert refused.code == 2 and who in refused.error and "--workdir" in refused.error
    first.kill()
    first.wait()
    third = miniature.run(words, {"at": "start", "n": 1, "do": "SIGTERM"})
    assert f"note: {who} (since " in third.out and "taken over" in third.out
    assert third.code == 75, third.err


def test_lock_without_flock_detects_whether_its_holder_lives(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(lock.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", unsupported)
    with lock.held(tmp_path) as note:
        assert note == ""
        with pytest.raises(UserError, match=f"process {os.getpid()} on"), lock.held(tmp_path):
            pass
    dead = subprocess.Popen(["true"])
    dead.wait()
    for host, free in ((socket.gethostname(), True), ("elsewhere", False)):
        (tmp_path / lock.NAME).write_text(json.dumps({"host": host, "pid": dead.pid, "since": "\x1b[31mred"}))
        with contextlib.nullcontext() if free else pytest.raises(UserError) as caught, lock.held(tmp_path) as note:
            assert "taken over" in note and "\x1b" not in note
        assert free or "\x1b" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"pid": "x"}', "\xff" * 5000])
def test_unreadable_lock_file_is_taken_over(tmp_path, text):
    (tmp_path / lock.NAME).write_bytes(text.encode("latin-1"))
    with lock.held(tmp_path) as note:
        assert note == ""


# Disks.


def test_disk_too_small_for_the_checkpoints_is_refused_at_the_start(tmp_path):
    with small_disk(tmp_path / "disk", "3m") as disk:
        ended = miniature.run(miniature.words(disk / "run"))
        assert ended.code == 2 and re.search(r"4 checkpoints of 1\.6\d MB need 6\.\d+ MB", ended.error), ended.error
        assert steps(disk / "run") == [] and not list((disk / "run/checkpoints").iterdir())


def test_disk_that_fills_up_costs_nothing_once_there_is_space(tmp_path):
    with small_disk(tmp_path / "disk", "10m") as disk:
        words = miniature.words(disk / "run", keep=1)
        process = miniature.start(words, {"at": "step", "n": 6, "do": "sleep:1"})
        miniature.await_line(process, "fault:")
        with contextlib.suppress(OSError), open(disk / "ballast", "wb", buffering=0) as ballast:
            while ballast.write(bytes(65536)):
                pass
        ended = miniature.end(process)
        assert ended.code == 2, ended.err
        assert "the last good one is" in ended.error and "step-00000004" in ended.error
        assert "checkpoint not written" in ended.err and "No space left" in ended.err
        assert steps(disk / "run") == [4]
        (disk / "ballast").unlink()
        ended = miniature.run(words)
        assert ended.code == 0 and "resumed: step 4" in ended.out, ended.err
        assert [r["step"] for r in miniature.records(disk / "run")] == [3, 6, 8, 9, 12, 12]


def test_checkpoints_that_were_removed_meanwhile_are_not_named(tmp_path):
    process = miniature.start(miniature.words(tmp_path), {"at": "step", "n": 6, "do": "sleep:1"})
    miniature.await_line(process, "fault:")
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "checkpoints").write_text("")
    ended = miniature.end(process)
    assert ended.code == 2 and "the last good one is none" in ended.error, ended.err


def test_failed_save_is_a_warning_and_one_before_an_evaluation_is_made_up_for_after_it(tmp_path):
    # The first call is the trial, the second step 4, the third step 8 before its evaluation.
    faults = [{"at": "save", "n": n, "do": "EIO"} for n in (2, 3)]
    ended = miniature.run(miniature.words(tmp_path, keep=3), *faults)
    assert ended.code == 0, ended.err
    warning = "pcpvt: warning: checkpoint not written (Input/output error); training goes on with the earlier ones\n"
    assert ended.err == warning  # of step 4
    found = checkpoint.steps(tmp_path / "checkpoints")
    assert list(found) == [8, 12] and checkpoint.read(found[8]).meta["metrics"]["seen"] == 364


def test_read_only_workdir_is_one_line(tmp_path):
    for folder in ("/proc/none/run", "/dev/null/run"):
        with pytest.raises(UserError, match=r"--workdir: .* cannot be written"):
            records.open_workdir(Path(folder))
    with small_disk(tmp_path / "disk", "1m") as disk:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(UserError, match="Read-only file system"):
            records.open_workdir(disk / "run")


def test_unexpected_error_of_the_system_is_one_line(tmp_path):
    (tmp_path / "config.json").mkdir()
    ended = miniature.run(miniature.words(tmp_path))
    assert ended.code == 2 and "config.json" in ended.error


@pytest.mark.parametrize(
    "shell", [pytest.param('exec "$@" > /dev/full', marks=pytest.mark.slow), '"$@" | head -n 3; exit ${PIPESTATUS[0]}']
)
def test_training_outlives_the_reader_of_its_output(shell, tmp_path):
    ended = miniature.run(miniature.words(tmp_path), under=["bash", "-c", shell, "bash"])
    assert ended.code == 0, ended.err
    assert re.fullmatch(r"pcpvt: warning: standard output is lost from here on \(.*\)\n", ended.err)
    assert steps(tmp_path) == [8, 12] and json.loads((tmp_path / "result.json").read_text())["steps"] == 12


def test_error_keeps_its_exit_code_where_it_cannot_be_said(tmp_path):
    ended = miniature.run(miniature.words(tmp_path, seed=-1), under=["bash", "-c", 'exec "$@" 2> /dev/full', "bash"])
    assert ended.code == 2


def test_second_signal_ends_a_run_that_cannot_say_so(tmp_path):
    words = miniature.words(tmp_path)
    hold = {"at": "evaluation", "n": 1, "do": "hold:60"}
    process = miniature.start(words, hold, under=["bash", "-c", 'exec "$@" 2> /dev/full', "bash"])
    miniature.await_line(process, "fault:")
    process.send_signal(signal.SIGTERM)
    time.sleep(ONE_SIGNAL + 0.3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 128 + signal.SIGTERM
    miniature.end(process)


# Data and loader processes.


def test_data_that_vanish_end_the_run_with_its_state_saved(images, tmp_path):
    data = shutil.copytree(images, tmp_path / "data")
    words = on_images(data, tmp_path / "run", data__workers=0)
    process = miniature.start(words, {"at": "step", "n": 5, "do": "sleep:1"})
    miniature.await_line(process, "fault:")
    shutil.move(data / "train", tmp_path / "gone")
    ended = miniature.end(process)
    assert ended.code == 2 and re.search(r"data/train/(cat|dog)/\d+\.png: .*No such file", ended.error), ended.error
    assert steps(tmp_path / "run") == [4, 5]
    shutil.move(tmp_path / "gone", data / "train")
    ended = miniature.run(words)
    assert ended.code == 0 and "resumed: step 5 of 12" in ended.out, ended.err


def test_killed_loader_process_ends_the_run_with_its_state_saved(images, tmp_path):
    words = on_images(images, tmp_path, data__workers=1, steps=5000, eval_every="0")
    ended = miniature.run(words, {"at": "step", "n": 6, "do": "SIGKILL", "to": "child"})
    assert ended.code == 2 and "config.data.workers: a loader process died" in ended.error
    assert steps(tmp_path)[-1] >= 6


def test_limit_of_open_files_is_one_line_and_what_was_done_is_saved(images, tmp_path):
    words = on_images(images, tmp_path, data__workers=2, steps=5000, eval_every="0")
    process = miniature.start(words, {"at": "step", "n": 6, "do": "sleep:1"})
    miniature.await_line(process, "fault:")
    limit = len(os.listdir(f"/proc/{process.pid}/fd")) + 8
    resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (limit, limit))
    ended = miniature.end(process)
    assert ended.code == 2 and ended.err.count("\n") == 1, ended.err
    assert "config.data.workers: no more files can be opened" in ended.error and f"ulimit -n is {limit}" in ended.error
    assert steps(tmp_path)[-1] >= 6


@pytest.mark.slow
@pytest.mark.parametrize("limit", [22, 30, 40])
def test_limit_of_open_files_at_the_start_is_one_line(images, tmp_path, limit):
    words = on_images(images, tmp_path, data__workers=2, steps=5000, eval_every="0")
    ended = miniature.run(words, under=["bash", "-c", f'ulimit -n {limit}; exec "$@"', "bash"])
    assert ended.code == 2 and ended.err.count("\n") == 1, ended.err
    assert "config.data.workers" in ended.error and f"ulimit -n is {limit}" in ended.error


def test_full_shared_memory_is_named(images, tmp_path):
    script = 'mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$@"'
    if subprocess.run(["unshare", "-m", "sh", "-c", script, "sh", "true"], capture_output=True).returncode:
        pytest.skip("/dev/shm cannot be replaced here")
    words = on_images(images, tmp_path, data__workers=1, image_size=224, batch_size=16)
    ended = miniature.run(words, under=["unshare", "-m", "sh", "-c", script, "sh"])
    assert ended.code == 2 and "/dev/shm" in ended.error


# Processes.


@pytest.mark.nightly
def test_rank_that_hangs_is_named_in_bounded_time(tmp_path):
    words = miniature.words(tmp_path, "cpu2", steps=5000, eval_every="0", save_every="0", timeout=3, grace=2)
    process = miniature.start(words, {"at": "step", "n": 6, "do": "hold:600", "rank": 1})
    miniature.await_line(process, "fault:")
    began = time.monotonic()
    ended = miniature.end(process)
    assert ended.code not in (0, 75) and "rank 1" in ended.error and "config.timeout" in ended.error
    assert time.monotonic() - began < 20 and steps(tmp_path) == [6]


# Strangers' files.


def test_pickle_under_a_checkpoints_name_is_not_run(tmp_path):
    trap = tmp_path / "sprung"
    pickled = f"cos\nsystem\n(S'touch {trap}'\ntR.".encode()
    path = tmp_path / checkpoint.name_of(1)
    path.write_bytes(pickled)
    with pytest.raises(CheckpointError):
        checkpoint.read(path)
    assert not checkpoint.is_whole(path) and checkpoint.by_score(tmp_path) == [] and not trap.exists()


def test_nothing_in_the_package_unpickles_or_evaluates_strings():
    risky = re.compile(
        r"\b(pickle|marshal|shelve|dill)\.|(?<!safetensors\.)torch\.load\(|allow_pickle=True|"
        r"(?<![.\w])(eval|exec)\(|yaml\.load"
    )
    found = {
        path.name
        for path in (miniature.ROOT / "pcpvt").rglob("*.py")
        for line in path.read_text().splitlines()
        if risky.search(line) and "weights_only=True" not in line and not line.lstrip().startswith("#")
    }
    assert found == set()
