"""Output files of a run: strict JSON, and metrics on a full disk, after a crash and after a resume."""

from __future__ import annotations

import errno
import json
import os

import pytest

from pcpvt.runtime.records import MetricsFile, read_metrics, write_json


def test_results_are_strict_json(tmp_path):
    values = {"loss": float("nan"), "last": {"loss": float("inf"), "acc1": 1.5}, "rows": (1, [float("-inf")], None)}
    write_json(tmp_path / "result.json", values)

    def unknown(name):
        raise AssertionError(name)

    found = json.loads((tmp_path / "result.json").read_text(), parse_constant=unknown)
    assert found == {"loss": None, "last": {"loss": None, "acc1": 1.5}, "rows": [1, [None], None]}


def test_records_of_steps_to_be_repeated_and_an_incomplete_line_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    file = MetricsFile(path, 2)
    assert file.count == 2
    file.write({"step": 3, "loss": float("nan"), "x": float("inf")})
    file.close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3, "loss": null, "x": null}\n'
    assert [r["step"] for r in read_metrics(path)] == [1, 2, 3]


def test_records_wait_while_the_disk_is_full(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 0)
    file.write({"step": 1})
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda handle, data: write(handle, data[:5]))  # a part, then nothing
        assert file.write({"step": 2}).errno == errno.ENOSPC
        with pytest.raises(OSError):
            file.sync()
    assert path.read_text() == '{"step": 1}\n'
    assert file.write({"step": 3}) is None and file.count == 3
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]
    file.sync()
    file.close()


def test_symbolic_link_for_the_metrics_file_is_not_followed(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text('{"step": 1}\n')
    (tmp_path / "metrics.jsonl").symlink_to(outside)
    file = MetricsFile(tmp_path / "metrics.jsonl", 1)
    file.write({"step": 2})
    file.close()
    assert outside.read_text() == '{"step": 1}\n'
