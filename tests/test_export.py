"""Exported files (timm, ONNX, pt2) compute what the model computes, at any batch and size, and are never partial."""

from __future__ import annotations

import functools
import importlib.util
import json
import zipfile
from pathlib import Path

import miniature
import pytest
import torch

from pcpvt import torchvision_compat  # noqa: F401
from pcpvt.checkpoints import checkpoint
from pcpvt.checkpoints.load import load_model
from pcpvt.config import fields, recipes
from pcpvt.errors import UserError
from pcpvt.export import formats, graph, onnx, pt2
from pcpvt.export import run as export
from pcpvt.models import pcpvt as models
from pcpvt.models.init import init
from pcpvt.models.layers import PatchLinear
from pcpvt.runtime import session as sessions

CLASSES = ["cat", "dog", "eel"]
needs_onnx = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("onnx", "onnxscript", "onnxruntime"))), reason="the extra `export`"
)


def params(name: str = "pcpvt_nano", classes: int = 3) -> models.Params:
    """Initial parameters, with biases and norms moved off 0 and 1, so that each of them has an effect."""
    source = torch.Generator().manual_seed(0)
    initial = init(models.build(name, classes), 0)
    return {n: v + 0.1 * torch.randn(v.shape, generator=source) * (v.ndim == 1) for n, v in initial.items()}


def expected(weights: models.Params, images: torch.Tensor, name: str = "pcpvt_nano") -> torch.Tensor:
    with torch.no_grad():
        return models.apply(models.build(name, len(weights["head.bias"])), weights, images.permute(0, 2, 3, 1))


