"""Weights from timm by name, and files for timm, written atomically."""

from __future__ import annotations

import os

import pytest
import safetensors
import torch
from foreign import assert_same, leaves, refused

from pcpvt import torchvision_compat  # noqa: F401
from pcpvt.checkpoints import foreign
from pcpvt.checkpoints.load import match_params
from pcpvt.errors import UserError


def test_unknown_timm_names_and_schemes_are_refused_with_the_known_ones():
    for name in ("timm:no_such_model", "timm:hf-hub:someone/something", "timm:local-dir:/tmp", "timm:"):
        refused(name, words=("timm:twins_pcpvt_small", "timm:twins_pcpvt_large"))
    refused("timm:twins_pcpvt_small", which="ema", words=("no EMA",))


def test_failing_download_is_one_line(monkeypatch):
    import timm

    def offline(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(timm, "create_model", offline)
    refused("timm:twins_pcpvt_small", words=("ConnectionError: no route", "network"))


@pytest.fixture(scope="module")
def small() -> torch.nn.Module:
    import timm

    return timm.create_model("twins_pcpvt_small", num_classes=7).eval()


def test_timm_name_gives_what_timm_fetched(monkeypatch, small):
    import timm

    asked = []
    monkeypatch.setattr(timm, "create_model", lambda name, **kwargs: asked.append((name, kwargs)) or small)
    weights = foreign.read("timm:twins_pcpvt_small.in1k")
    assert asked == [("twins_pcpvt_small.in1k", {"pretrained": True})]
    assert_same(weights.params, small.state_dict())
    assert weights.which == "params"


def test_written_file_gives_timm_equal_logits(tmp_path, small):
    import timm

    params = {name: value.detach() for name, value in small.named_parameters()}
    path = tmp_path / "out.safetensors"
    foreign.write_timm(params, path, {"classes": "[]"})
    assert list(tmp_path.iterdir()) == [path]
    theirs = timm.create_model("twins_pcpvt_small", num_classes=7, checkpoint_path=str(path)).eval()
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(theirs(image), small(image), rtol=0, atol=0)
    shapes = {name: value.shape for name, value in params.items()}
    found, notes = match_params(foreign.read(path).params, shapes, path=path, exact=True)
    assert_same(found, params)
    assert notes == []


def test_written_file_takes_views_and_keeps_metadata(tmp_path):
    flat = torch.arange(8.0)
    params = {"norm.weight": flat[:4], "norm.bias": flat[4:], "head.weight": flat.view(2, 4).T}
    foreign.write_timm(params, tmp_path / "a.safetensors", {"note": "hello"})
    assert_same(foreign.read(tmp_path / "a.safetensors").params, params)
    with safetensors.safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "note": "hello"}


def test_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    foreign.write_timm(leaves(0), path)

    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device") as caught:
        foreign.write_timm(leaves(1), path)
    assert str(path) in str(caught.value)
    assert list(tmp_path.iterdir()) == [path]
    assert_same(foreign.read(path).params, leaves(0))


def test_file_is_flushed_before_it_gets_its_name_and_the_folder_after(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    is_folder = lambda number: os.path.isdir(f"/proc/self/fd/{number}")  # noqa: E731
    monkeypatch.setattr(os, "fsync", lambda n: (calls.append("folder" if is_folder(n) else "file"), fsync(n)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("rename"), replace(a, b)))
    foreign.write_timm(leaves(), tmp_path / "a.safetensors")
    assert calls == ["file", "rename", "folder"]


def test_names_and_folders_that_cannot_work_are_refused_before_writing(tmp_path):
    for path in (tmp_path / "a.pth", tmp_path / "none" / "a.safetensors"):
        with pytest.raises(UserError, match=path.name):
            foreign.write_timm(leaves(), path)
    assert list(tmp_path.iterdir()) == []
