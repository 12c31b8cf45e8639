"""Do weights fit a model? Names and shapes are compared; one line says what differs and what to do."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor

from pcpvt.checkpoints.unpickle import one_line
from pcpvt.errors import UserError
from pcpvt.models.pcpvt import SPECS

FAMILY = {spec.depths: name for name, spec in SPECS.items()}  # blocks per stage: model
_HEAD = ("head.weight", "head.bias")
_LISTED = 10


def match_params(
    found: Mapping[str, Tensor],
    expected: Mapping[str, Tensor | torch.Size],
    *,
    head: str = "replace",
    fresh: Collection[str] = (),
    path: str | os.PathLike[str],
) -> tuple[dict[str, Tensor], list[str]]:
    """Return `found` in the order of `expected`, and notes for the log; `path` is for errors.

    16-bit leaves are widened to float32, which is exact; float64 stays.

    head="replace" leaves the head out when its class count differs or the file has none, so that the caller
    keeps a fresh one; head="exact" wants every leaf. Leaves in `fresh` are left out, whatever the file has.
    Raises one UserError that lists at most ten missing, unexpected and misshapen leaves and says what to do.
    """
    assert head in ("replace", "exact"), head
    shapes = {name: tuple(value.shape if isinstance(value, Tensor) else value) for name, value in expected.items()}
    notes, skipped = [], frozenset(fresh)
    if head == "replace" and not skipped.issuperset(_HEAD):
        note, replaced = _compare_heads(found, shapes)
        notes.append(note)
        skipped |= frozenset(_HEAD) if replaced else frozenset()
    missing = [f"missing {name}" for name in shapes if name not in found and name not in skipped]
    unexpected = [f"unexpected {one_line(name)}" for name in found if name not in shapes and name not in skipped]
    unfit = [
        f"{name} is {_described(found[name])}, not {shape}"
        for name, shape in shapes.items()
        if name in found and name not in skipped
        and not (found[name].shape == shape and found[name].is_floating_point())
    ]  # fmt: skip
    faults = [missing, unexpected, unfit]
    if any(faults):
        # One of each kind in turn: five hundred missing leaves must not hide the one of the wrong shape.
        turns = [fault for turn in itertools.zip_longest(*faults) for fault in turn if fault]
        more = f"; ... and {len(turns) - _LISTED} more" if len(turns) > _LISTED else ""
        raise UserError(
            f"{path}: does not fit the model: {'; '.join(turns[:_LISTED])}{more}: {_remedy(found, shapes, head)}"
        )
    kept = {name: found[name] for name in shapes if name not in skipped}
    wide = (torch.float32, torch.float64)
    others = sorted({_dtype(value) for value in kept.values() if value.dtype not in wide})
    if others:
        notes.append(f"weights: converted from {', '.join(others)} to float32")
    return {n: value if value.dtype in wide else value.float() for n, value in kept.items()}, notes


def _compare_heads(found: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, bool]:
    """The log's line about the head, and whether it is left out; any other fault of it is left to `fit`."""
    theirs, ours = found.get("head.weight"), shapes.get("head.weight")
    if ours is None:
        return "head: the model has none", True
    if not any(name in found for name in _HEAD):
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


def _remedy(found: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], head: str) -> str:
    theirs, ours = depths(found), depths(shapes)
    if theirs != ours and theirs in FAMILY:
        return f"looks like {FAMILY[theirs]}: use --config.model.name={FAMILY[theirs]}"
    if theirs and theirs != ours:
        return f"the file has {theirs} blocks per stage, the model {ours}: use the config it was trained with"
    weight, ours_weight = found.get("head.weight"), shapes.get("head.weight", ())
    if head == "exact" and weight is not None and weight.ndim == 2 and weight.shape[:1] != ours_weight[:1]:
        classes = weight.shape[0]
        return f"the file has {classes} classes: set config.num_classes={classes}, or fine-tune from it"
    return "use the config it was trained with, or give a Twins-PCPVT file"
