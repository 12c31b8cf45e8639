"""The folder of `export.format=hub`: timm, Transformers and pcpvt itself load it with equal logits, offline."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import miniature
import pytest
import torch
import yaml

from pcpvt import torchvision_compat  # noqa: F401
from pcpvt.checkpoints import checkpoint
from pcpvt.checkpoints.load import describe, load_model, trained_config
from pcpvt.config import licences, recipes
from pcpvt.errors import UserError
from pcpvt.export import folders, hub
from pcpvt.export import run as export
from pcpvt.export.formats import Request
from pcpvt.models import pcpvt as models
from pcpvt.models.init import init
from pcpvt.runtime import session as sessions

CLASSES = ["cat", "dog", "eel"]


def params(in_chans: int = 3) -> models.Params:
    source = torch.Generator().manual_seed(0)
    initial = init(models.build("pcpvt_s", 3, in_chans=in_chans), 0)
    return {n: v + 0.1 * torch.randn(v.shape, generator=source) * (v.ndim == 1) for n, v in initial.items()}


def exported(workdir, **fields):
    """Exports a checkpoint of S with three classes, trained at 64 x 96 px."""
    channels = fields.get("model.in_chans", 3)
    config = recipes.from_arg("cpu,folder", "pcpvt_s", 0.1)
    size = {"image_size": 64, "image_width": 96, "eval.crop": 0.9, "export.format": "hub"}
    config.update_from_flattened_dict({**size, "data.path": "/secret/place/pets", **fields})
    meta = {"step": 5, "model": "pcpvt_s", "classes": CLASSES, "examples": 77}
    meta["config"] = {"lr": 0.25, "model.name": "pcpvt_s", "data.path": "/secret/place/pets", "mixup": 0.5}
    meta["config"] |= {"optimizer": "muon", "finetune": "/secret/place/start.pth", "device": "cpu", "timeout": 5}
    meta["metrics"] = {"acc1": 87.5, "loss": 0.25, "seen": 40, "acc1_raw": 80.0, "loss_raw": 0.5}
    tensors = {f"params/{n}": v for n, v in params(channels).items()}
    path = checkpoint.save(workdir / "c", tensors, meta)
    config.update_from_flattened_dict({"checkpoint": str(path)})
    assert export.run(sessions.start(config, workdir)) == 0
    return workdir / "export" / "pcpvt_s-hub"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return exported(tmp_path_factory.mktemp("hub"), **{"export.license": "CC-BY-4.0"})


@pytest.fixture(scope="module")
def case():
    images = torch.randn((2, 3, 64, 96), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return images, models.apply(models.build("pcpvt_s", 3), params(), images.permute(0, 2, 3, 1))


def assert_close(logits, wanted):
    torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-5)


def test_timm_loads_the_folder_with_equal_logits_and_its_preprocessing(folder, case):
    import timm

    network = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        assert_close(network(case[0]), case[1])
    data = timm.data.resolve_model_data_config(network)
    assert list(data["input_size"]) == [3, 64, 96]
    assert data["crop_pct"] == 0.9 and data["interpolation"] == "bicubic" and data["crop_mode"] == "center"
    assert tuple(data["mean"]) == (0.485, 0.456, 0.406) and tuple(data["std"]) == (0.229, 0.224, 0.225)
    assert network.pretrained_cfg["label_names"] == CLASSES and network.pretrained_cfg["license"] == "cc-by-4.0"


def test_transformers_loads_the_folder_with_equal_logits_and_class_names(folder, case, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers = pytest.importorskip("transformers", reason="Transformers is not installed")
    network = transformers.TimmWrapperForImageClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        assert_close(network(case[0]).logits, case[1])
    assert network.config.id2label == dict(enumerate(CLASSES))
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    assert processor.data_config["crop_pct"] == 0.9


def test_pcpvt_reads_the_folder_back(folder):
    loaded = load_model(folder)
    torch.testing.assert_close(loaded.params, params(), rtol=0, atol=0)
    assert loaded.classes == CLASSES
    said = describe(str(folder))
    assert said == loaded.said._replace(value_range=None)
    assert (said.model, said.size, said.crop, said.channels) == ("pcpvt_s", (64, 96), 0.9, 3)
    assert trained_config(str(folder), [], folder) == (None, str(folder))


@pytest.fixture
def pets(tmp_path):
    """A folder of noise images of cats and eels."""
    images = miniature.image_folder(tmp_path / "data", per_class=4)
    shutil.move(images / "val" / "dog", images / "val" / "eel")
    shutil.move(images / "train" / "dog", images / "train" / "eel")
    return images


def test_an_evaluation_takes_the_folder(folder, pets, tmp_path, pcpvt):
    words = ["--config=configs/pcpvt_s.py:cpu,folder", f"--config.data.path={pets}"]
    done = pcpvt("--mode=eval", *words, f"--config.checkpoint={folder}", f"--workdir={tmp_path / 'e'}")
    result = json.loads((tmp_path / "e" / "result-eval.json").read_text())
    assert result["image_size"] == [64, 96] and result["crop"] == 0.9
    assert "2 of the model's 3 are matched by name" in done.stdout


@pytest.mark.slow  # another reader of the weights: test_pcpvt_reads_the_folder_back
def test_finetuning_takes_the_folder(folder, pets, tmp_path, pcpvt):
    words = ["--config=configs/pcpvt_s.py:cpu,folder", f"--config.data.path={pets}", f"--config.finetune={folder}"]
    words += ["--config.steps=1", "--config.batch_size=2", "--config.eval_every=0"]
    done = pcpvt(*words, f"--workdir={tmp_path / 'f'}")
    assert "2 of 2 classes are taken by name from the file's 3" in done.stdout


def test_config_json_has_the_last_word_and_another_normalisation_goes_into_the_weights(folder, tmp_path):
    import timm

    other = shutil.copytree(folder, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["pretrained_cfg"] |= {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "crop_pct": 0.8}
    config["label_names"] = ["a", "b", "c"]
    (other / "config.json").write_text(json.dumps(config))
    loaded = load_model(other)
    assert loaded.classes == ["a", "b", "c"] and loaded.said.crop == 0.8
    pixels = torch.randint(0, 256, (1, 64, 96, 3), generator=torch.Generator().manual_seed(1)) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    network = timm.create_model(f"local-dir:{other}", pretrained=True).eval()
    with torch.no_grad():
        ours = models.apply(loaded.model, loaded.params, (pixels - mean) / std)
        torch.testing.assert_close(ours, network(((pixels - 0.5) / 0.5).permute(0, 3, 1, 2)), rtol=1e-4, atol=1e-4)


def test_grey_models_too(tmp_path):
    import timm

    grey = exported(tmp_path, **{"model.in_chans": 1})
    images = torch.randn((2, 1, 64, 96), generator=torch.Generator().manual_seed(1))
    network = timm.create_model(f"local-dir:{grey}", pretrained=True).eval()
    with torch.no_grad():
        expected = models.apply(models.build("pcpvt_s", 3, in_chans=1), params(1), images.permute(0, 2, 3, 1))
        assert_close(network(images), expected)
    assert describe(str(grey)).channels == 1
    assert json.loads((grey / "config.json").read_text())["model_args"] == {"in_chans": 1}, (
        "Transformers reads this one"
    )


def test_a_head_larger_than_the_data_has_a_name_for_every_output(tmp_path):
    config = recipes.from_arg("cpu,folder", "pcpvt_nano", 0.0)
    said = {"classes": CLASSES, "labels": [*CLASSES, "3", "4"], "image_size": [64, 64]}
    said |= dict.fromkeys(("interpolation", "crop", "mean", "std"))
    loaded = SimpleNamespace(model=models.build("pcpvt_nano", 5))
    found = hub.describe(Request(sessions.start(config, tmp_path), tmp_path, loaded, {}, said), "twins_pcpvt_small")
    assert found["label_names"] == [*CLASSES, "3", "4"] and found["num_classes"] == 5


def test_the_card_says_data_recipe_metrics_and_licence_and_no_path(folder):
    text = (folder / "README.md").read_text()
    _, header, card = text.split("---\n", 2)
    header = yaml.safe_load(header)
    assert header["license"] == "cc-by-4.0" and header["library_name"] == "timm"
    assert header["pipeline_tag"] == "image-classification"
    assert "Trained on pets. 77 training images. 3 classes: `cat`, `dog`, `eel`." in card
    assert "Step 5 of a training with Muon and AdamW:" in card and "\nlr: 0.25\n" in card and "\nmixup: 0.5\n" in card
    assert "\nfinetune: start.pth\n" in card and "timeout" not in card
    assert "| top-1 accuracy, % | 80 |" in card, "the metrics of the params, not of the average"
    assert "secret" not in text and str(folder) not in text


def test_a_folder_is_replaced_unless_something_in_it_was_added_or_changed(folder, tmp_path):
    new = tmp_path / "run" / "new"
    ours = shutil.copytree(folder, tmp_path / "ours")

    shutil.copytree(folder, new)
    (new / folders.MANIFEST).unlink()
    (new / "config.json").write_text("{}")
    folders.replace(new, ours)
    assert (ours / "config.json").read_text() == "{}"
    assert set(json.loads((ours / folders.MANIFEST).read_text())["files"]) == {
        "config.json", "model.safetensors", "README.md"
    }  # fmt: skip
    (ours / "README.md").write_text("my own card")
    with pytest.raises(UserError, match=r"README.md was changed since its export"):
        folders.check(ours)
    shutil.copy(folder / "README.md", ours)
    (ours / "notes.txt").touch()
    with pytest.raises(UserError, match=r"holds notes.txt, which no export wrote"):
        folders.check(ours)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="a file or a link"):
        folders.check(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    folders.check(tmp_path / "empty")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model.name": "pcpvt_nano"}, "timm has no model like pcpvt_nano"),
        ({"image_width": 100}, "64x100 px: timm's model computes other logits"),
        ({"export.dynamic_size": True}, "have no size"),
        ({"export.output": "/proc/x/y"}, "choose another folder"),
    ],
)
def test_an_invalid_request_is_one_line(tmp_path, fields, message):
    config = recipes.from_arg("cpu,folder", "pcpvt_s", 0.0)
    name = fields.get("model.name", "pcpvt_s")
    torch.save(init(models.build(name, 3), 0), tmp_path / "w.pth")
    config.update_from_flattened_dict({"image_size": 64, "export.format": "hub", "checkpoint": str(tmp_path / "w.pth")})
    config.update_from_flattened_dict(fields)
    with pytest.raises(UserError, match=message) as caught:
        export.run(sessions.start(config, tmp_path))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "export").exists() or list((tmp_path / "export").iterdir()) == []


@pytest.mark.parametrize(("config", "message"), [
    ({"architecture": "resnet50"}, "is resnet50, no Twins-PCPVT"),
    ({"architecture": "twins_pcpvt_small"}, "holds config.json, but neither"),
])  # fmt: skip
def test_another_folder_is_one_line(tmp_path, config, message):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        load_model(tmp_path)


def test_licences():
    assert licences.parse("MIT") == licences.Licence("mit")
    assert licences.parse("My Terms=https://example.org/terms") == licences.Licence(
        "other", "My Terms", "https://example.org/terms"
    )
    assert licences.check("") == ""
    assert licences.check("Apache 2.0") == "'Apache 2.0' is no licence that the hub knows: did you mean apache-2.0?"
    assert "NAME=URL" in licences.check("qqqq")
