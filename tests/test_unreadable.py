"""With `on_error=skip` an unreadable image is named once and counted, in training and in evaluation."""

from __future__ import annotations

import json

import miniature

from pcpvt.checkpoints.writer import Saver
from pcpvt.config import recipes
from pcpvt.distributed.signals import PREEMPTED
from pcpvt.runtime import session as sessions
from pcpvt.train import loop
from pcpvt.train.setup import prepare


def test_unreadable_images_are_named_once_and_counted_over_all_processes_and_resumed_runs(tmp_path):
    data = miniature.image_folder(tmp_path / "data")  # 32 training images: 12 batches of 8 are 3 epochs
    bad = [data / split / "cat" / "3.png" for split in ("train", "val")]
    for path in bad:
        path.write_bytes(b"no image")
    words = miniature.words(
        tmp_path / "run", "cpu2,folder", data__path=data, data__on_error="skip", data__workers=0, image_size=32,
        batch_size=8, eval_every="3 steps", log_every="1 step",
    )  # fmt: skip
    cut = miniature.run(words, {"at": "step", "n": 10, "do": "SIGTERM", "rank": 0})
    assert cut.code == PREEMPTED, cut.err
    named = [line for line in cut.err.splitlines() if "unreadable" in line]
    assert len(named) == 2 and named[0].startswith(f"pcpvt: warning: {bad[0]}: unreadable; sample "), cut.err
    assert named[1] == f"pcpvt: warning: {bad[1]}: unreadable; left out of the evaluation"
    ended = miniature.run(words)
    assert ended.code == 0, ended.err

    records = miniature.records(tmp_path / "run")
    counts = [record.get("replaced", 0) for record in records if record["kind"] == "train"]
    assert len(counts) == 12 and counts == sorted(counts) and counts[-1] == 3
    assert {record["unreadable"] for record in records if record["kind"] == "eval"} == {1}
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["replaced"], result["unreadable"]) == (3, 1)
    assert "unreadable 1" in ended.out.partition("final accuracy: ")[2]


def test_processes_add_up_replaced_images_at_records_only(tmp_path, monkeypatch):
    """A sum per step would wait for the others, and reading the samples' ids would wait for the device."""
    data = miniature.image_folder(tmp_path / "data")
    (data / "train" / "cat" / "3.png").write_bytes(b"no image")
    config = recipes.from_arg("cpu,folder", "pcpvt_nano", 0.1)
    config.update(steps=12, epochs=None, warmup_epochs=0.1, batch_size=8, image_size=32, log_every="6 steps")
    config.update(eval_every="0", save_every="0", precision="float32")
    config.data.update(path=str(data), on_error="skip", workers=0)
    config.augment.randaugment = ""
    summed: list[list[float]] = []
    monkeypatch.setattr(loop.collectives, "sum_numbers", lambda values: summed.append(values) or values)
    monkeypatch.setattr(loop, "stop_requested", lambda: False)
    monkeypatch.setattr(loop.signals, "finish_step_first", lambda *_: None)
    setup, state, history = prepare(sessions.start(config, tmp_path / "run"))
    summed.clear()
    saver = Saver(tmp_path, 1, print, before=[], saved=12, writes=False)
    _, history = loop.train(setup, state, history, [], saver)
    assert history.replaced == 3 and sum(n for (n,) in summed) == 3
    assert len(summed) == 5  # after steps 1, 2 (which are timed), 6 and 12, and at the end
