"""Distillation in the program: any teacher, what is said about it, resuming, several processes, audits, refusals."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import miniature
import pytest
import torch
from reference import nchw
from test_distillation import HALF, HERE, resnet
from test_runners import SUFFIXES, session, written  # noqa: F401 - a fixture

from pcpvt.checkpoints.load import load_model
from pcpvt.config import recipes, stored
from pcpvt.config.resolve import check
from pcpvt.data import sources
from pcpvt.errors import UserError
from pcpvt.functional.distillation import renormalise, resize
from pcpvt.functional.objective import training_images
from pcpvt.models import pcpvt as models
from pcpvt.train import distillation

import timm  # isort: skip

CLASSES = [str(i) for i in range(10)]
SHORT = {"steps": 4, "eval_every": "0", "save_every": "2 steps", "log_every": "1 steps", "tensorboard": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A ResNet in a folder as it is on the hub, whose classes are named in another order than the data's."""
    place = tmp_path_factory.mktemp("teacher") / "resnet"
    return save(resnet().float(), place, [*CLASSES[5:], *CLASSES[:5]])


def save(model: torch.nn.Module, place: Path, names: list[str] | None) -> Path:
    described = {"label_names": names} if names else {}
    timm.models.save_for_hf(model, place, safe_serialization=True, model_config=described)
    return place


def of_run(tmp_path, model=None, **fields):
    here = session(tmp_path, **{name.replace("__", "."): value for name, value in fields.items()})
    data = sources.digits("train", (32, 32))
    return distillation.of_run(here, model or models.build("pcpvt_nano", 10), data)


def digits(n: int = 6) -> dict[str, torch.Tensor]:
    data = sources.digits("train", (32, 32))
    return {"image": torch.stack([torch.as_tensor(data[i][0]) for i in range(n)])}


def test_a_timm_model_is_asked_by_class_name_in_its_own_size_and_normalisation(folder, tmp_path):
    teacher = of_run(tmp_path, distill__teacher=str(folder), distill__image_size=48)
    batch = digits()
    x = renormalise(resize(training_images(batch, 3), (48, 48)), HERE, HALF)
    expected = resnet().float()(nchw(x))
    found = teacher.logits(batch)
    torch.testing.assert_close(found, torch.cat([expected[:, 5:], expected[:, :5]], 1), rtol=1e-4, atol=1e-4)
    assert not found.requires_grad
    narrow = of_run(tmp_path, distill__teacher=str(folder), distill__precision="bfloat16")
    assert narrow.logits(batch).dtype == torch.float32 and not torch.equal(narrow.logits(batch), found)
    assert "160x160 px (bicubic from 32x32), bfloat16; soft targets" in narrow.notes[0]
    assert narrow.digest != teacher.digest  # another size


@pytest.mark.parametrize("suffix", ["", *SUFFIXES])
def test_a_workdir_and_its_exports_are_the_same_teacher(trained, written, tmp_path, suffix):  # noqa: F811
    teacher = of_run(tmp_path, distill__teacher=str(written[suffix] if suffix else trained))
    loaded, batch = load_model(trained), digits()
    expected = models.apply(loaded.model, loaded.params, training_images(batch, 3))
    torch.testing.assert_close(teacher.logits(batch), expected, rtol=1e-3, atol=1e-3)
    assert "136,498 parameters, 10 classes, 32x32 px" in teacher.notes[0]
    if suffix:
        with pytest.raises(UserError, match=r"config\.distill\.image_size: 64x64 px and .* takes 32x32 only"):
            of_run(tmp_path, distill__teacher=str(written[suffix]), distill__image_size=64)


