"""Weights files of other programs: all usual formats and wrappers; each refusal is one line with a remedy."""

from __future__ import annotations

import argparse
import pathlib

import numpy
import pytest
import safetensors.torch
import torch
from foreign import assert_same, leaves, ours, refused, twins

from pcpvt.checkpoints import foreign, tensorfile


@pytest.mark.parametrize("new_format", [True, False])
def test_checkpoint_of_the_twins_authors_is_read_in_both_formats(tmp_path, new_format):
    path = tmp_path / "pcpvt_small.pth"
    torch.save(twins(leaves()), path, _use_new_zipfile_serialization=new_format)
    weights = foreign.read(str(path))
    assert_same(weights.params, leaves())
    assert (weights.which, weights.classes, weights.notes, weights.meta) == ("params", None, [], {})


@pytest.mark.parametrize("new_format", [True, False])
def test_unusual_values_in_the_saved_arguments_do_not_prevent_reading(tmp_path, new_format):
    odd = argparse.Namespace(
        output=pathlib.Path("/tmp/out"), pure=pathlib.PureWindowsPath("c:/x"), lr=numpy.float64(1e-3),
        count=numpy.int32(3), table=numpy.arange(3.0), device=torch.device("cpu"), dtype=torch.float16,
    )  # fmt: skip
    path = tmp_path / "odd.pth"
    torch.save(twins(leaves(), args=odd, best=numpy.float32(81.2)), path, _use_new_zipfile_serialization=new_format)
    assert_same(foreign.read(path).params, leaves())


def test_plain_state_dicts_and_parameters_are_read(tmp_path):
    parameters = {name: torch.nn.Parameter(value) for name, value in leaves().items()}
    torch.save(parameters, tmp_path / "timm.pt")
    params = foreign.read(tmp_path / "timm.pt").params
    assert_same(params, leaves())
    assert all(type(value) is torch.Tensor and not value.requires_grad for value in params.values())


@pytest.mark.parametrize("name", ["timm.safetensors", "misnamed.pth"])
def test_safetensors_are_recognised_by_content(tmp_path, name):
    safetensors.torch.save_file(leaves(), tmp_path / name, {"format": "pt"})
    weights = foreign.read(tmp_path / name)
    assert_same(weights.params, leaves())
    assert weights.classes is None and weights.meta == {}


# safetensors 0.5 cannot write the four left out.
@pytest.mark.parametrize("name", sorted(tensorfile.DTYPES.keys() - {"C64", "U64", "U32", "U16"}))
def test_every_dtype_of_safetensors_is_read_to_the_bit(tmp_path, name):
    value = torch.arange(8, dtype=torch.uint8).remainder(2).view(tensorfile.DTYPES[name]).reshape(1, -1)
    safetensors.torch.save_file({"norm.weight": value, "empty": value[:0]}, tmp_path / "a.safetensors")
    with safetensors.safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert file.get_slice("norm.weight").get_dtype() == name
    params = foreign.read(tmp_path / "a.safetensors").params
    assert params["empty"].shape == (0, value.shape[1])
    assert params["norm.weight"].dtype == value.dtype
    assert torch.equal(params["norm.weight"].view(torch.uint8), value.view(torch.uint8))


@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "_orig_mod.",
        "model.",
        "module._orig_mod.",
        "_orig_mod.module.model.",
        "model.model.module.",
    ],
)
def test_wrapper_prefixes_are_dropped_in_any_nesting(tmp_path, prefix):
    torch.save({"state_dict": {prefix + name: value for name, value in leaves().items()}}, tmp_path / "a.pth")
    assert_same(foreign.read(tmp_path / "a.pth").params, leaves())


def test_prefixes_of_separately_compiled_blocks_are_dropped(tmp_path):
    state = {name.replace("blocks.0.0.", "blocks.0.0._orig_mod."): value for name, value in leaves().items()}
    torch.save(state, tmp_path / "a.pth")
    assert_same(foreign.read(tmp_path / "a.pth").params, leaves())


