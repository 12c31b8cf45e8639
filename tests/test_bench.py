"""`--mode=bench`: what it measures and writes, in miniature. No test asserts a speed."""

import html
import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from absl import flags
from miniature import image_folder

from pcpvt import main
from pcpvt.bench import baseline, parts, scaling
from pcpvt.config import cli, fields, recipes, resolve, stored
from pcpvt.config.plan import make_plan
from pcpvt.errors import UserError
from pcpvt.runtime import session as sessions


@pytest.fixture
def miniature(nano, tmp_path):
    """With the mode and the workdir in spellings that no search for `--mode=` or `--workdir=` finds."""
    words = [word for word in nano if not word.startswith("--workdir")]
    words += ["--config.batch_size=4", "--config.bench.steps=1", "--config.image_size=32"]
    return ["-mode=bench", *words, "--workdir", str(tmp_path / "run")]


def check_loop(figures):
    assert figures["images_per_sec"] > 0
    assert 0 <= figures["waiting"] <= 1
    assert figures["workers"] == 1


def test_the_whole_loop_is_measured_on_the_configured_data(pcpvt, miniature, tmp_path):
    printed = pcpvt(*miniature, "--config.data.name=digits", "--config.data.workers=1").stdout
    check_loop(json.loads((tmp_path / "run" / "result-bench.json").read_text())["loop"])
    assert len(re.findall(r"^ours  loop .* images/s .* % of the time waiting for data", printed, re.MULTILINE)) == 1


def test_the_whole_loop_is_measured_on_synthetic_images(tmp_path):
    config = recipes.from_arg("cpu", "pcpvt_nano", 0.1)
    config.batch_size, config.bench.steps, config.data.name, config.data.workers = 4, 1, "synthetic", 1
    check_loop(parts.measure_loop(sessions.start(config, tmp_path)))


@pytest.fixture(scope="module")
def scaled(tmp_path_factory):
    """(result, printed lines, report) of a scaling bench in which a batch of 4 runs out of memory."""
    workdir = tmp_path_factory.mktemp("scaled")
    config = recipes.from_arg("cpu", "pcpvt_nano", 0.1)
    config.image_size, config.batch_size, config.bench.steps, config.bench.scaling = 32, 2, 1, True
    run_in_subprocess = scaling.run_in_subprocess

    def fail_at_4(measure, config):
        return run_in_subprocess(raise_memory_error if config.batch_size == 4 else measure, config)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scaling, "BATCHES", (1, 2, 4))
        patch.setattr(scaling, "SIZES", (224, 256))
        patch.setattr(scaling, "PROCESSES", (1, 2))
        patch.setattr(scaling, "run_in_subprocess", fail_at_4)
        printed = []
        patch.setattr(scaling.Console, "say", lambda self, text: printed.append(text))
        assert main.run(config, workdir, "bench") == 0
    return json.loads((workdir / "result-bench.json").read_text()), printed, (workdir / "bench.html").read_text()


def raise_memory_error(session):
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


def test_an_out_of_memory_point_is_recorded_and_the_bench_continues(scaled):
    result, printed, _ = scaled
    assert result["scaling"]["batch"][2] == {"batch": 4, "image_size": [32, 32], "out_of_memory": True}
    assert sum("out of memory" in line for line in printed) == 1


def test_scaling_prints_a_line_per_point_and_repeats_the_table_in_the_report(scaled):
    _, printed, page = scaled
    table = [line for line in printed if line.startswith("batch")]
    assert len(table) == 3 + 2 + 2
    assert all(html.escape(line) in page for line in table)


def test_scaling_report_draws_every_chart_and_loads_nothing_external(scaled):
    page = scaled[2]
    assert page.count("<svg") == 5
    assert "http" not in page
    assert "<polyline" in page
    (costs,) = re.findall(r'data-x="thousand pixels" data-series="([^"]*proportion[^"]*)"', page)
    names = [series["name"] for series in json.loads(html.unescape(costs))]
    assert names == ["training", "evaluation", "training, in proportion", "evaluation, in proportion"]


