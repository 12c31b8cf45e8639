"""--mode=bench: what it measures and writes, in miniature; how fast anything is, is never asserted."""

import html
import json
import re
import sys
from pathlib import Path

import pytest
import torch

from pcpvt import main
from pcpvt.bench import baseline as bench_peer
from pcpvt.bench import loop as bench_loop
from pcpvt.bench import scaling as bench_scaling
from pcpvt.bench import subprocess as bench_process
from pcpvt.config import fields, recipes, resolve
from pcpvt.errors import UserError
from pcpvt.runtime import session as sessions


@pytest.fixture
def miniature(nano):
    return ["--mode=bench", *nano, "--config.batch_size=4", "--config.bench.steps=1", "--config.image_size=32"]


def check_loop(loop):
    assert loop["images_per_sec"] > 0
    assert 0 <= loop["waiting"] <= 1
    assert loop["workers"] == 1


def test_the_whole_loop_is_measured_on_the_configured_data(pcpvt, miniature, tmp_path):
    said = pcpvt(*miniature, "--config.data.name=digits", "--config.data.workers=1").stdout
    check_loop(json.loads((tmp_path / "run" / "result.json").read_text())["loop"])
    assert len(re.findall(r"^ours  loop .* images/s .* % of the time waiting for data", said, re.MULTILINE)) == 1


def test_the_whole_loop_is_measured_on_noise(tmp_path):
    config = recipes.from_arg("cpu", "pcpvt_nano", 0.1)
    config.batch_size, config.bench.steps, config.data.name, config.data.workers = 4, 1, "synthetic", 1
    check_loop(bench_loop.measure(sessions.start(config, tmp_path)))


@pytest.fixture(scope="module")
def scaled(tmp_path_factory):
    """(the result, what was said, the report) of a scaling bench in which a batch of 4 finds no memory."""
    workdir = tmp_path_factory.mktemp("scaled")
    config = recipes.from_arg("cpu", "pcpvt_nano", 0.1)
    config.image_size, config.batch_size, config.bench.steps, config.bench.scaling = 32, 2, 1, True
    words = ["pcpvt", "--config=configs/pcpvt_s.py:cpu", "--config.model.name=pcpvt_nano", "--config.batch_size=2"]
    alone = bench_scaling.run_in_subprocess

    def tight(measure, config):
        if config.batch_size == 4:
            measure = exhausted
        return alone(measure, config)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", words)
        patch.setattr(bench_scaling, "BATCHES", (1, 2, 4))
        patch.setattr(bench_scaling, "SIZES", (224, 256))
        patch.setattr(bench_scaling, "PROCESSES", (1, 2))
        patch.setattr(bench_scaling, "run_in_subprocess", tight)
        said = []
        patch.setattr(bench_scaling.Console, "say", lambda self, text: said.append(text))
        assert main.run(config, workdir, "bench") == 0
    return json.loads((workdir / "result.json").read_text()), said, (workdir / "report.html").read_text()


def exhausted(session):
    raise MemoryError


def test_scaling_has_a_point_for_every_batch_size_and_process_count(scaled):
    scaling = scaled[0]["scaling"]
    assert [p["batch"] for p in scaling["batch"]] == [1, 2, 4]
    assert [p["image_size"] for p in scaling["size"]] == [[32, 32], [64, 64]]
    assert [(p["processes"], p["batch"]) for p in scaling["processes"]] == [(1, 2), (2, 4)]
    for point in scaling["batch"][:2] + scaling["size"]:
        assert point["peak_memory_bytes"] > 0
        assert all(point[part][figure] > 0 for part in ("train", "eval") for figure in ("images_per_sec", "ms"))
    assert all(point["train"]["images_per_sec"] > 0 for point in scaling["processes"])


def test_a_point_without_memory_is_recorded_and_the_bench_goes_on(scaled):
    result, said, _ = scaled
    assert result["scaling"]["batch"][2] == {"batch": 4, "image_size": [32, 32], "out_of_memory": True}
    assert sum("out of memory" in line for line in said) == 1


def test_scalings_table_has_a_line_for_every_point_and_is_in_the_report(scaled):
    _, said, page = scaled
    table = [line for line in said if line.startswith("batch")]
    assert len(table) == 3 + 2 + 2
    assert all(html.escape(line) in page for line in table)


