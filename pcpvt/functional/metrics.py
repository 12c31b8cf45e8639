"""Evaluation metrics as sums and counts, which are added over batches and ranks and divided once at the end."""

import torch
import torch.nn.functional as F
from torch import Tensor

Sums = dict[str, Tensor]


def sums(logits: Tensor, labels: Tensor, valid: Tensor) -> Sums:
    """Sums over one batch.

    Args:
        logits: `[b, classes]`.
        labels: int64 `[b]`.
        valid: bool `[b]`; False for padding rows, which are not counted.

    Returns:
        0-d tensors: `seen`, `top1`, `top5` in int64, `loss` (sum of cross-entropy) in the dtype of the logits. A label
        is in the top k when fewer than k classes score higher; of equal scores the lower class index counts as higher,
        on every device.
    """
    own = logits.gather(1, labels[:, None])
    index = torch.arange(logits.shape[1], device=logits.device)[None, :]
    rank = ((logits > own) | ((logits == own) & (index < labels[:, None]))).sum(1)
    # Scores that are not finite have no meaningful order: such a row counts as wrong.
    usable = valid & torch.isfinite(logits).all(1)
    cross_entropy = -F.log_softmax(logits, -1).gather(1, labels[:, None])[:, 0]
    loss = torch.where(valid, cross_entropy, torch.zeros_like(cross_entropy))
    return {
        "seen": valid.sum(),
        "top1": ((rank < 1) & usable).sum(),
        "top5": ((rank < 5) & usable).sum(),
        "loss": loss.sum(),
    }


def summarize(total: dict[str, float]) -> dict[str, float]:
    """`acc1` and `acc5` (percent), `loss` (mean) and `seen` from the totals of `sums`."""
    seen = int(total["seen"])
    return {
        "acc1": 100.0 * total["top1"] / max(seen, 1),
        "acc5": 100.0 * total["top5"] / max(seen, 1),
        "loss": total["loss"] / max(seen, 1),
        "seen": seen,
    }