def assert_close(logits, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(torch.as_tensor(logits), wanted, rtol=1e-5, atol=1e-5)


def session(workdir, **fields) -> sessions.Session:
    """A session that exports the file weights.pth."""
    config = recipes.from_arg("cpu,folder", "pcpvt_nano", 0.0)
    config.update_from_flattened_dict({"image_size": 64, "checkpoint": str(workdir / "weights.pth"), **fields})
    if not (workdir / "weights.pth").exists():
        torch.save(params(config.model.name), workdir / "weights.pth")
    return sessions.start(config, workdir)


@pytest.mark.parametrize("size", [(4, 4), (5, 7), (33, 64), (2, 3), (1, 9)])
def test_branch_free_patches_are_bitwise_equal(size):
    source = torch.Generator().manual_seed(0)
    for patch in (2, 4, 8):
        branching, branch_free = PatchLinear(3, 5, patch), graph.AnySize(3, 5, patch)
        for leaf in branching.parameters():
            leaf.data = torch.randn(leaf.shape, generator=source)
        branch_free.load_state_dict(branching.state_dict())
        x = torch.randn(2, *size, 3, generator=source)
        assert torch.equal(branching(x), branch_free(x))


@pytest.fixture(scope="module")
def captured():
    return graph.capture(models.build("pcpvt_nano", 3), params(), (48, 48), dynamic_size=True)


def compare(captured, write, path):
    """Writes the captured model with the description "about it", and compares the file with the model."""
    program, sizes = captured
    return formats.compare(models.build("pcpvt_nano", 3), params(), sizes, write(program, path, "about it"), "file")


@needs_onnx
def test_onnx_takes_any_batch_and_size_and_carries_its_description(captured, tmp_path):
    import onnx as package
    import onnxruntime

    cases = compare(captured, onnx.write_onnx, tmp_path / "a.onnx")
    assert [(case["batch"], *case["size"]) for case in cases] == [(1, 48, 48), (3, 48, 48), (1, 61, 86), (3, 61, 86)]
    assert all(case["difference"] < 1e-5 for case in cases)
    run = onnxruntime.InferenceSession(str(tmp_path / "a.onnx"), providers=["CPUExecutionProvider"])
    for shape in ((2, 3, 64, 96), (5, 3, 33, 47), (1, 3, 100, 35)):
        images = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        assert_close(run.run(None, {"images": images.numpy()})[0], expected(params(), images))
    model = package.load(tmp_path / "a.onnx")
    assert [entry.version for entry in model.opset_import if not entry.domain] == [18]
    assert {node.domain for node in model.graph.node} == {""}, "operators that are not standard ONNX"
    assert run.get_modelmeta().custom_metadata_map["description"] == "about it"


def test_pt2_takes_any_batch_and_size_and_carries_its_description(captured, tmp_path):
    cases = compare(captured, pt2.write_pt2, tmp_path / "a.pt2")  # loads it again, which takes seconds
    assert len(cases) == 4 and all(case["difference"] < 1e-5 for case in cases)
    with zipfile.ZipFile(tmp_path / "a.pt2") as archive:
        name = next(name for name in archive.namelist() if name.endswith(pt2.DESCRIPTION))
        assert archive.read(name) == b"about it"


@pytest.mark.slow  # any size: test_pt2_takes_any_batch_and_size_and_carries_its_description
def test_pt2_of_a_fixed_size_takes_any_batch_and_only_that_size(tmp_path):
    fixed = graph.capture(models.build("pcpvt_nano", 3), params(), (40, 72), dynamic_size=False)
    assert len(compare(fixed, pt2.write_pt2, tmp_path / "a.pt2")) == 2
    loaded = torch.export.load(tmp_path / "a.pt2").module()
    images = torch.randn((5, 3, 40, 72), generator=torch.Generator().manual_seed(1))
    assert_close(loaded(images), expected(params(), images))
    with pytest.raises((AssertionError, RuntimeError)):
        loaded(images[..., :64])


def test_the_atc_command_names_the_channels_of_the_images():
    assert '--input_shape="images:4,1,40,64"' in onnx.atc(Path("a.onnx"), (40, 64), 1, 4)


@needs_onnx
def test_a_checkpoint_trained_on_npus_is_exported_and_the_atc_command_printed(pcpvt, tmp_path):
    import onnxruntime

    flat = {name: None if field.unset else field.default for name, field in fields.FIELDS.items()}
    flat |= {"model.name": "pcpvt_nano", "image_size": 40, "epochs": 1.0, "warmup_epochs": 0.0}
    flat |= {"device": "npu", "processes": 8, "compile": "npugraphs", "precision": "float16"}
    tensors = {f"params/{n}": v for n, v in params().items()}
    meta = {"step": 5, "config": json.loads(json.dumps(flat)), "model": "pcpvt_nano", "classes": CLASSES, "examples": 9}
    path = checkpoint.save(tmp_path / "elsewhere", tensors, meta)
    words = [f"--config.checkpoint={path}", "--config.export.format=onnx", f"--workdir={tmp_path / 'run'}"]
    done = pcpvt("--mode=export", *words)
    assert done.stderr == "", done.stderr
    assert '--input_shape="images:8,3,40,40"' in done.stdout and "not verified here" in done.stdout
    result = json.loads((tmp_path / "run" / "result-export.json").read_text())
    assert result["output"] == str(tmp_path / "run" / "export" / "pcpvt_nano.onnx")
    assert [case["batch"] for case in result["verified"]] == [1, 3]
    run = onnxruntime.InferenceSession(result["output"], providers=["CPUExecutionProvider"])
    description = json.loads(run.get_modelmeta().custom_metadata_map["description"])
    assert description["classes"] == description["labels"] == CLASSES
    assert description["image_size"] == [40, 40] and description["step"] == 5
    # Preprocessing from pixels needs nothing but the description.
    pixels = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    mean, std = (torch.tensor(description[name])[:, None, None] for name in ("mean", "std"))
    images = (pixels / 255 - mean) / std
    assert_close(run.run(None, {"images": images.numpy()})[0], expected(params(), images))


def test_timm_and_load_model_read_the_export_with_equal_results(tmp_path, capsys):
    import timm

    here = session(tmp_path, **{"model.name": "pcpvt_s", "export.output": str(tmp_path / "out" / "s.safetensors")})
    assert export.run(here) == 0
    path = tmp_path / "out" / "s.safetensors"
    assert f'timm.create_model("twins_pcpvt_small", num_classes=3, checkpoint_path="{path}")' in capsys.readouterr().out
    network = timm.create_model("twins_pcpvt_small", num_classes=3, checkpoint_path=str(path)).eval()
    images = torch.randn((2, 3, 64, 96), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert_close(network(images), expected(params("pcpvt_s"), images, "pcpvt_s"))
    again = load_model(path)
    assert again.classes is None
    torch.testing.assert_close(again.params, params("pcpvt_s"), rtol=0, atol=0)


def test_the_file_for_timm_keeps_the_class_names(tmp_path):
    tensors = {f"params/{n}": v for n, v in params().items()}
    path = checkpoint.save(tmp_path / "c", tensors, {"step": 5, "model": "pcpvt_nano", "classes": CLASSES})
    assert export.run(session(tmp_path, checkpoint=str(path))) == 0
    again = load_model(tmp_path / "export" / "pcpvt_nano.safetensors")
    assert again.classes == CLASSES
    torch.testing.assert_close(again.params, params(), rtol=0, atol=0)


def test_a_file_that_differs_from_the_model_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(pt2, "compare", functools.partial(formats.compare, tolerance=-1.0))
    with pytest.raises(UserError, match="differs from the model by 0"):
        export.run(session(tmp_path, **{"export.format": "pt2"}))
    assert list((tmp_path / "export").iterdir()) == []


@pytest.mark.parametrize("form", ["timm", pytest.param("pt2", marks=pytest.mark.slow)])
def test_a_full_disk_is_a_one_line_error(form, tmp_path):
    torch.save(params(), tmp_path / "weights.pth")
    words = [f"--config.checkpoint={tmp_path / 'weights.pth'}", f"--config.export.format={form}"]
    words += ["--config=configs/pcpvt_s.py:cpu", "--config.model.name=pcpvt_nano", f"--workdir={tmp_path / 'run'}"]
    limited = 'ulimit -f 100; exec "$@"'  # kB per file
    ended = miniature.run(["--mode=export", *words], under=["bash", "-c", limited, "bash"])
    assert ended.code == 2 and "cannot be written (File too large)" in ended.error and ended.err.count("\n") == 1
    assert list((tmp_path / "run" / "export").iterdir()) == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": "onnx", "output": "a.pt2"}, "onnx files end in .onnx"),
        ({"format": "timm", "dynamic_size": True}, "weights for timm have no size"),
    ],
)
def test_an_invalid_request_is_a_one_line_error(tmp_path, monkeypatch, fields, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        export.run(session(tmp_path, **{f"export.{name}": value for name, value in fields.items()}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("size", "pad", "message"), [(32, "pad", "from 33 px"), (64, "error", "needs padding")])
def test_dynamic_size_requires_padding_and_33_px(size, pad, message):
    with pytest.raises(UserError, match=message):
        graph.capture(models.build("pcpvt_nano", 3, pad), params(), (size, size), dynamic_size=True)


def test_a_missing_package_is_a_one_line_error_before_any_work(tmp_path, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else real(name))
    with pytest.raises(UserError, match=r"onnx needs the package onnxscript: pip install 'pcpvt\[export\]'"):
        export.run(session(tmp_path, **{"export.format": "onnx"}))