def test_scalings_report_draws_every_figure_and_needs_nothing_from_elsewhere(scaled):
    page = scaled[2]
    assert page.count("<svg") == 5
    assert "http" not in page
    assert "<polyline" in page
    (costs,) = re.findall(r'data-x="thousand pixels" data-series="([^"]*proportion[^"]*)"', page)
    names = [series["name"] for series in json.loads(html.unescape(costs))]
    assert names == ["training", "evaluation", "training, in proportion", "evaluation, in proportion"]


def test_costs_in_proportion_to_pixels_go_through_the_first_point():
    assert bench_scaling.line([(100, 2.0), (200, 5.0), (400, 9.0)]) == [(100, 2.0), (200, 4.0), (400, 8.0)]


@pytest.mark.parametrize(
    "configured, wanted",
    [(224, [224, 256, 320, 384, 448, 512]), (384, [224, 256, 320, 384, 448, 512]), (64, [64, 96, 128, 160, 192, 224])],
)
def test_sizes_begin_at_the_configured_one_where_it_is_small(configured, wanted):
    assert bench_scaling.sizes(configured) == wanted


def killed(session):
    import os
    import signal

    os.kill(os.getpid(), signal.SIGKILL)


def test_a_measurement_that_the_kernel_kills_has_run_out_of_memory():
    with pytest.raises(bench_process.OutOfMemory):
        bench_process.run_in_subprocess(killed, fields.base())


def faulty(session):
    raise UserError("config.x: 1: choose 2")


def test_a_users_error_of_a_measurement_is_told_as_it_is():
    with pytest.raises(UserError, match=r"^config\.x: 1: choose 2$"):
        bench_process.run_in_subprocess(faulty, fields.base())


def test_scaling_beside_a_peer_is_refused_in_one_line():
    config = recipes.from_arg("cpu", "pcpvt_s", 0.1)
    config.bench.scaling, config.bench.against = True, "timm"
    with pytest.raises(UserError, match=r"^config\.bench\.against: 'timm': .*leave it empty$"):
        resolve.check(config)


@pytest.mark.parametrize(
    "said, lacks",
    [
        ("CUDA out of memory. Tried to allocate 20.00 GiB.", True),
        ("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to", True),
        ("CUDA error: an illegal memory access was encountered", False),
    ],
)
def test_only_an_allocators_error_counts_as_too_little_memory(said, lacks):
    assert bench_process.lacks_memory(said) == lacks


def short_of(program, monkeypatch):
    """The point of two processes whose training is this Python program."""
    monkeypatch.setattr(bench_scaling, "training", lambda *_: [sys.executable, "-c", program])
    config = recipes.from_arg("cpu", "pcpvt_nano", 0.1)
    return bench_scaling.together(sessions.start(config, Path()), 2)


def test_processes_that_the_kernel_kills_have_run_out_of_memory(monkeypatch):
    point = short_of("import os; os.kill(os.getpid(), 9)", monkeypatch)
    assert point == {"processes": 2, "batch": 128, "image_size": [32, 32], "out_of_memory": True}


def test_a_training_that_fails_otherwise_ends_the_bench_with_its_line(monkeypatch):
    with pytest.raises(UserError, match=r"^--mode=bench: .*processes=2 failed: config\.x: 1: choose 2$"):
        short_of("raise SystemExit('pcpvt: error: config.x: 1: choose 2')", monkeypatch)


@pytest.mark.parametrize("against", ["timm", "timm-compiled"])
def test_the_peer_is_compiled_when_that_is_asked_for(monkeypatch, tmp_path, against):
    config = recipes.from_arg("cpu", "pcpvt_s", 0.1)
    config.bench.against, config.image_size = against, 32
    seen = []
    monkeypatch.setattr(torch, "compile", lambda network, **options: seen.append(options) or network)
    image = torch.zeros(1, 32, 32, 3, dtype=torch.uint8)
    call = bench_peer.forward(sessions.start(config, tmp_path), 10, {"image": image})
    assert call().shape == (1, 10)
    assert seen == ([{"dynamic": False}] if against == "timm-compiled" else [])