def test_two_models_under_different_prefixes_are_refused(tmp_path):
    torch.save({"norm.weight": torch.ones(2), "module.norm.weight": torch.zeros(2)}, tmp_path / "a.pth")
    refused(tmp_path / "a.pth", words=("norm.weight", "twice"))


@pytest.mark.parametrize("entry", ["model_ema", "state_dict_ema", "ema"])
def test_ema_is_taken_only_when_asked_for_and_noted_otherwise(tmp_path, entry):
    path = tmp_path / "a.pth"
    torch.save(twins(leaves(0), **{entry: leaves(1)}), path)
    raw = foreign.read(path)
    assert_same(raw.params, leaves(0))
    assert raw.which == "params" and len(raw.notes) == 1 and entry in raw.notes[0]
    ema = foreign.read(path, which="ema")
    assert_same(ema.params, leaves(1))
    assert ema.which == "ema" and ema.notes == []


def test_nested_wrappers_are_opened(tmp_path):
    inner = {
        "model": leaves(0),
        "ema": {"module": {"module." + k: v for k, v in leaves(1).items()}, "decay": 0.9},
    }
    torch.save({"epoch": 3, "state_dict": inner}, tmp_path / "a.pth")
    raw = foreign.read(tmp_path / "a.pth")
    assert_same(raw.params, leaves(0))
    assert len(raw.notes) == 1 and "(ema)" in raw.notes[0]
    ema = foreign.read(tmp_path / "a.pth", which="ema")
    assert_same(ema.params, leaves(1))
    assert ema.which == "ema" and ema.notes == []


def test_missing_ema_is_an_error_that_lists_the_entries(tmp_path):
    torch.save(twins(leaves(), model_ema=None), tmp_path / "a.pth")
    refused(tmp_path / "a.pth", which="ema", words=("args, epoch, lr_scheduler, model, model_ema, optimizer",))
    torch.save(leaves(), tmp_path / "b.pth")
    refused(tmp_path / "b.pth", which="ema", words=("only params",))
    safetensors.torch.save_file(leaves(), tmp_path / "c.safetensors")
    refused(tmp_path / "c.safetensors", which="ema", words=("only params",))


def test_file_with_ema_alone_says_so(tmp_path):
    torch.save({"model_ema": leaves()}, tmp_path / "a.pth")
    refused(tmp_path / "a.pth", words=("EMA weights only", "model_ema"))


def test_our_own_checkpoint_gives_params_ema_step_and_class_names(tmp_path):
    path = ours(tmp_path, "params", "ema", "opt/mu")
    raw = foreign.read(path)
    assert_same(raw.params, leaves(0))
    assert raw.meta["step"] == 3400
    assert raw.classes == ["cat", "dog", "eel"] and "EMA" in raw.notes[0]
    for which in ("ema", "auto"):
        ema = foreign.read(path, which=which)
        assert_same(ema.params, leaves(1))
        assert ema.which == "ema" and ema.notes == []


def test_our_own_checkpoint_without_ema_says_what_it_holds(tmp_path):
    path = ours(tmp_path, "params", "opt/mu")
    assert foreign.read(path).notes == []
    refused(path, which="ema", words=("only opt, params",))


def test_our_own_checkpoint_with_a_changed_number_is_refused(tmp_path):
    path = ours(tmp_path, "params", "opt/mu")
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    refused(path, words=("checksum",))


@pytest.mark.parametrize("text", ["1", "", "[" * 100_000, '{"format": 1, "step": "x", "digest": 3}'])
def test_invalid_metadata_of_a_checkpoint_is_one_line(tmp_path, text):
    tensors = {f"params/{name}": value for name, value in leaves().items()}
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors", {"pcpvt": text})
    refused(tmp_path / "a.safetensors")


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_weights_outlive_the_file(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    torch.save(leaves(), path) if kind == "pth" else safetensors.torch.save_file(leaves(), path)
    params = foreign.read(path).params
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert_same(params, leaves())
