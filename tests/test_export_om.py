"""The kit of `export.format=om`: ONNX parity, AIPP arithmetic, the conversion script, and the check on raw outputs.

The conversion itself cannot be tested without CANN: a stand-in for `atc` writes down how it is called.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys

import miniature
import numpy as np
import pytest
import torch

from pcpvt.checkpoints.load import load_model
from pcpvt.config import recipes
from pcpvt.config.checks import counts
from pcpvt.data import sources
from pcpvt.errors import UserError
from pcpvt.export import om, om_texts, samples
from pcpvt.functional.objective import normalisation
from pcpvt.models import pcpvt as models
from pcpvt.models.init import init
from pcpvt.readers.listing import unlabelled
from pcpvt.runtime import session as sessions

pytestmark = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("onnx", "onnxscript", "onnxruntime"))), reason="the extra `export`"
)
COUNT = 12


def export(trained, output, *words):
    words = ["--mode=export", "--config.export.format=om", f"--config.export.output={output}", *words]
    words += [f"--config.checkpoint={trained}", f"--workdir={output}-run"]
    return miniature.end(miniature.start(words), timeout=400)


@pytest.fixture(scope="module")
def kit(trained, tmp_path_factory):
    path = tmp_path_factory.mktemp("om") / "kit"
    words = ["--config.export.batches=1,4", f"--config.export.calibration={COUNT}", "--config.image_size=40"]
    ended = export(trained, path, *words)
    assert ended.code == 0, ended.err
    assert "not verified here" in ended.out
    return path


def inference(path):
    import onnxruntime

    return onnxruntime.InferenceSession(
        path if isinstance(path, bytes) else str(path), providers=["CPUExecutionProvider"]
    )


def test_onnx_files_have_old_versions_a_fixed_batch_and_the_logits_of_the_model(kit, trained):
    import onnx

    loaded = load_model(trained)
    for name, batch in (("pcpvt_nano_b1.onnx", 1), ("pcpvt_nano_b4.onnx", 4)):
        model = onnx.load(kit / name)
        onnx.checker.check_model(model, full_check=True)
        assert model.ir_version == 8 and [(o.domain, o.version) for o in model.opset_import] == [("", 17)]
        shapes = [
            [d.dim_value for d in v.type.tensor_type.shape.dim] for v in (*model.graph.input, *model.graph.output)
        ]
        assert shapes == [[batch, 3, 40, 40], [batch, 10]]
        assert not any(d.dim_param for v in model.graph.value_info for d in v.type.tensor_type.shape.dim)
        images = torch.randn((batch, 3, 40, 40), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            expected = models.apply(loaded.model, loaded.params, images.permute(0, 2, 3, 1)).numpy()
        np.testing.assert_allclose(inference(kit / name).run(None, {"images": images.numpy()})[0], expected, atol=1e-4)
        assert str(miniature.ROOT).encode() not in (kit / name).read_bytes(), "a path of this machine"


def model_of(nodes, initial, images):
    """A model of opset 18 and IR 10 from `images` to `logits`."""
    from onnx import TensorProto, helper

    ends = [helper.make_tensor_value_info(*end) for end in (("images", TensorProto.FLOAT, images),)]
    result = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [images[0], None])
    inner = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [f"2*((({images[2]} + 3)//4))"])]
    graph = helper.make_graph(nodes, "graph", ends, [result], initial, value_info=inner)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def test_axes_get_names_wherever_they_occur():
    from pcpvt.export import opset17

    model = model_of([], [], ["s34", 3, "s3", "s54"])
    opset17.name_axes(model)
    (images,), (inner,) = model.graph.input, model.graph.value_info
    assert [d.dim_param or d.dim_value for d in images.type.tensor_type.shape.dim] == ["batch", 3, "height", "width"]
    assert inner.type.tensor_type.shape.dim[0].dim_param == "2*(((height + 3)//4))"


def test_what_changed_in_opset_18_is_rewritten_or_refused():
    import onnx
    from onnx import helper, numpy_helper

    from pcpvt.export import opset17

    axes = numpy_helper.from_array(np.array([2, 3]), "axes")
    nodes = [
        helper.make_node("Split", ["images"], ["a", "b"], axis=1, num_outputs=2),
        helper.make_node("ReduceMean", ["a", "axes"], ["logits"], keepdims=0, noop_with_empty_axes=0),
    ]
    model = model_of(nodes, [axes], [2, 4, 8, 8])
    opset17.lower(model)
    del model.graph.value_info[:]
    onnx.checker.check_model(model, full_check=True)
    assert (model.ir_version, model.opset_import[0].version, len(model.graph.initializer)) == (8, 17, 0)
    images = np.random.default_rng(0).standard_normal((2, 4, 8, 8), dtype=np.float32)
    got = inference(model.SerializeToString()).run(None, {"images": images})[0]
    np.testing.assert_allclose(got, images[:, :2].mean((2, 3)), atol=1e-6)
    with pytest.raises(ValueError, match="ReduceMax of opset 18 has no form in opset 17"):
        opset17.lower(model_of([helper.make_node("ReduceMax", ["images"], ["logits"])], [], [2, 4, 8, 8]))


@pytest.mark.slow  # another graph: test_axes_get_names_wherever_they_occur
def test_dynamic_axes_are_named(trained, tmp_path):
    import onnx

    words = ["--config.export.calibration=0", "--config.export.dynamic_size=true", "--config.export.batches=2"]
    ended = export(trained, tmp_path / "kit", *words, "--config.image_size=40")
    assert ended.code == 0, ended.err
    kit, loaded = tmp_path / "kit", load_model(trained)
    assert "holds no images" in check(kit, "outputs", kit).stderr
    model = onnx.load(kit / "pcpvt_nano_dynamic.onnx")
    assert model.ir_version == 8 and model.opset_import[0].version == 17
    names = [[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.input]
    assert names == [["batch", 3, "height", "width"]]
    inner = {d.dim_param for v in model.graph.value_info for d in v.type.tensor_type.shape.dim if d.dim_param}
    assert {word for text in inner for word in re.findall(r"[a-z]\w*", text)} == {"batch", "height", "width"}
    images = torch.randn((2, 3, 41, 70), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = models.apply(loaded.model, loaded.params, images.permute(0, 2, 3, 1)).numpy()
    got = inference(kit / "pcpvt_nano_dynamic.onnx").run(None, {"images": images.numpy()})[0]
    np.testing.assert_allclose(got, expected, atol=1e-4)


@pytest.mark.parametrize("channels", [1, 3])
def test_aipp_normalises_as_the_model_was_trained(channels):
    mean, std = normalisation(channels)
    text = om.aipp((48, 64), mean, std)
    found = dict(re.findall(r"^    (\w+): (\S+)$", text, re.MULTILINE))
    assert text.startswith("aipp_op {\n") and text.endswith("\n}\n")
    assert found["input_format"] == ("RGB888_U8" if channels == 3 else "YUV400_U8")
    assert (found["src_image_size_h"], found["src_image_size_w"]) == ("48", "64")
    pixels = np.arange(256.0)
    for channel in range(channels):
        centre, rest, factor = (found[f"{name}_chn_{channel}"] for name in ("mean", "min", "var_reci"))
        assert 0 <= int(centre) <= 255 and 0 <= float(rest) < 1
        # The document gives 16 bits to the last two.
        ours = (pixels - int(centre) - float(np.float16(rest))) * float(np.float16(factor))
        np.testing.assert_allclose(ours, (pixels / 255 - mean[channel]) / std[channel], atol=2e-3)


def test_precision_files_name_what_is_in_the_graph(kit):
    import onnx

    nodes = {node.name: node.op_type for node in onnx.load(kit / "pcpvt_nano_b4.onnx").graph.node}
    kept = (kit / "precision" / "keep_dtype.cfg").read_text().split()
    assert {nodes[name] for name in kept} == set(om.PRECISE)
    assert len(kept) == sum(kind in om.PRECISE for kind in nodes.values())
    assert json.loads((kit / "precision" / "mixlist.json").read_text())["black-list"]["to-add"] == list(om.ASCEND_TYPES)


@pytest.mark.parametrize(
    ("words", "wanted", "refused"),
    [
        ([], ["--precision_mode_v2=mixed_float16", "--modify_mixlist=", "--insert_op_conf=aipp.cfg"], "--keep_dtype"),
        (["fp16", "float"], ["--precision_mode_v2=fp16", "--keep_dtype=precision/keep_dtype.cfg"], "--insert_op_conf"),
        (["origin"], ["--precision_mode_v2=origin", "--insert_op_conf=aipp.cfg"], "--modify_mixlist"),
    ],
)
def test_the_script_calls_atc_for_every_batch(kit, tmp_path, words, wanted, refused):
    (tmp_path / "atc").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n')
    (tmp_path / "atc").chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(["sh", kit / "convert.sh", "Ascend310P3", *words], env=env, cwd=tmp_path, check=True)
    (kit / "om").rmdir()
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 2
    for call, batch in zip(calls, (1, 4), strict=True):
        for word in (f"--model=pcpvt_nano_b{batch}.onnx", f"--input_shape=images:{batch},3,40,40", *wanted):
            assert word in call
        assert "--framework=5" in call and "--soc_version=Ascend310P3" in call and refused not in call
    for file in re.findall(r"=((?:precision/|aipp)\S+)", " ".join(calls)):
        assert (kit / file).is_file()
    assert subprocess.run(["sh", kit / "convert.sh"], env=env, capture_output=True, text=True).returncode != 0


def test_the_script_and_the_readme_are_whole(kit):
    shellcheck = shutil.which("shellcheck") or shutil.which("shellcheck", path=os.path.dirname(sys.executable))
    if shellcheck:  # of the extra `test`
        subprocess.run([shellcheck, kit / "convert.sh"], check=True)
    text = (kit / "README.md").read_text()
    assert "Not verified: the conversion" in text
    for name in re.findall(r"^\| `([\w/.*]+)` \|", text, re.MULTILINE):
        if not name.startswith("Ascend"):
            assert list(kit.glob(name)), name
    for chip in ("Ascend310", "Ascend310P3", "Ascend310B4", "Ascend910B3"):
        assert f"`{chip}`" in text
    assert "ais_bench" in text and "msame" in text and "{" not in text


def test_the_readme_counts_each_folders_images_and_names_no_missing_file():
    text = om_texts.readme(om_texts.Facts("pcpvt_s", [8, 16], (40, 40), 3, True, 64, 20))
    assert "| 64 training images" in text and "| 20 validation images" in text
    assert "_b1_" not in text


def test_images_of_which_none_can_be_read_are_one_line(tmp_path):
    config = recipes.from_arg("cpu,folder", "pcpvt_nano", 0.0)
    config.data.on_error = "skip"
    (tmp_path / "a.png").write_bytes(b"no image")
    missing = sources.Files(unlabelled([str(tmp_path / "a.png")]), "train", "")
    with pytest.raises(UserError, match=r"none of the 1 images \(train\) can be read: check the files"):
        list(samples.draw(sessions.start(config, tmp_path), missing, 4, "calibration"))


def check(kit, *words):
    done = subprocess.run(
        [sys.executable, "-I", "check.py", *map(str, words)], cwd=kit, capture_output=True, text=True, check=False
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


def test_the_check_finds_good_and_bad_outputs(kit, tmp_path):
    """Raw outputs of ONNX Runtime stand in for those of a chip."""
    assert check(kit, "prepare", "validation", tmp_path / "inputs").stdout.startswith(f"{COUNT} inputs written")
    run, results = inference(kit / "pcpvt_nano_b1.onnx"), tmp_path / "results"
    results.mkdir()
    for file in (tmp_path / "inputs").glob("*.bin"):
        images = np.fromfile(file, np.float32).reshape(1, 3, 40, 40)
        run.run(None, {"images": images})[0].tofile(results / f"{file.stem}_0.bin")
    done = check(kit, "outputs", results)
    assert done.returncode == 0 and "good enough" in done.stdout
    figures = dict(re.findall(r"^(.*): (.*)$", done.stdout, re.MULTILINE))
    assert figures["images"] == str(COUNT) and figures["agreement"] == "100"
    assert float(figures["relative difference"]) < 1e-4
    reference, lines = np.load(kit / "reference.npy"), (kit / "validation.txt").read_text().splitlines()
    labels = np.array([int(line.split("\t")[1]) for line in lines])
    assert float(figures["acc1"]) == pytest.approx(100 * (reference.argmax(1) == labels).mean(), abs=1e-3)
    for i in range(3):  # half precision, and the order of the classes turned round
        np.save(results / f"{i:05d}.npy", np.fromfile(results / f"{i:05d}_0.bin", np.float32)[::-1].astype(np.float16))
        (results / f"{i:05d}_0.bin").unlink()
    done = check(kit, "outputs", results)
    assert done.returncode == 1 and "not good enough" in done.stdout
    (results / "00004_0.bin").write_bytes(b"123")
    assert (
        "00004_0.bin: 3 bytes: the logits of one image of 10 classes have 40" in check(kit, "outputs", results).stderr
    )
    (results / "00004_0.bin").unlink()
    assert "no outputs of 00004.bin" in check(kit, "outputs", results).stderr


def test_planes_are_the_same_pixels(kit, tmp_path):
    check(kit, "prepare", "validation", tmp_path / "planes", "--uint8")
    pixels = np.fromfile(kit / "validation" / "00003.bin", np.uint8).reshape(40, 40, 3)
    planes = np.fromfile(tmp_path / "planes" / "00003.bin", np.uint8).reshape(3, 40, 40)
    np.testing.assert_array_equal(planes, pixels.transpose(2, 0, 1))


def test_images_are_drawn_by_key_from_the_training_data(kit):
    from pcpvt import rng

    train = sources.digits("train", (40, 40))
    wanted = rng.generator(0, "calibration").permutation(len(train))[:COUNT]
    lines = (kit / "calibration.txt").read_text().splitlines()
    assert len(lines) == len(list((kit / "calibration").iterdir())) == COUNT
    for line, index in zip(lines, wanted, strict=True):
        pixels = np.fromfile(kit / "calibration" / line.split("\t")[0], np.uint8).reshape(40, 40, 3)
        np.testing.assert_array_equal(pixels, train[index][0])


def test_mistakes_are_one_line(trained, tmp_path):
    (tmp_path / "kit").mkdir()
    (tmp_path / "kit" / "mine").touch()
    ended = export(trained, tmp_path / "kit")
    assert ended.code == 2 and "holds mine, which no export wrote" in ended.error
    ended = export(trained, tmp_path / "other", "--config.export.batches=1,1")
    assert ended.code == 2 and "'1,1' is no list of different whole numbers" in ended.error
    torch.save(init(models.build("pcpvt_nano", 3), 0), tmp_path / "w.pth")
    ended = export(tmp_path / "w.pth", tmp_path / "other")
    assert ended.code == 2 and "or set config.export.calibration=0 for a kit without" in ended.error
    assert not (tmp_path / "other").exists()
    assert counts("8") == counts("1,16") == ""
    assert all(counts(wrong) for wrong in ("", "0", "1,,2", "x", "4097", "1.5", "01"))
