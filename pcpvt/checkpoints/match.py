"""Matches weights to a model by names and shapes; an error lists the differences and says what to do."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor

from pcpvt.errors import UserError, one_line
from pcpvt.models.pcpvt import SPECS

FAMILY = {spec.depths: name for name, spec in SPECS.items()}  # blocks per stage: model
_HEAD = ("head.weight", "head.bias")
_MAX_LISTED = 10


def match_params(
    weights: Mapping[str, Tensor],
    expected: Mapping[str, Tensor | torch.Size],
    *,
    head: str = "replace",
    fresh: Collection[str] = (),
    path: object,
) -> tuple[dict[str, Tensor], list[str]]:
    """The weights in the order of `expected`, and notes for the log.

    16-bit weights are widened to float32, which is exact; float64 stays.

    Args:
        expected: the model's parameters, or their shapes.
        head: "replace" leaves the head out when its class count differs or the file has none, so that the caller
            keeps a fresh one; "exact" wants every parameter.
        fresh: names to leave out, whatever the file has.
        path: for errors.

    Raises:
        UserError: lists at most ten missing, unexpected and misshapen parameters and says what to do.
    """
    assert head in ("replace", "exact"), head
    shapes = {name: tuple(value.shape if isinstance(value, Tensor) else value) for name, value in expected.items()}
    notes, skipped = [], frozenset(fresh)
    if head == "replace" and not skipped.issuperset(_HEAD):
        note, replaced = _compare_heads(weights, shapes)
        notes.append(note)
        skipped |= frozenset(_HEAD) if replaced else frozenset()
    missing = [f"missing {name}" for name in shapes if name not in weights and name not in skipped]
    unexpected = [f"unexpected {one_line(name)}" for name in weights if name not in shapes and name not in skipped]
    unfit = [
        f"{name} is {_described(weights[name])}, not {shape}"
        for name, shape in shapes.items()
        if name in weights and name not in skipped
        and not (weights[name].shape == shape and weights[name].is_floating_point())
    ]  # fmt: skip
    # One of each kind in turn: five hundred missing parameters must not hide the one of the wrong shape.
    faults = [fault for turn in itertools.zip_longest(missing, unexpected, unfit) for fault in turn if fault]
    if faults:
        more = f"; ... and {len(faults) - _MAX_LISTED} more" if len(faults) > _MAX_LISTED else ""
        listed = "; ".join(faults[:_MAX_LISTED])
        raise UserError(f"{path}: does not fit the model: {listed}{more}: {_remedy(weights, shapes, head)}")
    kept = {name: weights[name] for name in shapes if name not in skipped}
    wide = (torch.float32, torch.float64)
    narrow = sorted({_dtype(value) for value in kept.values() if value.dtype not in wide})
    if narrow:
        notes.append(f"weights: converted from {', '.join(narrow)} to float32")
    return {n: value if value.dtype in wide else value.float() for n, value in kept.items()}, notes


def _compare_heads(weights: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, bool]:
    """The log's line about the head, and whether it is left out; `match_params` finds any other fault of it."""
    theirs, ours = weights.get("head.weight"), shapes.get("head.weight")
    if ours is None:
        return "head: the model has none", True
    if not any(name in weights for name in _HEAD):
        return f"head: the file has none: a fresh one for {ours[0]} classes", True
    if theirs is not None and theirs.shape[1:] == ours[1:] and theirs.shape[:1] != ours[:1]:
        return f"head: {theirs.shape[0]} classes in the file, {ours[0]} here: replaced by a fresh one", True
    return f"head: kept, {ours[0]} classes in the file and here", False


def _described(value: Tensor) -> str:
    return str(tuple(value.shape)) + ("" if value.is_floating_point() else f" {_dtype(value)}")


def _dtype(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def depths(names: Iterable[str]) -> tuple[int, ...]:
    """Blocks per stage, from names `blocks.{stage}.{block}.`"""
    blocks = {match.groups() for name in names if (match := re.match(r"blocks\.(\d)\.(\d{1,3})\.", name))}
    stages = [stage for stage, _ in blocks]
    return tuple(stages.count(stage) for stage in sorted(set(stages)))


def _remedy(weights: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], head: str) -> str:
    theirs, ours = depths(weights), depths(shapes)
    if theirs != ours and theirs in FAMILY:
        return f"looks like {FAMILY[theirs]}: use --config.model.name={FAMILY[theirs]}"
    if theirs and theirs != ours:
        return f"the file has {theirs} blocks per stage, the model {ours}: use the config it was trained with"
    weight, ours_weight = weights.get("head.weight"), shapes.get("head.weight", ())
    if head == "exact" and weight is not None and weight.ndim == 2 and weight.shape[:1] != ours_weight[:1]:
        classes = weight.shape[0]
        return f"the file has {classes} classes: set config.num_classes={classes}, or fine-tune from it"
    return "use the config it was trained with, or give a Twins-PCPVT file"
