"""Files that describe themselves are believed: our exports, timm's and Twins' checkpoints, timm's configs."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch
import warm
from foreign import leaves

from pcpvt import api, torchvision_compat  # noqa: F401
from pcpvt.checkpoints import description, foreign, hub
from pcpvt.checkpoints.description import Description
from pcpvt.checkpoints.load import describe
from pcpvt.config.fields import base
from pcpvt.config.resolve import believe
from pcpvt.functional.objective import IMAGENET_MEAN, IMAGENET_STD
from pcpvt.models import pcpvt as models
from pcpvt.models.init import init

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    """The file for timm of the miniature run: 32 px, crop 1, classes 0 to 9."""
    path = tmp_path_factory.mktemp("exported") / "nano.safetensors"
    words = ["--mode=export", f"--config.export.output={path}", f"--workdir={trained}"]
    warm.run(["-m", "pcpvt.main", *words], os.environ, ROOT, timeout=300).check_returncode()
    return path


def test_our_export_is_evaluated_as_the_checkpoint_and_what_is_given_wins_with_a_note(
    pcpvt, trained, exported, tmp_path
):
    words = ["--config=configs/pcpvt_s.py:cpu,digits", "--config.precision=float32", "--mode=eval"]
    done = pcpvt(*words, f"--config.checkpoint={exported}", "--config.image_size=48", f"--workdir={tmp_path}")
    assert f"note: config.image_size: 48 is given; {exported} says 32" in done.stdout
    assert "48x48 px, crop 1, " in done.stdout
    done = pcpvt(*words, f"--config.checkpoint={exported}", f"--workdir={tmp_path}")
    assert "split val: 32x32 px, crop 1, params=float32,compute=float32,output=float32" in done.stdout
    found = json.loads((tmp_path / "result-eval.json").read_text())
    expected = json.loads((trained / "result.json").read_text())
    assert [found[name] for name in ("acc1", "acc5", "loss")] == [expected[n] for n in ("acc1", "acc5", "loss")]
    assert (found["image_size"], found["crop"], found["split"]) == ([32, 32], 1.0, "val")


def test_our_export_is_read_by_predict_export_and_the_api(pcpvt, trained, exported, tmp_path):
    from PIL import Image

    from pcpvt.data import sources

    Image.fromarray(sources.digits("val", (32, 32)).images[0]).resize((80, 60)).save(tmp_path / "a.png")
    said = []
    for weights in (f"--workdir={trained}", f"--config.checkpoint={exported}"):
        words = [f"--config.predict.images={tmp_path / 'a.png'}", "--config.predict.format=jsonl", weights]
        words += [] if weights.startswith("--workdir") else [f"--workdir={tmp_path / 'run'}"]
        done = pcpvt("--mode=predict", "--config=configs/pcpvt_s.py:cpu", "--config.precision=float32", *words)
        assert "32x32 px, crop 1, " in done.stderr
        said.append(done.stdout)
    assert said[0] == said[1]

    again = tmp_path / "again.safetensors"
    words = [f"--config.checkpoint={exported}", f"--config.export.output={again}", f"--workdir={tmp_path / 'run'}"]
    pcpvt("--mode=export", *words)
    first, second = foreign.describe_export(exported), foreign.describe_export(again)
    assert first == second and (first.size, first.crop, first.model) == ((32, 32), 1.0, "pcpvt_nano")
    ours, theirs = api.load(trained), api.load(again)
    assert (ours.size, ours.crop, ours.classes) == (theirs.size, theirs.crop, theirs.classes)


def test_a_value_of_a_wrong_type_is_as_if_it_were_missing():
    said = {"model": "pcpvt_s", "image_size": [64, 96], "crop": 0.9, "classes": ["a", "b"], "mean": [0.5] * 3}
    assert description.from_export(said) == Description("pcpvt_s", (64, 96), 0.9, ["a", "b"], (0.5, 0.5, 0.5))
    for value in (None, 3, "x", [], {}, [1, "x"], [True, True], float("nan"), ["a", "a"], [-1, 3], 1e9):
        for name in said:
            assert description.from_export({name: value}) == Description(), (name, value)
        assert description.from_export(value) == Description()
        assert description.from_timm({"input_size": value, "mean": value, "label_names": value}) == Description()


def test_training_scripts_say_the_size_in_their_arguments(tmp_path):
    for args, size in (({"input_size": 192}, (192, 192)), ({"input_size": (3, 64, 96)}, (64, 96)), ({}, None)):
        saved = {"model": leaves(), "args": argparse.Namespace(**args, lr=1.0), "classes": ["a", "b", "c"]}
        torch.save(saved, tmp_path / "a.pth")
        said = foreign.read(tmp_path / "a.pth").said
        assert said.size == size and said.classes == ["a", "b", "c"]


def test_timm_says_size_crop_and_normalisation_and_the_model_of_unnamed_files_is_told_by_their_layers(tmp_path):
    said = hub.describe("timm:twins_pcpvt_base")
    assert (said.model, said.size, said.crop, said.mean) == ("pcpvt_b", (224, 224), 0.9, IMAGENET_MEAN)
    safetensors.torch.save_file(init(models.build("pcpvt_nano", 3), 0), tmp_path / "a.safetensors")
    assert describe(str(tmp_path / "a.safetensors")) == Description("pcpvt_nano")


def test_another_normalisation_goes_into_the_first_layer():
    """In float64, the logits of a model whose own mean and std were given are those of the rewritten parameters."""
    model = models.build("pcpvt_nano", 3)
    params = {name: value.double() for name, value in init(model, 0).items()}
    pixels = torch.randint(0, 256, (2, 32, 32, 3), generator=torch.Generator().manual_seed(0)) / 255
    mean, std = (0.5, 0.4, 0.3), (0.25, 0.5, 0.2)
    tensors = [torch.tensor(values, dtype=torch.float64) for values in (mean, std, IMAGENET_MEAN, IMAGENET_STD)]
    expected = models.apply(model, params, (pixels.double() - tensors[0]) / tensors[1])
    changed, notes = description.renormalise(params, Description(mean=mean, std=std))
    found = models.apply(model, changed, (pixels.double() - tensors[2]) / tensors[3])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert "mean 0.5, 0.4, 0.3" in notes[0]
    same, notes = description.renormalise(params, Description(mean=IMAGENET_MEAN, std=IMAGENET_STD))
    assert same is params and notes == []


def test_a_training_takes_model_and_size_and_lists_every_difference():
    config = base()
    config.layer_decay = 0.83  # the recipe finetune's for S
    said = Description("pcpvt_b", (64, 96), 0.9).fields()
    notes = believe(config, said, {"image_width": 64}, "FILE", "train")
    assert (config.model.name, config.image_size, config.eval.crop, config.layer_decay) == ("pcpvt_b", 64, 0.875, 0.9)
    assert notes == [
        "config.model.name: pcpvt_b, as FILE says; the recipe has pcpvt_s",
        "config.image_size: 64, as FILE says; the recipe has 224",
        "config.image_width: 64 is given; FILE says 96",
        "config.eval.crop: 0.875 is the recipe's; FILE says 0.9",
    ]
    config = base()
    assert believe(config, said, {"image_size": 48}, "FILE") == ["config.image_size: 48 is given; FILE says 64"]
    assert config.image_width is None and config.eval.crop == 0.9
