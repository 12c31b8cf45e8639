"""Several labels per image: the loss, the metrics, and the mean of several models' probabilities.

A model's logits are those of one yes-or-no question per class; a label is a multi-hot row, float `[classes]`. A
question is answered with yes where its probability, the sigmoid of the logit, is at least a threshold.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pcpvt.functional.metrics import Sums, f1_scores, mean

ANSWERS = 2  # of a question


def cross_entropy(logits: Tensor, targets: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """The binary cross-entropy of each sample, `[b]`: the mean over all classes, times the weight of each if given.

    Args:
        logits: `[b, classes]`.
        targets: `[b, classes]`, between 0 and 1.
        class_weights: `[classes]`.
    """
    return F.binary_cross_entropy_with_logits(logits, targets, class_weights, reduction="none").mean(-1)


def sums(logits: Tensor, labels: Tensor, valid: Tensor, threshold: float = 0.5) -> Sums:
    """Sums over one batch, as of `metrics.sums` without `top1` and `top5`.

    Args:
        logits: `[b, classes]`.
        labels: multi-hot, `[b, classes]`.
        valid: bool `[b]`; False for padding rows, which are not counted.
        threshold: the lowest probability of a predicted class.

    Returns:
        `seen` in int64, `loss` (sum of binary cross-entropies); and `[classes]` in int64: `labels`, rows that have this
        label; `hits`, those of them for which it is predicted; `predicted`, rows for which it is predicted. For a row
        that is not finite no class is predicted.
    """
    usable = valid & torch.isfinite(logits).all(1)
    has = (labels > 0.5) & valid[:, None]
    predicted = (logits.sigmoid() >= threshold) & usable[:, None]
    losses = cross_entropy(logits, labels.to(logits.dtype))
    return {
        "seen": valid.sum(),
        "loss": torch.where(valid, losses, torch.zeros_like(losses)).sum(),
        "labels": has.sum(0),
        "hits": (has & predicted).sum(0),
        "predicted": predicted.sum(0),
    }


def summarize(total: Mapping[str, Any], threshold: float = 0.5) -> dict[str, float]:
    """The metrics from the totals of `sums`, those per class as lists, and the `threshold` of the sums.

    `macro_f1`, the mean F1 of the classes that have labels or predictions, and `micro_f1`, the F1 of all answers
    together, are in percent, `loss` is the mean, and `seen` the number of samples.
    """
    seen = int(total["seen"])
    f1 = f1_scores(total["labels"], total["hits"], total["predicted"])
    every = sum(total["labels"]) + sum(total["predicted"])
    return {
        "macro_f1": 100 * mean([value for value in f1 if value is not None]),
        "micro_f1": 100 * 2 * sum(total["hits"]) / max(every, 1),
        "threshold": threshold,
        "loss": total["loss"] / max(seen, 1),
        "seen": seen,
    }


def average_precision(scores: np.ndarray, labels: np.ndarray) -> list[float | None]:
    """The average precision of each class, between 0 and 1; None of a class without labels.

    The sum over thresholds of the precision times the recall gained there, as scikit-learn's `average_precision_score`;
    equal scores are one threshold, so the order of the samples does not matter.

    Args:
        scores: `[n, classes]`; higher: the label is more probable.
        labels: bool `[n, classes]`.
    """
    found: list[float | None] = []
    for column, positive in zip(scores.T, labels.T, strict=True):
        if not positive.any():
            found.append(None)
            continue
        order = np.argsort(-column, kind="stable")
        ranked = column[order]
        last = np.append(np.flatnonzero(ranked[1:] != ranked[:-1]), len(ranked) - 1)  # of each run of equal scores
        hits = np.cumsum(positive[order])[last]
        gained = np.diff(hits, prepend=0)
        found.append(float((gained * hits / (last + 1)).sum() / hits[-1]))
    return found


def average_probabilities(logits: Sequence[Tensor]) -> Tensor:
    """Members' logits to the logits of their mean probabilities, `[b, classes]`; the number of members cancels out."""
    yes, no = (torch.stack([F.logsigmoid(sign * member) for member in logits]).logsumexp(0) for sign in (1, -1))
    return yes - no
