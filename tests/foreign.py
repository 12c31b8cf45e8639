"""Weights files as pcpvt and other programs write them, and assertions for tests of reading them."""

from __future__ import annotations

import argparse
import collections
import pathlib

import pytest
import torch

from pcpvt.checkpoints import checkpoint, foreign
from pcpvt.errors import UserError


def leaves(seed: int = 0) -> dict[str, torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    shapes = {
        "norm.weight": (4,),
        "blocks.0.0.attn.q.weight": (4, 4),
        "head.weight": (3, 4),
        "head.bias": (3,),
    }
    return {name: torch.randn(shape, generator=source) for name, shape in shapes.items()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)


def refused(path: object, *, which: str = "params", words: tuple[str, ...] = ()) -> str:
    with pytest.raises(UserError) as caught:
        foreign.read(path, which=which)
    message = str(caught.value)
    assert "\n" not in message and "\x1b" not in message
    assert str(path) in message
    for word in words:
        assert word in message, message
    return message


def twins(params: dict[str, torch.Tensor], **more: object) -> dict[str, object]:
    """The contents of a checkpoint of the Twins authors' script."""
    momentum = {0: {"step": 7, "exp_avg": torch.ones(4)}}
    args = argparse.Namespace(lr=5e-4, device=torch.device("cuda"), nested=argparse.Namespace(model="pcpvt_small_v0"))
    saved = {"model": collections.OrderedDict(params), "optimizer": {"state": momentum}, "epoch": 299}
    return {**saved, "lr_scheduler": {"base_values": [5e-4], "_step": None}, "args": args, **more}


def ours(folder: pathlib.Path, *groups: str) -> pathlib.Path:
    tensors = {f"{g}/{name}": value for i, g in enumerate(groups) for name, value in leaves(i).items()}
    return checkpoint.save(folder, tensors, {"step": 3400, "classes": ["cat", "dog", "eel"]})
