"""int8: what is quantised, that it is evaluated, and that a file which loses too much is refused."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from pathlib import Path

import miniature
import numpy as np
import pytest
import warm

from pcpvt.checkpoints.load import load_model, trained_config
from pcpvt.config import recipes
from pcpvt.config.resolve import resolve
from pcpvt.errors import UserError
from pcpvt.evaluate.evaluator import Evaluation
from pcpvt.export import formats, int8
from pcpvt.export import run as export
from pcpvt.runners import exported
from pcpvt.runtime import session as sessions

needs_openvino = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("onnx", "onnxscript", "onnxruntime", "openvino"))), reason="extra `openvino`"
)


def session(trained, workdir, **fields) -> sessions.Session:
    """A session that exports the best checkpoint of the miniature run."""
    stored, _ = trained_config("", [], trained)
    fields = {f"export.{name}": value for name, value in fields.items()} | {"checkpoint": str(trained)}
    given = {"export.format": "openvino", "export.quantize": "int8", "precision": "float32", **fields}
    config, _ = resolve(lambda arg: recipes.from_arg(arg, "pcpvt_s", 0.2), "cpu", given, mode="export", trained=stored)
    return sessions.start(config, workdir)


def export_and_keep(trained: Path, workdir: Path) -> None:
    """Exports to OpenVINO in int8, and keeps the ONNX files before and after."""
    real = int8.quantise

    def quantise_and_keep(request, path):
        shutil.copy(path, workdir / "float.onnx")
        real(request, path)
        shutil.copy(path, workdir / "int8.onnx")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(int8, "quantise", quantise_and_keep)
        assert export.run(session(trained, workdir)) == 0


@pytest.fixture(scope="module")
def quantised(trained, tmp_path_factory):
    """The workdir of an export to OpenVINO in int8, with `float.onnx` and `int8.onnx`, and the request that made it.

    In a process of its own: after int8 products in this one (on a processor with AMX, in a virtual machine) the kernel
    ended it with SIGSEGV in a later wait for a child.
    """
    workdir = tmp_path_factory.mktemp("int8")
    code = "import sys; from pathlib import Path; from test_int8 import export_and_keep; "
    code += f"export_and_keep(Path({str(trained)!r}), Path({str(workdir)!r}))"
    env = os.environ | {"PYTHONPATH": f"{Path(__file__).parent}:{miniature.ROOT}"}
    done = warm.run(["-c", code], env, miniature.ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    here, loaded = session(trained, workdir), load_model(trained)
    return workdir, formats.Request(here, workdir / "x", loaded, loaded.params, export.describe(here, loaded))


@needs_openvino
def test_the_digits_stay_within_the_allowed_drop_and_both_figures_are_kept(quantised, trained):
    workdir, _ = quantised
    result = json.loads((workdir / "result-export.json").read_text())
    assert result["quantize"] == "int8" and result["evaluated"]["images"] == 364
    trained_top1 = json.loads((trained / "result.json").read_text())["acc1"]
    assert result["evaluated"]["acc1"] == trained_top1
    assert result["evaluated"]["acc1_quantized"] >= trained_top1 - 0.5
    assert sorted(path.name for path in (workdir / "export").iterdir()) == ["pcpvt_nano.bin", "pcpvt_nano.xml"]
    said = exported.facts(exported.read(workdir / "export" / "pcpvt_nano.xml"))
    assert said["quantize"] == "int8" and said["labels"] == [str(i) for i in range(10)]


@needs_openvino
def test_products_with_weights_are_int8_except_the_first_layer_and_the_head(quantised):
    import onnx

    workdir, _ = quantised
    before, after = (onnx.load(workdir / f"{name}.onnx") for name in ("float", "int8"))
    assert after.metadata_props[0].value == before.metadata_props[0].value
    weights = {tensor.name: tensor for tensor in after.graph.initializer}
    makers = {name: node for node in after.graph.node for name in node.output}

    def stored(name):
        maker = makers.get(name)
        return weights.get(maker.input[0] if maker and maker.op_type == "DequantizeLinear" else name)

    products = [node for node in after.graph.node if node.op_type == "MatMul" and stored(node.input[1])]
    kinds = [stored(node.input[1]).data_type for node in products]
    assert kinds[0] == onnx.TensorProto.FLOAT
    assert len(kinds) > 20 and set(kinds[1:]) == {onnx.TensorProto.INT8}
    scales = [len(weights[makers[node.input[1]].input[1]].dims) for node in products[1:]]
    assert set(scales) == {1}, "a scale per output channel"
    largest = max(np.abs(onnx.numpy_helper.to_array(stored(node.input[1])).astype(int)).max() for node in products[1:])
    assert 2 * 255 * largest < 2**15, "a pair of products overflows 16 bits on processors without VNNI"
    (head,) = (node for node in after.graph.node if node.op_type == "Gemm")
    assert stored(head.input[1]).data_type == onnx.TensorProto.FLOAT


@needs_openvino
def test_calibration_images_are_training_images_that_the_seed_determines(quantised):
    _, request = quantised
    first = np.concatenate(list(int8.calibration(request)))
    assert first.shape == (64, 3, 32, 32) and first.dtype == np.float32
    assert np.array_equal(first, np.concatenate(list(int8.calibration(request))))
    config = request.session.config.copy_and_resolve_references()
    with config.unlocked():
        config.seed, config.export.calibration = 1, 20
    other = np.concatenate(list(int8.calibration(request._replace(session=request.session._replace(config=config)))))
    assert other.shape[0] == 20 and not np.array_equal(other, first[:20])


def top1(percent: float) -> Evaluation:
    return Evaluation({"acc1": percent, "seen": 364}, [], [], [], None)


@pytest.mark.parametrize(("after", "refused"), [(89.5, False), (89.4, True), (float("nan"), True), (91.0, False)])
def test_a_file_that_loses_more_than_is_allowed_is_not_kept(trained, tmp_path, monkeypatch, after, refused):
    def write(request, path):
        path.write_text("a graph")
        return formats.Written([], [])

    results = iter([top1(90.0), top1(after)])
    monkeypatch.setitem(export.FORMATS, "openvino", formats.Format(".xml", write, True, quantize=True))
    monkeypatch.setattr(int8, "evaluate_one", lambda *args: next(results))
    monkeypatch.setattr(int8, "open_graph", lambda session, path: int8.of_weights(session, load_model(trained)))
    here = session(trained, tmp_path)
    if not refused:
        assert export.run(here) == 0
        return
    with pytest.raises(UserError, match=rf"top-1 is 90.000 % before and {after:.3f} % after, .*max_drop=0.5") as caught:
        export.run(here)
    assert "\n" not in str(caught.value) and list((tmp_path / "export").iterdir()) == []


@pytest.mark.parametrize("form", ["timm", "pt2"])
def test_other_formats_and_a_missing_package_are_refused_before_any_work(trained, tmp_path, monkeypatch, form):
    with pytest.raises(UserError, match=f"config.export.quantize: {form} files stay in float32: .* onnx or openvino"):
        export.run(session(trained, tmp_path, format=form))
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "openvino" else real(name))
    with pytest.raises(UserError, match=r"openvino needs the package openvino: pip install 'pcpvt\[openvino\]'"):
        export.run(session(trained, tmp_path))
