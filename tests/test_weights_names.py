"""Parameter names of wrappers and of mmpretrain, and models of the Hugging Face hub."""

from __future__ import annotations

import json
import re

import pytest
import safetensors.torch
import torch
from foreign import assert_same, refused

from pcpvt import torchvision_compat  # noqa: F401
from pcpvt.checkpoints import foreign
from pcpvt.checkpoints.load import describe, load_model
from pcpvt.models import pcpvt as models
from pcpvt.models.init import init


def nano() -> models.Params:
    return init(models.build("pcpvt_nano", 3), 0)


def mmpretrain(params: models.Params) -> models.Params:
    """Under the names of mmpretrain's ImageClassifier with backbone PCPVT and head LinearClsHead."""
    renamed = {}
    for name, value in params.items():
        if name.startswith("head."):
            renamed[name.replace("head.", "head.fc.")] = value
            continue
        name = re.sub(r"^(patch_embeds\.\d)\.proj\.", r"\1.projection.", name)
        name = re.sub(r"^pos_block\.(\d)\.proj\.0\.", r"position_encodings.\1.proj.", name)
        name = re.sub(r"^blocks\.", "stages.", name).replace("mlp.fc1", "ffn.layers.0.0").replace("fc2", "layers.1")
        name = name.replace("mlp.layers.1", "ffn.layers.1")
        renamed["backbone." + re.sub(r"^norm\.", "norm_after_stage3.", name)] = value
    return renamed


@pytest.mark.parametrize(
    ("backbone", "head"),
    [
        ("timm_model.", "timm_model."),
        ("backbone.", ""),
        ("backbone.", "backbone."),
        ("net.encoder.", "net."),
        ("module.model.backbone.", "module.model."),
        ("state.my_model.", "state.my_model."),
    ],
)
def test_prefixes_of_wrappers_are_mapped(tmp_path, backbone, head):
    named = {(head if name.startswith("head.") else backbone) + name: value for name, value in nano().items()}
    torch.save({"state_dict": named}, tmp_path / "a.pth")
    assert_same(foreign.read(tmp_path / "a.pth").params, nano())


def test_mmpretrains_layout_is_mapped(tmp_path):
    torch.save({"meta": {"epoch": 3}, "state_dict": mmpretrain(nano())}, tmp_path / "a.pth")
    found = load_model(tmp_path / "a.pth")
    assert found.model.num_classes == 3 and set(mmpretrain(nano())).isdisjoint(nano())
    assert_same(dict(found.params), nano())


def test_layers_of_several_models_are_refused(tmp_path):
    named = {f"{prefix}.{name}": value for prefix in ("student", "teacher") for name, value in nano().items()}
    torch.save(named, tmp_path / "a.pth")
    refused(tmp_path / "a.pth", words=("several models (student.*, teacher.*)", "save the tensors of one"))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache of the hub with one repository; returns a function that fills it."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def fill(config: dict, files: dict) -> str:
        root = tmp_path / "hub" / "models--someone--net"
        (root / "refs").mkdir(parents=True)
        (root / "refs" / "main").write_text("0" * 40)
        snapshot = root / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text(json.dumps(config))
        for name, tensors in files.items():
            save = safetensors.torch.save_file if name.endswith(".safetensors") else torch.save
            save(tensors, snapshot / name)
        return "hf-hub:someone/net"

    return fill


CONFIG = {
    "architecture": "twins_pcpvt_small", "num_classes": 3, "label_names": ["cat", "dog", "eel"],
    "pretrained_cfg": {"input_size": [3, 192, 192], "crop_pct": 0.95, "mean": [0.5] * 3, "std": [0.5] * 3},
}  # fmt: skip


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_model_of_the_hub_is_read_with_its_description(hub, file):
    params = init(models.build("pcpvt_s", 3), 0)
    name = hub(CONFIG, {file: params})
    assert describe(name).fields() == {
        "model.name": "pcpvt_s", "image_size": 192, "image_width": None, "eval.crop": 0.95
    }  # fmt: skip
    found = load_model(name)
    assert found.classes == ["cat", "dog", "eel"] and found.path == name
    changed = {n for n, value in params.items() if not torch.equal(value, found.params[n])}
    assert changed == {"patch_embeds.0.proj.weight", "patch_embeds.0.proj.bias"}
    assert any(note.startswith("normalisation: mean 0.5, 0.5, 0.5") for note in found.notes)


def test_what_the_hub_lacks_is_one_line(hub):
    name = hub({**CONFIG, "architecture": "resnet50"}, {})
    for call in (foreign.read, describe):
        with pytest.raises(foreign.UserError, match="is resnet50, no Twins-PCPVT") as caught:
            call(name)
        assert "\n" not in str(caught.value)
    refused("hf-hub:someone/nothing", words=("could not fetch it", "network"))
