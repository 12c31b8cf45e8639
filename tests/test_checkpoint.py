"""Checkpoints: a crash at any point, damaged files, pruning, and the manifest's notes."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading

import miniature
import pytest
import safetensors.torch
import torch

from pcpvt.checkpoints import checkpoint
from pcpvt.checkpoints.atomic import remove_leftovers, write_atomically
from pcpvt.checkpoints.writer import Saver
from pcpvt.errors import UserError
from pcpvt.functional import state
from pcpvt.functional.flat import pack
from pcpvt.runtime.console import Console
from pcpvt.train import resume


def train_state(step: int) -> state.TrainState:
    return state.TrainState(
        step=torch.tensor(step), params={"w": torch.full((4, 5), float(step)), "empty": torch.zeros(0, 3)}, ema={},
        opt={"mu": {"w": torch.zeros(4, 5).half()}}, scale={"good": torch.tensor(3, dtype=torch.int32)},
        skipped=torch.tensor(0, dtype=torch.int32),
    )  # fmt: skip


def tensors(step: int) -> dict[str, torch.Tensor]:
    return state.flatten(train_state(step))


def meta(step: int, acc1: float | None = None) -> dict:
    metrics = None if acc1 is None else {"acc1": acc1, "acc5": 50.0, "loss": 1.0, "seen": 4}
    return {
        "step": step, "config": {"seed": 0}, "classes": ["a", "b"], "examples": 4, "metrics": metrics,
        "best": metrics and {**metrics, "step": step}, "records": 0, "stale": 0,
        "window": {"loss": 0.0, "steps": 0, "skipped": 0, "grad_norm": 0.0},
        "clock": {"steps": 0, "seconds": 0.0, "elapsed": 0.0},
    }  # fmt: skip


def save(folder, step, acc1=None):
    return checkpoint.save(folder, tensors(step), meta(step, acc1))


def damage(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.fixture
def steps(tmp_path):
    return lambda: sorted(checkpoint.steps(tmp_path))


# Writing.


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_crash_at_every_point_of_the_protocol_leaves_a_whole_checkpoint(tmp_path):
    crash = miniature.FAULTS / "crash.py"
    env = {**os.environ, "PYTHONPATH": str(miniature.ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(crash), str(tmp_path)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    points = [line.partition(" ")[2] for line in done.stdout.splitlines()]
    assert {"write tensors", "write tensors, half", "fsync", "replace", "unlink", "write text"} <= set(points)
    assert points.count("replace") == 3 and points.count("fsync") >= 6
    renamed = False
    for n, point in enumerate(points, 1):
        folder = tmp_path / str(n)
        found = checkpoint.steps(folder)
        whole = [step for step, path in found.items() if checkpoint.is_whole(path)]
        assert whole == list(found), (n, point)  # every file with a checkpoint's name is whole
        assert 10 in found or 20 in found, (n, point)
        renamed = renamed or 20 in found
        assert renamed == (20 in found), (n, point)
        if 10 in found:  # its note is not lost
            assert checkpoint.read_meta(found[10])["metrics"]["acc1"] == 10
        # The restarted run saves again and leaves the same files as an uninterrupted one.
        saver = Saver(folder, keep_checkpoints=1, warn=pytest.fail)
        saver.save(train_state(20), meta(20))
        saver.add_evaluation(train_state(20), {"metrics": {"acc1": 20.0}, "best": None, "records": 2, "stale": 0})
        saver.finish()
        assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "step-00000020.safetensors"]
        assert checkpoint.read(checkpoint.steps(folder)[20]).meta["metrics"] == {"acc1": 20.0}
    assert renamed


def test_failed_save_is_reported_once_and_leaves_earlier_checkpoints(tmp_path, monkeypatch, steps):
    warnings = []
    saver = Saver(tmp_path, keep_checkpoints=1, warn=warnings.append)
    saver.save(train_state(1), meta(1))
    saver.finish()
    assert warnings == []

    def full(_, path, __):
        path.write_bytes(b"part")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", full)
        saver.save(train_state(2), meta(2))
        assert warnings == []
        saver.save(train_state(3), meta(3))
        assert len(warnings) == 1 and "No space left on device" in warnings[0]
        saver.finish()
        saver.finish()
        assert len(warnings) == 2
        saver.save(train_state(3), meta(3))  # tried again
        with pytest.raises(UserError, match=r"step 3 was not written \(No space left.*step-00000001.safetensors: free"):
            saver.finish_last(3)
        saver.finish_last(3)
        assert len(warnings) == 2
    assert steps() == [1] and saver.last_good() == checkpoint.steps(tmp_path)[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.json", "step-00000001.safetensors"]


def test_step_is_saved_once_and_only_by_the_main_process(tmp_path, monkeypatch, steps):
    saved = []
    original = checkpoint.write_tensors
    monkeypatch.setattr(checkpoint, "write_tensors", lambda *args: saved.append(args) or original(*args))
    for writes in (False, True):
        saver = Saver(tmp_path, keep_checkpoints=1, warn=pytest.fail, saved=4, writes=writes)
        for step in (4, 5, 5):
            saver.save(train_state(step), meta(step))
            saver.finish_last(step)
        assert len(saved) == writes and steps() == [5] * writes
        saver.add_evaluation(train_state(5), meta(5, 7.0))
        saver.finish()
        assert len(saved) == writes and bool(checkpoint.read_manifest(tmp_path)) == writes


def test_checkpoint_that_does_not_read_back_is_not_kept(tmp_path, monkeypatch, steps):
    original = safetensors.torch.save_file

    def bad_disk(values, path, metadata):
        original(values, path, metadata)
        damage(path)

    monkeypatch.setattr(safetensors.torch, "save_file", bad_disk)
    with pytest.raises(OSError, match="does not read back"):
        save(tmp_path, 5)
    assert list(tmp_path.iterdir()) == []


def test_saving_does_not_block_steps_and_is_not_changed_by_them(tmp_path, monkeypatch):
    first = state.create(pack({"w": torch.ones(1000)}), {"count": torch.zeros(())}, {}, ema=True)
    writing, go = threading.Event(), threading.Event()
    original = checkpoint.write_tensors

    def slow(*args):
        writing.set()
        assert go.wait(30)
        return original(*args)

    monkeypatch.setattr(checkpoint, "write_tensors", slow)
    saver = Saver(tmp_path, keep_checkpoints=1, warn=pytest.fail)
    saver.save(first, meta(0))  # returns before anything is written
    assert writing.wait(30) and not checkpoint.steps(tmp_path)
    first.params["w"].zero_()  # the next step reuses the memory
    go.set()
    saver.finish()
    assert checkpoint.read(checkpoint.steps(tmp_path)[0]).tensors["params/w"].eq(1).all()


def test_evaluation_is_added_without_waiting_for_the_checkpoint(tmp_path, monkeypatch):
    go, original = threading.Event(), checkpoint.write_tensors
    monkeypatch.setattr(checkpoint, "write_tensors", lambda *args: go.wait(30) and original(*args))
    saver = Saver(tmp_path, keep_checkpoints=1, warn=pytest.fail)
    saver.save(train_state(1), meta(1))
    saver.add_evaluation(train_state(1), meta(1, 7.0))
    assert not checkpoint.steps(tmp_path)
    go.set()
    saver.finish()
    assert checkpoint.read(checkpoint.steps(tmp_path)[1]).meta["metrics"]["acc1"] == 7.0


def test_failed_checkpoint_is_tried_again_with_its_evaluation_and_its_own_tensors(tmp_path, monkeypatch):
    original, failures = checkpoint.write_tensors, [OSError(errno.EIO, "Input/output error")]

    def write(*args):
        if failures:
            raise failures.pop()
        return original(*args)

    monkeypatch.setattr(checkpoint, "write_tensors", write)
    saver, now = Saver(tmp_path, keep_checkpoints=1, warn=pytest.fail), train_state(1)
    saver.save(now, meta(1))
    saver.add_evaluation(now, meta(1, 7.0))
    now.params["w"].zero_()  # the next step reuses the memory
    saver.finish()
    found = checkpoint.read(checkpoint.steps(tmp_path)[1])
    assert found.meta["metrics"]["acc1"] == 7.0 and found.tensors["params/w"].eq(1).all()


def test_written_checkpoint_is_not_tried_again_when_what_follows_failed(tmp_path, monkeypatch):
    saver = Saver(tmp_path, keep_checkpoints=1, warn=pytest.fail)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "prune", lambda *args: 1 / 0)
        saver.save(train_state(1), meta(1))
        assert saver._job.exception(30) is not None
    saver.add_evaluation(train_state(1), meta(1, 7.0))
    saver.finish()
    found = checkpoint.read(checkpoint.steps(tmp_path)[1])
    assert found.meta["metrics"]["acc1"] == 7.0 and found.tensors.keys() == tensors(1).keys()


def test_files_have_the_mode_of_the_umask(tmp_path):
    (tmp_path / "plain").touch()
    assert save(tmp_path, 1).stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_link_under_the_temporary_name_is_not_followed(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("precious")
    path = tmp_path / "x.json"
    path.with_name(f".x.json.{os.getpid()}.tmp").symlink_to(outside)
    write_atomically(path, lambda temporary: temporary.write_text("new"))
    assert outside.read_text() == "precious" and path.read_text() == "new" and not path.is_symlink()


def test_leftovers_of_a_crash_are_removed_and_nothing_else(tmp_path):
    for name in (".step-00000001.safetensors.77.tmp", ".tmpAbC123", "keep.tmp", ".hidden"):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", "keep.tmp"]


# Reading, resuming and pruning.


def test_newest_whole_checkpoint_is_resumed_with_a_warning_for_each_damaged_one(tmp_path, capsys):
    session = type("S", (), {"checkpoints": tmp_path})
    save(tmp_path, 1), damage(save(tmp_path, 2)), save(tmp_path, 3).write_bytes(b"")
    assert resume.newest(session, Console()).meta["step"] == 1
    warnings = capsys.readouterr().err.splitlines()
    assert ["step-00000003" in warnings[0], "step-00000002" in warnings[1], len(warnings)] == [True, True, 2]
    assert resume.newest(session, Console(speaks=False)).meta["step"] == 1
    assert capsys.readouterr().err == ""


def test_reading_a_damaged_checkpoint_is_an_error(tmp_path):
    path = save(tmp_path, 2)
    damage(path)
    with pytest.raises(checkpoint.CheckpointError, match=r"step-00000002.*checksum"):
        checkpoint.read(path)


def test_file_named_for_another_step_is_refused(tmp_path):
    save(tmp_path, 2).rename(tmp_path / checkpoint.name_of(9))
    with pytest.raises(checkpoint.CheckpointError, match="holds step 2"):
        checkpoint.read(tmp_path / checkpoint.name_of(9))
    (tmp_path / checkpoint.name_of(9)).rename(tmp_path / "mine.safetensors")
    assert checkpoint.read(tmp_path / "mine.safetensors").meta["step"] == 2


def test_checkpoint_without_the_fields_of_training_is_not_resumed(tmp_path):
    checkpoint.save(tmp_path, tensors(1), {"step": 1, "classes": ["a"]})
    with pytest.raises(checkpoint.CheckpointError, match="no run goes on from it"):
        resume.newest(type("S", (), {"checkpoints": tmp_path}), Console())


def test_pruning_keeps_the_best_and_the_newest(tmp_path, steps):
    for step, acc1 in ((1, 10.0), (2, 30.0), (3, None), (4, 20.0), (5, 20.0)):
        save(tmp_path, step, acc1)
        checkpoint.prune(tmp_path, 2, step, {})
    assert steps() == [2, 4, 5]
    assert [path.name[12:13] for path in checkpoint.by_score(tmp_path)] == ["2", "5", "4"]


def test_damaged_checkpoints_are_neither_counted_nor_pruned(tmp_path, steps):
    save(tmp_path, 10, 50.0)
    damage(save(tmp_path, 20, 90.0))  # newer and better, by its header
    checkpoint.prune(tmp_path, 1, 20, {})
    assert steps() == [10, 20]
    save(tmp_path, 15, 40.0)  # the run resumed from 10
    checkpoint.prune(tmp_path, 1, 15, {})
    assert steps() == [10, 15, 20]
    save(tmp_path, 20, 60.0)
    checkpoint.prune(tmp_path, 1, 20, {})
    assert steps() == [20]


def test_note_applies_only_to_the_file_with_its_digest(tmp_path):
    path = save(tmp_path, 3)
    checkpoint.note(tmp_path, path.name, metrics={"acc1": 7.0}, records=4)
    assert checkpoint.read(path).meta["metrics"] == {"acc1": 7.0} == checkpoint.read_meta(path)["metrics"]
    assert checkpoint.read(path).meta["records"] == 4
    other = {**tensors(3), "params/w": torch.ones(4, 5)}
    checkpoint.write_tensors(path, other, meta(3))
    assert checkpoint.read(path).meta["metrics"] is None


def test_rewritten_checkpoint_keeps_its_notes_only_if_its_content_is_the_same(tmp_path):
    path = save(tmp_path, 3)
    checkpoint.note(tmp_path, path.name, metrics={"acc1": 7.0}, best={"acc1": 7.0})
    save(tmp_path, 3)
    assert checkpoint.read(path).meta["metrics"] == {"acc1": 7.0}  # the same content
    checkpoint.save(tmp_path, {**tensors(3), "params/w": torch.ones(4, 5)}, meta(3))
    assert checkpoint.read(path).meta["metrics"] is None is checkpoint.read(path).meta["best"]


def test_note_is_written_only_after_its_records_are_durable(tmp_path):
    noted = []

    def sync():
        noted.append("metrics" in checkpoint.read_manifest(tmp_path).get(checkpoint.name_of(3), {}))
        if len(noted) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    warnings = []
    saver = Saver(tmp_path, keep_checkpoints=1, warn=warnings.append, before=[sync])
    saver.save(train_state(3), meta(3))
    saver.add_evaluation(train_state(3), meta(3, 7.0))
    saver.finish()
    assert len(warnings) == 1 and "metrics" not in checkpoint.read_manifest(tmp_path)[checkpoint.name_of(3)]
    saver = Saver(tmp_path, keep_checkpoints=1, warn=pytest.fail, before=[sync], saved=3)
    saver.add_evaluation(train_state(3), {"metrics": {"acc1": 7.0}, "best": None, "records": 0, "stale": 0})
    saver.finish()
    assert noted == [False, False, False]
    assert checkpoint.read_manifest(tmp_path)[checkpoint.name_of(3)]["metrics"] == {"acc1": 7.0}


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"checkpoints": 3, "checksum": "x"}', "[" * 100_000])
def test_damaged_manifest_counts_as_empty(tmp_path, text):
    path = save(tmp_path, 3)
    (tmp_path / checkpoint.MANIFEST).write_text(text)
    assert checkpoint.read_manifest(tmp_path) == {} and checkpoint.read(path).meta["metrics"] is None
    checkpoint.note(tmp_path, path.name, digest="x")
    assert list(checkpoint.read_manifest(tmp_path)) == [path.name]


def test_changed_number_in_the_manifest_is_noticed(tmp_path):
    path = save(tmp_path, 3)
    checkpoint.note(tmp_path, path.name, metrics={"acc1": 7.0})
    file = tmp_path / checkpoint.MANIFEST
    file.write_text(file.read_text().replace('"acc1": 7.0', '"acc1": 9.0'))
    assert checkpoint.read(path).meta["metrics"] is None
