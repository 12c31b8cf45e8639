"""Evaluation metrics as sums and counts: added over batches and ranks, divided once at the end."""

from __future__ import annotations

import torch
from torch import Tensor

from pcpvt.functional.losses import cross_entropy

Sums = dict[str, Tensor]


def sums(logits: Tensor, labels: Tensor, valid: Tensor) -> Sums:
    """Sums over one batch.

    Args:
        logits: `[b, classes]`.
        labels: int64 `[b]`.
        valid: bool `[b]`; padding rows are False and count nowhere.

    Returns:
        0-d tensors: `seen`, `top1`, `top5` in int64, `loss` (sum of cross-entropy) in the dtype of the logits. A label
        is in the top k when fewer than k classes score higher; ties are broken by class index, lower first, on every
        device alike.
    """
    own = logits.gather(1, labels[:, None])
    index = torch.arange(logits.shape[1], device=logits.device)[None, :]
    ahead = (logits > own) | ((logits == own) & (index < labels[:, None]))
    rank = ahead.sum(1)
    # A non-finite row has no meaningful order: it counts as wrong.
    usable = valid & torch.isfinite(logits).all(1)
    loss = torch.where(valid, cross_entropy(logits, labels), torch.zeros_like(own[:, 0]))
    return {
        "seen": valid.sum(),
        "top1": ((rank < 1) & usable).sum(),
        "top5": ((rank < 5) & usable).sum(),
        "loss": loss.sum(),
    }


def summarize(total: dict[str, float]) -> dict[str, float]:
    """Sums as numbers to `acc1` and `acc5` (percent), `loss` (mean) and `seen`."""
    seen = int(total["seen"])
    return {
        "acc1": 100.0 * total["top1"] / max(seen, 1),
        "acc5": 100.0 * total["top5"] / max(seen, 1),
        "loss": total["loss"] / max(seen, 1),
        "seen": seen,
    }
