"""Evaluation of our own and of foreign checkpoints, with raw or averaged weights."""

from __future__ import annotations

import argparse
import json

import miniature
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from pcpvt.checkpoints import checkpoint, foreign
from pcpvt.checkpoints.load import class_names, load_model
from pcpvt.config import fields
from pcpvt.data.augment import eval_sample
from pcpvt.errors import UserError
from pcpvt.functional.mixing import decode_images
from pcpvt.functional.objective import IMAGENET_MEAN, IMAGENET_STD
from pcpvt.models import pcpvt as model_of
from pcpvt.models.init import init

CLASSES = ["cat", "dog", "eel"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An image folder with 3 classes of 4 validation images at 48 px."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, count in (("train", 1), ("val", 4)):
        for label, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (48, 48, 3), dtype=np.uint8)
                pixels[..., label] //= 4
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


def nano_params(classes: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    return init(model_of.build("pcpvt_nano", classes), seed)


def ours(folder, classes=CLASSES, outputs: int | None = None, ema: bool = True, config: dict | None = None):
    """A checkpoint as training writes it, with weights from seed 0 and an average from seed 1."""
    flat = {name: None if field.unset else field.default for name, field in fields.FIELDS.items()}
    flat |= {"model.name": "pcpvt_nano", "data.name": "folder", "image_size": 32, "epochs": 1.0, "warmup_epochs": 0.0}
    tensors = {f"params/{n}": v for n, v in nano_params(outputs or len(classes)).items()}
    if ema:
        tensors |= {f"ema/{n}": v for n, v in nano_params(outputs or len(classes), 1).items()}
    meta = {
        "step": 5,
        "config": json.loads(json.dumps({**flat, **(config or {})})),
        "model": "pcpvt_nano",
        "classes": list(classes),
        "image_size": [32, 32],
        "examples": 3,
        "metrics": {"acc1": 10.0},
    }
    return checkpoint.save(folder, tensors, meta)


def reference_logits(params: dict[str, torch.Tensor], folder, size: int) -> torch.Tensor:
    """Logits of the validation images in order, without the loader, the policy and the evaluator."""
    images = [eval_sample(str(path), (size, size), 0.875) for path in sorted(folder.glob("val/*/*"))]
    x = decode_images(torch.from_numpy(np.stack(images)), None, IMAGENET_MEAN, IMAGENET_STD)
    return model_of.apply(model_of.build("pcpvt_nano", len(params["head.bias"])), params, x)


def evaluate(pcpvt, workdir, *words: str) -> dict:
    pcpvt("--mode=eval", f"--workdir={workdir}", "--config.data.workers=0", "--config.precision=float32", *words)
    return json.loads((workdir / "result-eval.json").read_text())


def test_twins_file_is_evaluated_under_the_config_of_the_command_line(pcpvt, folder, tmp_path):
    path = tmp_path / "twins.pth"
    torch.save({"model": nano_params(), "epoch": 299, "args": argparse.Namespace(model="pcpvt_small_v0")}, path)
    words = ["--config=configs/pcpvt_s.py:cpu", "--config.model.name=pcpvt_nano", f"--config.data.path={folder}"]
    found = evaluate(pcpvt, tmp_path / "run", *words, f"--config.checkpoint={path}")
    assert (found["seen"], found["checkpoint"], found["weights"]) == (12, str(path), "params")
    assert found["epochs"] is None and found["n_parameters"] == sum(v.numel() for v in nano_params().values())
    # At 224 px, since a foreign file says nothing of its size.
    logits = reference_logits(nano_params(), folder, 224)
    assert found["loss"] == pytest.approx(F.cross_entropy(logits, torch.arange(12) // 4).item(), abs=1e-5)


def test_our_checkpoint_brings_its_config_and_the_average_is_what_auto_takes(pcpvt, folder, tmp_path):
    words = [f"--config.data.path={folder}", f"--config.checkpoint={ours(tmp_path / 'elsewhere')}"]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "result.json").write_text("{")  # cut off by a full disk
    for seed, which, more in ((1, "ema", []), (0, "params", ["--config.weights=params"])):
        found = evaluate(pcpvt, tmp_path / "run", *words, *more)
        loss = F.cross_entropy(reference_logits(nano_params(seed=seed), folder, 32), torch.arange(12) // 4)
        assert found["weights"] == which and found["loss"] == pytest.approx(loss.item(), abs=1e-5)
        assert json.loads((tmp_path / "run" / "result.json").read_text()) == found


def test_class_count_of_a_foreign_file_is_held_against_the_data_in_one_line(pcpvt, folder, tmp_path):
    torch.save(nano_params(5), tmp_path / "a.pth")
    words = ["--config=configs/pcpvt_s.py:cpu", f"--config.data.path={folder}", "--config.model.name=pcpvt_nano"]
    done = pcpvt(
        "--mode=eval", f"--workdir={tmp_path}", f"--config.checkpoint={tmp_path / 'a.pth'}", *words, check=False
    )
    assert done.returncode == 2
    assert "has 5 classes and the data have 3 classes (cat, dog, eel)" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"model": "pcpvt_s"}, "looks like pcpvt_nano: use --config.model.name=pcpvt_nano"),
        ({"which": "ema"}, "holds no EMA weights, only params: use config.weights=params"),
        ({"num_classes": 4}, "the file has 3 classes: set config.num_classes=3"),
    ],
)
def test_file_of_another_model_is_refused_in_one_line(tmp_path, options, said):
    torch.save(nano_params(), tmp_path / "a.pth")
    with pytest.raises(UserError) as caught:
        load_model(tmp_path / "a.pth", **options)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_head_larger_than_the_data_trains_and_is_evaluated_alike(pcpvt, nano, tmp_path):
    pcpvt(*nano, "--config.num_classes=12", "--config.steps=4", "--config.precision=float32")
    trained = json.loads((tmp_path / "run" / "result.json").read_text())
    found = evaluate(pcpvt, tmp_path / "run")
    assert found["n_parameters"] == sum(v.numel() for v in nano_params(12).values())
    assert [found[name] for name in ("acc1", "acc5", "loss")] == [trained[name] for name in ("acc1", "acc5", "loss")]


