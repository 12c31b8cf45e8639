"""Weights files of other programs: one without weights, truncated or changed is an error of one line with a remedy."""

from __future__ import annotations

import struct
import zipfile

import numpy
import pytest
import safetensors.torch
import torch
from foreign import assert_same, leaves, ours, refused, twins

from pcpvt.checkpoints import foreign
from pcpvt.errors import UserError, one_line


def test_missing_folder_and_empty_files_are_one_line(tmp_path):
    refused(tmp_path / "none.pth", words=("no such file", "timm:NAME"))
    refused(tmp_path, words=("folder",))
    (tmp_path / "empty.pth").touch()
    refused(tmp_path / "empty.pth", words=("empty",))


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors", "ours"])
def test_truncated_files_are_one_line(tmp_path, kind):
    path = tmp_path / f"a.{'safetensors' if kind in ('safetensors', 'ours') else 'pth'}"
    if kind == "safetensors":
        safetensors.torch.save_file(leaves(), path)
    elif kind == "ours":
        path = ours(tmp_path, "params", "ema")
    else:
        torch.save(twins(leaves()), path, _use_new_zipfile_serialization=kind == "zip")
    data = path.read_bytes()
    foreign.read(path)
    for kept in [*range(1, 40), *range(40, len(data), max(1, len(data) // 60)), len(data) - 1]:
        path.write_bytes(data[:kept])
        refused(path)


@pytest.mark.parametrize("new_format", [True, False])
def test_flipped_bytes_never_crash_and_never_change_weights_of_a_zip(tmp_path, new_format):
    path = tmp_path / "a.pth"
    torch.save(twins(leaves()), path, _use_new_zipfile_serialization=new_format)
    data, draws = path.read_bytes(), numpy.random.default_rng(0)
    for place in draws.integers(len(data), size=150):
        path.write_bytes(data[:place] + bytes([data[place] ^ int(draws.integers(1, 256))]) + data[place + 1 :])
        try:
            params = foreign.read(path).params
        except UserError as error:
            assert "\n" not in str(error)
        else:
            if new_format:  # the old format has no checksum, so a changed number cannot be noticed
                assert_same(params, leaves())


@pytest.mark.parametrize(
    "data", [b"<!DOCTYPE html><html>", b"version https://git-lfs.github.com/spec/v1\n", b"x", b"\0" * 99]
)
def test_downloaded_web_pages_and_lfs_pointers_are_refused(tmp_path, data):
    (tmp_path / "a.pth").write_bytes(data)
    refused(tmp_path / "a.pth", words=("neither a PyTorch nor a safetensors file",))


@pytest.mark.parametrize("data", [struct.pack("<Q", 2**62) + b"{}", struct.pack("<Q", 4) + b"{\xff\xff}"])
def test_safetensors_with_a_false_header_are_refused(tmp_path, data):
    (tmp_path / "a.safetensors").write_bytes(data)
    refused(tmp_path / "a.safetensors", words=("safetensors", "get it again"))


@pytest.mark.parametrize(
    ("tree", "word"),
    [
        (torch.ones(2), "holds a Tensor"), ([torch.ones(2)], "holds a list"), ({}, "no tensors"),
        ({"net": {"norm.weight": torch.ones(2)}}, "net is of type dict"), ({1: torch.ones(2)}, "has no name"),
        ({"a\x1b[31m\nb": 3}, "is of type int"), ({"a": torch.ones(2).to_sparse()}, "sparse"),
        ({"a": torch.ones(2, device="meta")}, "without data"), ({"a": numpy.ones(3)}, "is a numpy value"),
        ({"model": {}}, "model is of type dict"),
    ],
)  # fmt: skip
def test_trees_without_weights_are_one_line(tmp_path, tree, word):
    torch.save(tree, tmp_path / "a.pth")
    refused(tmp_path / "a.pth", words=(word,))


def test_zip_that_torch_did_not_write_is_refused(tmp_path):
    torch.save(leaves(), tmp_path / "a.pth")
    with (
        zipfile.ZipFile(tmp_path / "a.pth") as old,
        zipfile.ZipFile(tmp_path / "b.pth", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    refused(tmp_path / "b.pth", words=("compressed zip",))
    with zipfile.ZipFile(tmp_path / "c.pth", "w") as other:
        other.writestr("readme.txt", "hello")
    refused(tmp_path / "c.pth", words=("cannot be read",))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_refused_with_the_remedy(tmp_path):
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), str(tmp_path / "a.pt"))
    refused(tmp_path / "a.pt", words=("TorchScript", "state_dict()"))


def test_messages_print_no_control_characters():
    assert one_line("a\x1b[31mb\nc") == "a?[31mb"
    assert len(one_line("x" * 1000)) == 160
