"""Evaluation metrics as sums and counts, which are added over batches and ranks and divided once at the end."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Sums = dict[str, Tensor]
PER_CLASS = ("labels", "hits", "predicted")  # the sums that have an entry per class


def cross_entropy(logits: Tensor, targets: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """The cross-entropy of each sample, `[b]`: the sum over classes of -weight * target * log p.

    That is `torch.nn.functional.cross_entropy` with soft targets. All arguments are `[b, classes]`, the weights
    `[classes]`.
    """
    if class_weights is not None:
        targets = targets * class_weights
    return -(targets * F.log_softmax(logits, -1)).sum(-1)


def softmax(logits: Tensor) -> Tensor:
    """The probabilities of the classes, `[b, classes]`."""
    return logits.softmax(-1)


def average_probabilities(logits: Sequence[Tensor]) -> Tensor:
    """Members' logits to the logarithm of their mean probabilities, `[b, classes]`."""
    return torch.stack([member.log_softmax(-1) for member in logits]).logsumexp(0) - math.log(len(logits))


def sums(logits: Tensor, labels: Tensor, valid: Tensor) -> Sums:
    """Sums over one batch.

    Args:
        logits: `[b, classes]`.
        labels: int64 `[b]`.
        valid: bool `[b]`; False for padding rows, which are not counted.

    Returns:
        0-d tensors: `seen`, `top1`, `top5` in int64, `loss` (sum of cross-entropy) in the dtype of the logits. A label
        is in the top k when fewer than k classes score higher; of equal scores the lower class index counts as higher,
        on every device. And `[classes]` in int64: `labels`, rows with this label; `hits`, those of them in the top 1;
        `predicted`, rows with this class in the top 1 (a row that is not finite has none).
    """
    own = logits.gather(1, labels[:, None])
    index = torch.arange(logits.shape[1], device=logits.device)[None, :]
    rank = ((logits > own) | ((logits == own) & (index < labels[:, None]))).sum(1)
    # Scores that are not finite have no meaningful order: such a row counts as wrong.
    usable = valid & torch.isfinite(logits).all(1)
    cross_entropy = -F.log_softmax(logits, -1).gather(1, labels[:, None])[:, 0]
    loss = torch.where(valid, cross_entropy, torch.zeros_like(cross_entropy))
    right = (rank < 1) & usable
    is_label = index == labels[:, None]
    highest = torch.where(logits == logits.amax(1, keepdim=True), index, logits.shape[1]).amin(1)
    return {
        "seen": valid.sum(),
        "top1": right.sum(),
        "top5": ((rank < 5) & usable).sum(),
        "loss": loss.sum(),
        "labels": (is_label & valid[:, None]).sum(0),
        "hits": (is_label & right[:, None]).sum(0),
        "predicted": ((index == highest[:, None]) & usable[:, None]).sum(0),
    }


def summarize(total: Mapping[str, Any]) -> dict[str, float]:
    """The metrics from the totals of `sums`, those of PER_CLASS as lists.

    `acc1`, `acc5`, `balanced_acc` and `macro_f1` are in percent, `loss` is the mean, and `seen` the number of samples.
    `balanced_acc` is the mean recall of the classes that have samples, `macro_f1` the mean F1 of those that have
    samples or predictions, as scikit-learn defines them.
    """
    seen = int(total["seen"])
    f1 = f1_scores(*(total[name] for name in PER_CLASS))
    return {
        "acc1": 100.0 * total["top1"] / max(seen, 1),
        "acc5": 100.0 * total["top5"] / max(seen, 1),
        "balanced_acc": mean([share for share in recalls(total["labels"], total["hits"]) if share is not None]),
        "macro_f1": 100 * mean([value for value in f1 if value is not None]),
        "loss": total["loss"] / max(seen, 1),
        "seen": seen,
    }


def recalls(labels: Sequence[float], hits: Sequence[float]) -> list[float | None]:
    """The share of each class's samples that are right, in percent; None of a class without samples."""
    return [100 * right / count if count else None for count, right in zip(labels, hits, strict=True)]


def f1_scores(labels: Sequence[float], hits: Sequence[float], predicted: Sequence[float]) -> list[float | None]:
    """The F1 of each class, between 0 and 1; None of a class without labels and predictions."""
    rows = zip(labels, hits, predicted, strict=True)
    return [2 * right / (count + found) if count + found else None for count, right, found in rows]


def score(metrics: Mapping[str, Any], by: str = "acc1") -> tuple[float, float]:
    """A key that is higher for the better evaluation: by `acc1`, `balanced_acc`, `map` or `loss`, then the lower loss.

    A loss that is not a number, or is missing, is the highest; so is the score lowest that is missing.
    """
    loss = metrics.get("loss")
    low = -math.inf if loss is None or math.isnan(loss) else -loss
    value = low if by == "loss" else metrics.get(by)
    return (-math.inf if value is None else value), low


def mean(values: Sequence[float]) -> float:
    """The mean; 0 of nothing."""
    return sum(values) / max(len(values), 1)
