"""Exported graphs (ONNX, OpenVINO, torch.export) are evaluated and predicted with as the model that they came from."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from absl import flags
from PIL import Image

from pcpvt import main
from pcpvt.checkpoints.load import describe, load_model, trained_config
from pcpvt.config import cli, recipes
from pcpvt.config.resolve import resolve
from pcpvt.data import sources
from pcpvt.errors import UserError
from pcpvt.export import graph, onnx, openvino, pt2
from pcpvt.export import run as export
from pcpvt.runners import exported as graphs
from pcpvt.runners.graph import Graph
from pcpvt.runners.runner import open_configured
from pcpvt.runtime import session as sessions

NEEDS = {".onnx": ("onnx", "onnxscript", "onnxruntime"), ".xml": ("openvino", "onnx", "onnxscript"), ".pt2": ()}


def needs(suffix: str):
    missing = [name for name in NEEDS[suffix] if importlib.util.find_spec(name) is None]
    return pytest.param(suffix, marks=pytest.mark.skipif(bool(missing), reason=f"no {missing}"))


SUFFIXES = [needs(suffix) for suffix in NEEDS]


def session(workdir, **fields) -> sessions.Session:
    """A session of an evaluation, with the recipe of the digits."""
    config = recipes.from_arg("cpu,digits", "pcpvt_nano", 0.0)
    config.update_from_flattened_dict({"precision": "float32", **fields})
    return sessions.start(config, workdir)


@pytest.fixture(scope="module")
def written(trained, tmp_path_factory):
    """The miniature run in every format for which the packages are there, by suffix, as `--mode=export` writes it."""
    folder = tmp_path_factory.mktemp("graphs")
    stored, _ = trained_config("", [], trained)
    config, _ = resolve(lambda arg: recipes.from_arg(arg, "pcpvt_s", 0.2), "cpu", {}, mode="export", trained=stored)
    here = sessions.start(config, folder)
    loaded = load_model(trained)
    said = json.dumps(export.describe(here, loaded))
    program, _ = graph.capture(loaded.model, loaded.params, here.size, dynamic_size=False)
    files = {suffix: folder / f"nano{suffix}" for suffix in NEEDS}
    pt2.write_pt2(program, files[".pt2"], said)
    if all(map(importlib.util.find_spec, NEEDS[".onnx"])):
        onnx.write_onnx(program, files[".onnx"], said)
        if importlib.util.find_spec("openvino"):
            openvino.convert(files[".onnx"], files[".xml"], said)
    return files


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_graph_is_evaluated_as_the_checkpoint(pcpvt, trained, written, tmp_path, suffix):
    """Without a word about model, size, crop and classes, which the file itself knows."""
    words = ["--mode=eval", "--config=configs/pcpvt_s.py:cpu,digits", f"--config.checkpoint={written[suffix]}"]
    done = pcpvt(*words, "--config.precision=float32", "--config.eval.batch_size=60", f"--workdir={tmp_path}")
    found = json.loads((tmp_path / "result-eval.json").read_text())
    wanted = json.loads((trained / "result.json").read_text())
    assert (found["acc1"], found["acc5"], found["seen"]) == (wanted["acc1"], wanted["acc5"], 364)
    assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
    assert (found["image_size"], found["crop"], found["checkpoint"]) == ([32, 32], 1.0, str(written[suffix]))
    assert found["n_parameters"] == wanted["n_parameters"] and list(found["recall"]) == [str(i) for i in range(10)]
    runtime = {".onnx": "ONNX Runtime", ".xml": "OpenVINO", ".pt2": "torch.export"}[suffix]
    assert found["precision"].startswith(runtime) and f"crop 1, {runtime}" in done.stdout


@pytest.mark.slow  # one process and the other formats: test_a_graph_is_evaluated_as_the_checkpoint
@pytest.mark.parametrize("suffix", SUFFIXES[:1])
def test_several_processes_count_exactly(pcpvt, trained, written, tmp_path, suffix):
    words = ["--mode=eval", "--config=configs/pcpvt_s.py:cpu2,digits", f"--config.checkpoint={written[suffix]}"]
    pcpvt(*words, "--config.precision=float32", f"--workdir={tmp_path}")
    found = json.loads((tmp_path / "result-eval.json").read_text())
    wanted = json.loads((trained / "result.json").read_text())
    assert (found["acc1"], found["seen"]) == (wanted["acc1"], 364)


def test_a_graph_predicts_as_the_checkpoint(pcpvt, trained, written, tmp_path):
    Image.fromarray(sources.digits("val", (32, 32)).images[0]).resize((80, 60)).save(tmp_path / "a.png")
    words = ["--mode=predict", "--config=configs/pcpvt_s.py:cpu", "--config.precision=float32"]
    words += [f"--config.predict.images={tmp_path / 'a.png'}", "--config.predict.format=jsonl"]
    rows = []
    for weights in (trained, written[".pt2"]):
        out = pcpvt(*words, f"--config.checkpoint={weights}", f"--workdir={tmp_path / 'run'}").stdout
        rows.append(json.loads(out)["predictions"])
    for ours, theirs in zip(*rows, strict=True):
        assert (ours["class"], ours["index"]) == (theirs["class"], theirs["index"])
        assert ours["probability"] == pytest.approx(theirs["probability"], abs=2e-6)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_does_not_fit_a_graph_is_one_line(written, tmp_path, suffix):
    path = str(written[suffix])
    said = graphs.describe(path)
    assert (said.model, said.size, said.crop, said.channels) == ("pcpvt_nano", (32, 32), 1.0, 3)
    for fields, message in (
        ({"image_size": 48}, f"config.image_size: 48x48 px and {path} takes 32x32 only: leave it out"),
        ({"num_classes": 7}, f"config.num_classes: 7 and {path} has 10 classes: leave it unset"),
        ({"model.in_chans": 1}, f"config.model.in_chans: 1 and {path} takes images of 3 channels: leave it unset"),
    ):
        with pytest.raises(UserError) as caught:
            open_configured(session(tmp_path, checkpoint=path, **fields))
        assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_other_uses_of_a_graph_name_the_checkpoint(pcpvt, written, tmp_path):
    path = written[".pt2"]
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    words = [f"--config.checkpoint={path}", f"--workdir={tmp_path / 'run'}", "--config=configs/pcpvt_s.py:cpu,folder"]
    explain = [f"--config.predict.images={tmp_path / 'a.png'}", "--config.predict.explain=true"]
    for more in (["--mode=export"], ["--mode=predict", *explain]):
        done = pcpvt(*words, *more, check=False)
        assert done.returncode == 2 and "give the checkpoint that it was exported from" in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
    with pytest.raises(UserError, match="an exported graph"):
        describe(str(path))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_damaged_file_a_missing_one_and_a_missing_package_are_one_line(tmp_path, suffix, monkeypatch):
    path = tmp_path / f"a{suffix}"
    with pytest.raises(UserError, match=r"a\..* cannot be read \(No such file or directory\): give a file"):
        graphs.read(path)
    path.write_bytes(b"\x08\x07 no graph at all" * 9)
    if suffix == ".xml":
        with pytest.raises(UserError, match=r"a\.xml: lacks its weights, a\.bin beside it: export the model again"):
            graphs.read(path)
        path.with_suffix(".bin").touch()
    with pytest.raises(UserError, match=r"cannot be read as .*: export it again|export the model again") as caught:
        graphs.read(path)
    assert "\n" not in str(caught.value)
    if NEEDS[suffix]:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        extra = {".onnx": "export", ".xml": "openvino"}[suffix]
        with pytest.raises(UserError, match=rf"needs the package .*: pip install 'pcpvt\[{extra}\]'"):
            graphs.read(path)


def test_a_graph_for_one_batch_size_takes_any():
    sizes = []

    def network(images):
        sizes.append(len(images))
        return images.sum((1, 2, 3))[:, None]

    fixed = Graph("", (4, 3, 2, 2), 1, lambda precision: (network, "a stand-in"))
    run, _ = graphs.start("a.onnx", fixed, torch.float32)
    images = torch.arange(10 * 12, dtype=torch.float32).reshape(10, 3, 2, 2)
    torch.testing.assert_close(run(images), images.sum((1, 2, 3))[:, None], rtol=0, atol=0)
    assert sizes == [4, 4, 4]


@SUFFIXES[0].marks[0]
def test_a_foreign_graph_gives_its_size_and_what_is_no_classifier_is_one_line(tmp_path):
    from onnx import TensorProto, helper, save

    def file(shape, outputs):
        values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", shape), ("y", outputs))]
        node = helper.make_node("Identity", ["x"], ["y"])
        made = helper.make_model(helper.make_graph([node], "g", [values[0]], [values[1]]))
        save(made, tmp_path / "a.onnx")
        return tmp_path / "a.onnx"

    said = graphs.describe(file(["b", 3, 40, 56], ["b", 5]))
    assert (said.size, said.channels, said.classes, said.model) == ((40, 56), 3, None, "")
    with pytest.raises(UserError, match=r"maps \[\?, 3\] to \[\?, 3\], not \[batch, channels, h, w\] to"):
        graphs.describe(file(["b", 3], ["b", 3]))


@SUFFIXES[0].marks[0]
def test_a_graph_that_cannot_run_on_the_images_is_one_line(tmp_path):
    from onnx import TensorProto, helper, save

    kind = TensorProto.FLOAT16
    values = [helper.make_tensor_value_info(n, kind, s) for n, s in (("x", ["b", 1, 1, 5]), ("y", ["b", 5]))]
    made = helper.make_graph([helper.make_node("Flatten", ["x"], ["y"])], "g", [values[0]], [values[1]])
    path = tmp_path / "a.onnx"
    save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    run, _ = graphs.start(path, graphs.read(path), torch.float32)
    with pytest.raises(UserError, match=r"a\.onnx: ONNX cannot run it \(InvalidArgument: .*float16") as caught:
        run(torch.zeros(2, 1, 1, 5))
    assert "\n" not in str(caught.value)


def test_the_mode_eval_reads_the_description_of_a_graph(written, tmp_path):
    words = ["pcpvt", "--mode=eval", "--config=configs/pcpvt_s.py:cpu,digits", f"--config.checkpoint={written['.pt2']}"]
    command = cli.parse([*words, f"--workdir={tmp_path}", "--config.image_size=48"], main.MODES, flags.FlagValues())
    config, notes = main.read_config(command)
    assert (config.model.name, config.image_size, config.eval.crop) == ("pcpvt_nano", 48, 1.0)
    assert any("config.image_size: 48 is given" in note and "says 32" in note for note in notes)