def test_proportional_costs_start_at_the_first_point():
    assert scaling.proportional([(100, 2.0), (200, 5.0), (400, 9.0)]) == [(100, 2.0), (200, 4.0), (400, 8.0)]


@pytest.mark.parametrize(
    "configured, expected",
    [(224, [224, 256, 320, 384, 448, 512]), (384, [224, 256, 320, 384, 448, 512]), (64, [64, 96, 128, 160, 192, 224])],
)
def test_image_sizes_start_at_a_small_configured_size(configured, expected):
    assert scaling.sizes(configured) == expected


def kill_this_process(session):
    import os
    import signal

    os.kill(os.getpid(), signal.SIGKILL)


def test_a_measurement_killed_by_the_kernel_counts_as_out_of_memory():
    with pytest.raises(parts.OutOfMemory):
        parts.run_in_subprocess(kill_this_process, fields.base())


def raise_user_error(session):
    raise UserError("config.x: 1: choose 2")


def test_a_user_error_of_a_measurement_is_raised_unchanged():
    with pytest.raises(UserError, match=r"^config\.x: 1: choose 2$"):
        parts.run_in_subprocess(raise_user_error, fields.base())


def test_scaling_with_a_peer_is_a_one_line_error():
    config = recipes.from_arg("cpu", "pcpvt_s", 0.1)
    config.bench.scaling, config.bench.against = True, "timm"
    with pytest.raises(UserError, match=r"^config\.bench\.against: 'timm': .*leave it empty$"):
        resolve.check(config)


@pytest.mark.parametrize(
    "message, lacks",
    [
        ("CUDA out of memory. Tried to allocate 20.00 GiB.", True),
        ("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to", True),
        ("CUDA error: an illegal memory access was encountered", False),
    ],
)
def test_only_allocation_errors_count_as_out_of_memory(message, lacks):
    assert parts.lacks_memory(message) == lacks


def point_with_training(program, monkeypatch):
    """The point of two processes, with this Python program in place of the training."""
    monkeypatch.setattr(parts, "train_command", lambda *_: [sys.executable, "-c", program])
    config = recipes.from_arg("cpu", "pcpvt_nano", 0.1)
    return scaling.measure_processes(sessions.start(config, Path()), 2)


def test_a_training_killed_by_the_kernel_counts_as_out_of_memory(monkeypatch):
    point = point_with_training("import os; os.kill(os.getpid(), 9)", monkeypatch)
    assert point == {"processes": 2, "batch": 128, "image_size": [32, 32], "out_of_memory": True}


def test_any_other_training_failure_ends_the_bench_with_its_message(monkeypatch):
    with pytest.raises(UserError, match=r"^--mode=bench: .*processes=2 failed: config\.x: 1: choose 2$"):
        point_with_training("raise SystemExit('pcpvt: error: config.x: 1: choose 2')", monkeypatch)


def test_a_training_of_the_bench_has_its_config_whatever_the_command_line_was(tmp_path):
    config = recipes.from_arg("cpu", "pcpvt_nano", 0.1)
    config.update_from_flattened_dict({"image_size": 64, "lr": 0.5, "checkpoint": "FILE", "restarts": 3})
    words = parts.train_command(sessions.start(config, tmp_path), tmp_path / "run", {"steps": 3, "processes": 2})
    assert words[1:3] == ["-m", "pcpvt.main"]
    command = cli.parse(words[2:], main.MODES, flags.FlagValues())
    found, _ = main.read_config(command)
    changed = {"epochs": None, "steps": 3, "processes": 2, "data.name": "synthetic", "num_classes": 1000}
    changed |= {"checkpoint": "", "restarts": 0, "eval_every": "0", "save_every": "0"}
    assert (command.mode, command.workdir) == ("train", tmp_path / "run")
    assert stored.flat(found) == {**stored.flat(config), **changed}