def test_head_smaller_than_the_data_is_one_line(pcpvt, nano):
    done = pcpvt(*nano, "--config.num_classes=9", check=False)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
    assert "config.num_classes: 9 but the data have 10 classes: leave it unset" in done.stderr


def test_training_refuses_a_checkpoint_field_that_it_would_ignore(nano):
    assert "use config.finetune" in miniature.refusal([*nano, "--config.checkpoint=x.pth"])


def test_model_is_told_from_the_weights(tmp_path):
    foreign.write_timm(nano_params(7), tmp_path / "a.safetensors")
    found = load_model(tmp_path / "a.safetensors")
    assert found.model.spec == model_of.SPECS["pcpvt_nano"] and found.model.num_classes == 7
    assert found.params.keys() == nano_params().keys() and found.classes is None and found.meta == {}


def test_workdir_means_its_best_whole_checkpoint(tmp_path, capsys):
    path = ours(tmp_path / "checkpoints")
    better = checkpoint.read_meta(path) | {"step": 9, "metrics": {"acc1": 20.0}}
    tensors = {f"params/{n}": v for n, v in nano_params(seed=2).items()}
    second = checkpoint.save(tmp_path / "checkpoints", tensors, better)
    assert load_model(tmp_path).path == str(second)
    data = bytearray(second.read_bytes())
    data[-1] ^= 1
    second.write_bytes(data)
    found = load_model(tmp_path)
    assert found.path == str(path) and found.which == "ema"
    assert capsys.readouterr().err.count("checksum") == 1
    torch.testing.assert_close(found.params, nano_params(seed=1), rtol=0, atol=0)
    path.unlink()
    second.unlink()
    with pytest.raises(UserError, match="no usable checkpoint"):
        load_model(tmp_path)


def test_outputs_without_a_name_are_numbered(tmp_path):
    assert class_names(load_model(ours(tmp_path, outputs=4))) == ["cat", "dog", "eel", "3"]
    torch.save(nano_params(5), tmp_path / "a.pth")
    assert class_names(load_model(tmp_path / "a.pth")) == ["0", "1", "2", "3", "4"]


def test_thousand_unnamed_outputs_are_imagenets(tmp_path):
    torch.save(nano_params(1000), tmp_path / "a.pth")
    names = class_names(load_model(tmp_path / "a.pth"))
    assert len(names) == 1000 and names[0].startswith("tench") and names[281].startswith("tabby")


def test_float64_weights_are_evaluated_as_they_are(tmp_path):
    params = {name: value.double() + 1e-12 for name, value in nano_params().items()}
    torch.save(params, tmp_path / "a.pth")
    torch.testing.assert_close(load_model(tmp_path / "a.pth").params, params, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("precision", "ways"),
    [
        ("float32", [("cpu", 64), ("cpu", 7), ("cpu2", 64)]),
        pytest.param("auto", [("cpu", 64), ("cpu", 7), ("cpu3", 10)], marks=pytest.mark.slow),
    ],
)
def test_evaluation_is_exact_at_any_world_and_batch_size(pcpvt, trained, tmp_path, precision, ways):
    """The counts are the same integers and every image is seen once; losses differ by float32 sums in another order.

    In bfloat16 too, which `auto` is where the processor has it: measured 3e-8.
    """
    checkpoints = sorted((trained / "checkpoints").glob("step-*.safetensors"))
    words = ["--mode=eval", f"--config.checkpoint={checkpoints[-1]}", f"--config.precision={precision}"]
    found = []
    for arg, batch in ways:
        workdir = tmp_path / f"{arg}-{batch}"
        words_here = [
            f"--config=configs/pcpvt_s.py:{arg}",
            f"--config.eval.batch_size={batch}",
            "--config.batch_size=66",
        ]
        pcpvt(*words, *words_here, f"--workdir={workdir}")
        found.append(json.loads((workdir / "result-eval.json").read_text()))
    for other in found:
        assert other["seen"] == 364
        for name in ("acc1", "acc5", "balanced_acc", "macro_f1", "recall"):
            assert other[name] == found[0][name]
        assert other["loss"] == pytest.approx(found[0]["loss"], rel=1e-6)