@pytest.mark.parametrize("suffix", [s for s in SUFFIXES if ".pt2" in str(s)])
def test_a_graph_of_pixels_gets_pixels(pcpvt, trained, tmp_path, suffix):
    file = tmp_path / f"pixels{suffix}"
    words = ["--config.export.format=pt2", "--config.export.preprocess=True", f"--config.export.output={file}"]
    pcpvt("--mode=export", *words, f"--workdir={trained}")
    batch = digits()
    found = of_run(tmp_path, distill__teacher=str(file)).logits(batch)
    loaded = load_model(trained)
    expected = models.apply(loaded.model, loaded.params, training_images(batch, 3))
    torch.testing.assert_close(found.softmax(-1), expected.softmax(-1), rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """An uninterrupted distillation, and its output."""
    workdir = tmp_path_factory.mktemp("whole")
    ended = miniature.run(miniature.words(workdir, distill__teacher=folder, **SHORT))
    assert ended.code == 0 and ended.err == "", ended.err
    return workdir, ended.out


def test_a_run_names_its_teacher_and_stores_its_digest(whole, folder):
    workdir, out = whole
    assert (
        f"note: teacher: {folder}, 373,658 parameters, 10 classes, 160x160 px (bicubic from 32x32), float32; soft "
        "targets at temperature 1, 0.5 of the loss" in out
    )
    assert "note: teacher: its outputs for 10 classes of 10 are taken by name" in out
    assert re.fullmatch("[0-9a-f]{32}", miniature.newest(workdir).meta["teacher"])
    assert stored.flat(json.loads((workdir / "config.json").read_text()))["distill.teacher"] == str(folder)


def test_an_interrupted_run_goes_on_to_the_bit_and_only_with_its_teacher(whole, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "resnet")
    words = miniature.words(tmp_path / "run", distill__teacher=tmp_path / "resnet", **SHORT)
    stopped = miniature.run(words, {"at": "step", "do": "SIGTERM", "n": 2})
    assert stopped.code != 0 and miniature.newest(tmp_path / "run").meta["step"] < 4, stopped.err
    save(resnet().float().apply(noise), tmp_path / "resnet", [*CLASSES[5:], *CLASSES[:5]])
    changed = miniature.run(words)
    assert changed.code == 2 and "is no longer the teacher that" in changed.error
    other = miniature.run([*words, "--config.distill.weight=0.6"])
    assert other.code == 2 and "config.distill.weight: 0.6 but" in other.error
    shutil.rmtree(tmp_path / "resnet")
    shutil.copytree(folder, tmp_path / "resnet")
    assert miniature.run(words).code == 0
    miniature.assert_same_run(tmp_path / "run", whole[0])


def noise(module: torch.nn.Module) -> None:
    with torch.no_grad():
        for value in module.parameters(recurse=False):
            value.add_(0.01)


def test_two_processes_give_the_loss_of_one_and_audits_agree(whole, folder, tmp_path):
    words = miniature.words(tmp_path, "cpu2", distill__teacher=folder, audit_every=1, audit_action="end", **SHORT)
    ended = miniature.run([*words, "--config.accumulate=2"])
    assert ended.code == 0 and ended.err == "" and "audit: every 1 steps" in ended.out, ended.err
    losses = [[r["loss"] for r in miniature.records(run) if r["kind"] == "train"] for run in (tmp_path, whole[0])]
    assert len(losses[0]) == 4 and losses[0] == pytest.approx(losses[1], rel=2e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weight": 0.3}, "config.distill.weight: 0.3 but there is no teacher: set config.distill.teacher, or"),
        ({"image_size": 64}, "config.distill.image_size: 64 but there is no teacher"),
        ({"teacher": "x", "mode": "hard", "temperature": 2.0}, "config.distill.temperature: 2 is of soft targets and"),
        ({"teacher": "x", "mode": "firm"}, "config.distill.mode: 'firm' is not known"),
    ],
)
def test_fields_without_effect_are_refused(fields, message):
    config = recipes.from_arg("cpu,digits", "pcpvt_nano", 0.0)
    config.distill.update(fields)
    with pytest.raises(UserError, match=re.escape(message)):
        check(config)


def test_teachers_that_do_not_fit_are_refused(folder, trained, tmp_path):
    def refused(message, place=folder, **fields):
        with pytest.raises(UserError, match=message) as caught:
            of_run(tmp_path, distill__teacher=str(place), **fields)
        assert "\n" not in str(caught.value)

    refused(
        "^config.distill.teacher: timm:resnet_50: timm has no such model: .*, such as timm:resnet50", "timm:resnet_50"
    )
    refused("^config.distill.teacher: no/such.pth: no such file: give", "no/such.pth")
    unnamed = save(resnet(7).float(), tmp_path / "seven", None)
    refused("seven has 7 classes, whose names are not known, and the model has 10: give a teacher for 10", unnamed)
    animals = save(resnet().float(), tmp_path / "animals", [f"animal {i}" for i in range(10)])
    refused(r"does not know 10 classes of the data \(0, 1, 2, \.\.\.\)", animals)
    refused("config.num_classes: 12 and .* teaches the 10 classes", model=models.build("pcpvt_nano", 12))
    refused("takes images of 3 channels and config.model.in_chans is 1", model=models.build("pcpvt_nano", 10, "pad", 1))
    refused("was trained with config.task=classes and the run has multilabel", trained, task="multilabel")
    vit = save(timm.create_model("test_vit3", num_classes=10), tmp_path / "vit", CLASSES)
    refused(r"vit: for an image of 32x32 px it fails \(AssertionError: .*160.*image size that it takes", vit,
        distill__image_size=32)  # fmt: skip
    assert of_run(tmp_path, distill__teacher=str(vit)).logits(digits()).shape == (6, 10)
    features = save(timm.create_model("test_resnet", num_classes=0), tmp_path / "features", None)
    refused(r"it gives \(1, 96\), not \[1, classes\]", features)
    (tmp_path / "seven" / "model.safetensors").unlink()
    refused("timm cannot read it", unnamed)


def test_named_teachers_of_more_classes_give_the_columns_of_the_datas(tmp_path):
    wide = save(resnet(12).float(), tmp_path / "wide", ["x", *CLASSES, "y"])
    teacher = of_run(tmp_path, distill__teacher=str(wide))
    everything = of_run(tmp_path, distill__teacher=str(save(resnet(12).float(), tmp_path / "plain", None)),
        model=models.build("pcpvt_nano", 12))  # fmt: skip
    assert torch.equal(teacher.logits(digits()), everything.logits(digits())[:, 1:11])


def test_without_a_teacher_nothing_is_stored(trained):
    assert "teacher" not in miniature.newest(trained).meta and distillation.stored(None) == {}