@pytest.mark.parametrize("mode", ["bench", "schedule"])
def test_a_bench_and_a_schedule_of_a_workdir_take_its_config_and_leave_its_files(mode, trained, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    words = [f"--mode={mode}", "--config=configs/pcpvt_s.py:cpu,perf", f"--workdir={workdir}"]
    command = cli.parse(["pcpvt", *words], main.MODES, flags.FlagValues())
    config, notes = main.read_config(command)
    assert (config.model.name, config.lr, config.epochs, config.precision) == ("pcpvt_nano", 3e-3, 3.0, "float32")
    assert notes == [f"the config is that of {workdir}/config.json: of ARG, 'perf' is not used; "
                     "give fields as --config.NAME=VALUE"]  # fmt: skip
    monkeypatch.setattr("pcpvt.bench.run.measure", lambda session: {"mode": "bench"})
    monkeypatch.setattr("pcpvt.bench.run.table", str)
    assert main.run(config, workdir, mode, notes, command) == 0
    after = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    new = {"bench": {"result-bench.json"}, "schedule": {"schedule.csv", "schedule.html"}}[mode]
    assert {path.name for path in after.keys() - before.keys()} == new
    assert before.items() <= after.items()


@pytest.mark.parametrize("against", ["timm", "timm-compiled"])
def test_the_peer_is_compiled_only_on_request(monkeypatch, tmp_path, against):
    config = recipes.from_arg("cpu", "pcpvt_s", 0.1)
    config.bench.against, config.image_size = against, 32
    compilations = []
    monkeypatch.setattr(torch, "compile", lambda network, **options: compilations.append(options) or network)
    image = torch.zeros(1, 32, 32, 3, dtype=torch.uint8)
    call = baseline.forward(sessions.start(config, tmp_path), 10, {"image": image}, against == "timm-compiled")
    assert call().shape == (1, 10)
    assert compilations == ([{"dynamic": False}] if against == "timm-compiled" else [])


def test_the_peer_reads_the_same_images_whatever_the_split_is_called(monkeypatch, tmp_path):
    from PIL import ImageOps

    monkeypatch.setattr(ImageOps, "posterize", ImageOps.posterize)  # the loader replaces it
    image_folder(tmp_path / "data", 2)
    (tmp_path / "data" / "val").rename(tmp_path / "data" / "valid")
    config = recipes.from_arg("cpu,folder", "pcpvt_nano", 0.1)
    config.data.path, config.image_size = str(tmp_path / "data"), 32
    session = sessions.start(config, tmp_path)
    source = sessions.open_data(session, "val")
    plan = make_plan(config, examples=4, num_classes=2, micro_batch=8)._replace(local_batch=4)
    _, labels = next(baseline.loader(session, plan, "val", source.root, 0))
    assert sorted(labels.tolist()) == [0, 0, 1, 1] and source.root == f"{tmp_path}/data/valid"


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("onnx", "onnxscript", "onnxruntime"))), reason="the extra `export`"
)
def test_a_graph_is_measured_beside_ours_in_evaluation_and_latency_only(tmp_path):
    config = recipes.from_arg("cpu", "pcpvt_nano", 0.1)
    given = {"image_size": 32, "batch_size": 4, "precision": "float32", "compile": "none", "num_classes": 10}
    config.update_from_flattened_dict({**given, "bench.against": "onnx", "bench.steps": 1, "data.name": "synthetic"})
    resolve.check(config)
    bench = parts.Bench(sessions.start(config, tmp_path))
    ours, theirs = (bench.step(side, "eval")() for side in ("ours", "onnx"))  # before the train steps
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert {part: list(bench.measure(part)) for part in parts.STEPS} == {
        "train": ["ours"], "eval": ["ours", "onnx"], "latency": ["ours", "onnx"],
    }  # fmt: skip
    assert bench.graphs["onnx"].precision.startswith("ONNX Runtime")


def test_peers_are_words_or_exported_files_by_comma(tmp_path):
    config = recipes.from_arg("cpu", "pcpvt_s", 0.1)
    for good in ("", "timm", "timm,timm-compiled", "onnx,openvino,runs/a.xml"):
        config.bench.against = good
        resolve.check(config)
        assert ",".join(parts.peers(config)) == good
    for bad, message in (("tim", "'tim' is not known: did you mean 'timm'"), ("onnx,onnx", "names one twice")):
        config.bench.against = bad
        with pytest.raises(UserError, match=rf"config\.bench\.against: .*{message}"):
            resolve.check(config)
