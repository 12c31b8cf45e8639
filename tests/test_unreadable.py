"""With `on_error=skip` an unreadable image is named once and counted, in training and in evaluation."""

from __future__ import annotations

import json

import miniature

from pcpvt.distributed.signals import PREEMPTED


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
