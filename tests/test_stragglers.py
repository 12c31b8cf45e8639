"""A process that the others wait for is named in the records, warned of, and drawn in the report."""

from __future__ import annotations

import json
import shutil

import miniature
import pytest
from test_report import read

from pcpvt.report import run as report
from pcpvt.runtime import records
from pcpvt.train.stragglers import LASTING, SLOW, Times, Watch

CONSTANT = {"at": "constant", "module": "pcpvt.train.stragglers", "name": "LASTING", "value": 1.0}


@pytest.fixture(scope="module")
def slowed(tmp_path_factory):
    """A run of three processes, the last of which takes 0.3 s more for each step; with its output."""
    workdir = tmp_path_factory.mktemp("slowed")
    slow = {"at": "inside step", "n": 1, "again": True, "do": "sleep:0.3", "rank": 2}
    words = miniature.words(workdir, "cpu3", steps=9, eval_every="0", save_every="0")
    return workdir, miniature.run(words, slow, CONSTANT)


def test_a_slow_process_is_in_every_record_and_is_warned_of_once(slowed):
    workdir, ended = slowed
    assert ended.code == 0, ended.err
    entries = records.read_metrics(workdir / "metrics.jsonl")
    assert len(entries) == 3
    for entry in entries[1:]:  # the first one holds the start
        assert entry["slowest_rank"] == 2 and entry["slowness"] > SLOW, entries
        shares = [entry[f"slowest_{name}"] for name in ("computing", "reading", "waiting")]
        assert sum(shares) == pytest.approx(1, abs=1e-3) and shares[0] > 0.5
    assert ended.err.count("rank 2 (") == 1 and "has been slower than the median" in ended.err, ended.err


@pytest.mark.slow
@pytest.mark.parametrize(("place", "share"), [("before the sum", "computing"), ("reading", "reading")])
def test_a_process_that_is_slow_before_the_sum_or_reads_slowly_is_named(place, share, tmp_path):
    slow = {"at": place, "n": 1, "again": True, "do": "sleep:0.3", "rank": 1}
    ended = miniature.run(miniature.words(tmp_path, "cpu2", steps=9, eval_every="0", save_every="0"), slow)
    assert ended.code == 0, ended.err
    for entry in records.read_metrics(tmp_path / "metrics.jsonl")[1:]:
        assert entry["slowest_rank"] == 1 and entry["slowness"] > SLOW and entry[f"slowest_{share}"] > 0.5, entry


def test_the_report_shows_the_times_by_rank(slowed, tmp_path):
    workdir = shutil.copytree(slowed[0], tmp_path / "run")
    ranks = json.loads((workdir / records.RANKS).read_text())["ranks"]
    assert [entry["rank"] for entry in ranks] == [0, 1, 2]
    report.write(workdir)
    page = read(workdir / "report.html")
    assert any("Share of time by rank" in text for text in page.texts)
    drawn = {curve["name"]: curve["points"] for curves in page.charts.values() for curve in curves}
    assert len(drawn["computing"]) == len(drawn["reading"]) == len(drawn["waiting for others"]) == 3
    assert float(drawn["computing"][2][3]) > float(drawn["computing"][0][3])
    (workdir / records.RANKS).write_text('{"ranks": [{"rank": 0}, 7]}')
    report.write(workdir)
    assert not any("Share of time by rank" in text for text in read(workdir / "report.html").texts)


def test_one_process_has_no_slowest(tmp_path):
    assert miniature.run(miniature.words(tmp_path, steps=2, eval_every="0", log_every="1 step")).code == 0
    assert not any("slowest_rank" in entry for entry in records.read_metrics(tmp_path / "metrics.jsonl"))
    assert not (tmp_path / records.RANKS).exists()


def test_slow_input_counts_as_the_processes_own_time_and_a_short_while_is_no_warning():
    watch, usual, slow = Watch(["a", "a", "b"]), Times(1.0, 0.0, 9.0), Times(1.0, 8.0, 1.0)
    for _ in range(int(LASTING / 10) - 1):
        entry, warnings = watch.add([usual, usual, slow])
        assert not warnings
    assert entry == {
        "slowest_rank": 2, "slowest_computing": 0.1, "slowest_reading": 0.8, "slowest_waiting": 0.1, "slowness": 9.0,
    }  # fmt: skip
    watch.add([usual, usual, usual])  # the time counts anew
    said = [text for _ in range(int(LASTING / 10) + 5) for text in watch.add([usual, slow, usual])[1]]
    assert len(said) == 1 and said[0].startswith("rank 1 (a) ") and "9.00 times" in said[0] and "reading 80%" in said[0]
    assert watch.by_rank()["ranks"][2]["host"] == "b"


def test_of_two_processes_the_slower_one_is_compared_with_the_faster():
    entry, _ = Watch(["a", "b"]).add([Times(4.0, 0.0, 0.0), Times(1.0, 0.0, 3.0)])
    assert entry["slowest_rank"] == 0 and entry["slowness"] == 4.0
