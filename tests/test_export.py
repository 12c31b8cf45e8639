"""Exported files compute what the model computes: timm, ONNX and pt2, any batch, any size, and never half a file."""

from __future__ import annotations

import importlib.util
import json
import zipfile

import miniature
import pytest
import torch

from pcpvt import torchvision_compat  # noqa: F401
from pcpvt.checkpoints import checkpoint
from pcpvt.checkpoints.load import load_model
from pcpvt.config import fields, recipes
from pcpvt.errors import UserError
from pcpvt.export import graph as export_graph
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
    """Every leaf matters: biases and norms are moved off their initial 0 and 1."""
    source = torch.Generator().manual_seed(0)
    found = init(models.build(name, classes), 0)
    return {n: v + 0.1 * torch.randn(v.shape, generator=source) * (v.ndim == 1) for n, v in found.items()}


def expected(found: models.Params, images: torch.Tensor, name: str = "pcpvt_nano") -> torch.Tensor:
    with torch.no_grad():
        return models.apply(models.build(name, len(found["head.bias"])), found, images.permute(0, 2, 3, 1))


def close(found, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(torch.as_tensor(found), wanted, rtol=1e-5, atol=1e-5)


def session(workdir, **fields) -> sessions.Session:
    """Of a host that exports the file weights.pth."""
    config = recipes.from_arg("cpu,folder", "pcpvt_nano", 0.0)
    config.update_from_flattened_dict({"image_size": 64, "checkpoint": str(workdir / "weights.pth"), **fields})
    if not (workdir / "weights.pth").exists():
        torch.save(params(config.model.name), workdir / "weights.pth")
    return sessions.start(config, workdir)


@pytest.mark.parametrize("size", [(4, 4), (5, 7), (33, 64), (2, 3), (1, 9)])
def test_patches_without_a_branch_are_the_same_to_the_bit(size):
    source = torch.Generator().manual_seed(0)
    for patch in (2, 4, 8):
        plain, free = PatchLinear(3, 5, patch), export_graph.AnySize(3, 5, patch)
        for leaf in plain.parameters():
            leaf.data = torch.randn(leaf.shape, generator=source)
        free.load_state_dict(plain.state_dict())
        x = torch.randn(2, *size, 3, generator=source)
        assert torch.equal(plain(x), free(x))


@pytest.fixture(scope="module")
def graph():
    return export_graph.capture(models.build("pcpvt_nano", 3), params(), (48, 48), dynamic_size=True)


@needs_onnx
def test_onnx_takes_any_batch_and_size_and_carries_its_description(graph, tmp_path):
    import onnx
    import onnxruntime

    found = export_graph.write_onnx(graph, tmp_path / "a.onnx", "about it")
    cases = [(case["batch"], *case["size"]) for case in found]
    assert cases == [(1, 48, 48), (3, 48, 48), (1, 61, 86), (3, 61, 86)]
    assert all(case["difference"] < 1e-5 for case in found)
    run = onnxruntime.InferenceSession(str(tmp_path / "a.onnx"), providers=["CPUExecutionProvider"])
    for shape in ((2, 3, 64, 96), (5, 3, 33, 47), (1, 3, 100, 35)):
        images = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        close(run.run(None, {"images": images.numpy()})[0], expected(params(), images))
    model = onnx.load(tmp_path / "a.onnx")
    assert [entry.version for entry in model.opset_import if not entry.domain] == [18]
    assert {node.domain for node in model.graph.node} == {""}, "operators that other tools do not know"
    assert run.get_modelmeta().custom_metadata_map["description"] == "about it"


def test_pt2_takes_any_batch_and_size_and_carries_its_description(graph, tmp_path):
    found = export_graph.write_pt2(graph, tmp_path / "a.pt2", "about it")  # loads it again, which takes seconds
    assert len(found) == 4 and all(case["difference"] < 1e-5 for case in found)
    with zipfile.ZipFile(tmp_path / "a.pt2") as archive:
        name = next(name for name in archive.namelist() if name.endswith(export_graph.DESCRIPTION))
        assert archive.read(name) == b"about it"


def test_pt2_of_one_size_takes_any_batch_of_it_and_no_other_size(tmp_path):
    fixed = export_graph.capture(models.build("pcpvt_nano", 3), params(), (40, 72), dynamic_size=False)
    export_graph.write_pt2(fixed, tmp_path / "a.pt2", "")
    loaded = torch.export.load(tmp_path / "a.pt2").module()
    images = torch.randn((5, 3, 40, 72), generator=torch.Generator().manual_seed(1))
    close(loaded(images), expected(params(), images))
    with pytest.raises((AssertionError, RuntimeError)):
        loaded(images[..., :64])


@needs_onnx
def test_binary_exports_what_was_trained_on_npus_and_prints_the_way_to_om(pcpvt, tmp_path):
    import onnxruntime

    flat = {name: None if isinstance(value, type) else value for name, (value, _) in fields.FIELDS.items()}
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
    about = json.loads(run.get_modelmeta().custom_metadata_map["description"])
    assert about["classes"] == about["labels"] == CLASSES and about["image_size"] == [40, 40] and about["step"] == 5
    # From pixels, by the description alone.
    pixels = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    mean, std = (torch.tensor(about[name])[:, None, None] for name in ("mean", "std"))
    images = (pixels / 255 - mean) / std
    close(run.run(None, {"images": images.numpy()})[0], expected(params(), images))


def test_timm_loads_the_export_with_equal_logits_and_so_do_we(tmp_path, capsys):
    import timm

    here = session(tmp_path, **{"model.name": "pcpvt_s", "export.output": str(tmp_path / "out" / "s.safetensors")})
    assert export.run(here) == 0
    path = tmp_path / "out" / "s.safetensors"
    assert f'timm.create_model("twins_pcpvt_small", num_classes=3, checkpoint_path="{path}")' in capsys.readouterr().out
    theirs = timm.create_model("twins_pcpvt_small", num_classes=3, checkpoint_path=str(path)).eval()
    images = torch.randn((2, 3, 64, 96), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        close(theirs(images), expected(params("pcpvt_s"), images, "pcpvt_s"))
    again = load_model(path)
    assert again.classes is None
    torch.testing.assert_close(again.params, params("pcpvt_s"), rtol=0, atol=0)


def test_class_names_travel_with_the_file_for_timm(tmp_path):
    tensors = {f"params/{n}": v for n, v in params().items()}
    path = checkpoint.save(tmp_path / "c", tensors, {"step": 5, "model": "pcpvt_nano", "classes": CLASSES})
    assert export.run(session(tmp_path, checkpoint=str(path))) == 0
    again = load_model(tmp_path / "export" / "pcpvt_nano.safetensors")
    assert again.classes == CLASSES
    torch.testing.assert_close(again.params, params(), rtol=0, atol=0)


def test_file_that_differs_from_the_model_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(export_graph, "TOLERANCE", -1.0)
    with pytest.raises(UserError, match="differs from the model by 0"):
        export.run(session(tmp_path, **{"export.format": "pt2"}))
    assert list((tmp_path / "export").iterdir()) == []


@pytest.mark.parametrize("form", ["timm", pytest.param("pt2", marks=pytest.mark.slow)])
def test_full_disk_is_one_line(form, tmp_path):
    torch.save(params(), tmp_path / "weights.pth")
    words = [f"--config.checkpoint={tmp_path / 'weights.pth'}", f"--config.export.format={form}"]
    words += ["--config=configs/pcpvt_s.py:cpu", "--config.model.name=pcpvt_nano", f"--workdir={tmp_path / 'run'}"]
    small = 'ulimit -f 100; exec "$@"'  # of a file, in kB
    ended = miniature.run(["--mode=export", *words], under=["bash", "-c", small, "bash"])
    assert ended.code == 2 and "cannot be written (File too large)" in ended.error and ended.err.count("\n") == 1
    assert list((tmp_path / "run" / "export").iterdir()) == []


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"format": "onnx", "output": "a.pt2"}, "onnx files end in .onnx"),
        ({"format": "timm", "dynamic_size": True}, "weights for timm have no size"),
    ],
)
def test_what_cannot_be_exported_is_one_line(tmp_path, monkeypatch, asked, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=said) as caught:
        export.run(session(tmp_path, **{f"export.{name}": value for name, value in asked.items()}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("size", "pad", "said"), [(32, "pad", "from 33 px"), (64, "error", "needs padding")])
def test_dynamic_size_says_what_it_needs(size, pad, said):
    with pytest.raises(UserError, match=said):
        export_graph.capture(models.build("pcpvt_nano", 3, pad), params(), (size, size), dynamic_size=True)


def test_missing_package_is_one_line_before_any_work(tmp_path, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else real(name))
    with pytest.raises(UserError, match=r"onnx needs the package onnxscript: pip install 'pcpvt\[export\]'"):
        export.run(session(tmp_path, **{"export.format": "onnx"}))
