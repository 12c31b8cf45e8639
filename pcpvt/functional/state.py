"""TrainState: everything that changes during training, and its flattened form, whose names checkpoints use."""

from typing import NamedTuple

import torch
from torch import Tensor

from pcpvt.functional.flat import Flat


class TrainState(NamedTuple):
    """The state after a step. The next step consumes it and may reuse its memory (donation)."""

    step: Tensor  # int64 [], on the host: global batches consumed, applied or skipped
    params: Flat  # the master weights
    ema: Flat  # moving average of the parameters; empty without EMA
    opt: dict  # optimizer state: a tree of dicts with tensor leaves
    scale: dict  # loss-scale state: a tree of dicts with tensor leaves; empty without loss scaling
    skipped: Tensor  # int32 [], consecutive steps whose update was skipped as non-finite


def create(params: Flat, opt: dict, scale: dict, *, ema: bool, device: torch.device | str = "cpu") -> TrainState:
    """The state before the first step."""
    average = params.clone() if ema else params.zeros([])
    skipped = torch.zeros((), dtype=torch.int32, device=device)
    return TrainState(torch.zeros((), dtype=torch.int64), params, average, opt, scale, skipped)


def flatten(tree, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a tree of NamedTuples and dicts, by path, e.g. `params/head.bias`, `opt/mu/head.bias`."""
    if isinstance(tree, Tensor):
        return {prefix: tree}
    items = tree._asdict() if hasattr(tree, "_asdict") else tree
    flat: dict[str, Tensor] = {}
    for name, value in items.items():
        flat.update(flatten(value, f"{prefix}/{name}" if prefix else name))
    return flat
