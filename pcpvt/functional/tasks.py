"""What differs between one label per image (`classes`) and several (`multilabel`): chosen once, by `PCPVT.task`."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from pcpvt.functional import metrics, mixing, multilabel
from pcpvt.functional.metrics import Sums


class Task(NamedTuple):
    """How logits and labels are read."""

    targets: Callable[..., Tensor]  # soft targets `[b, classes]`: the arguments of `mixing.mix_targets`
    loss: Callable[[Tensor, Tensor, Tensor | None], Tensor]  # (logits, targets, class weights) -> of each sample, `[b]`
    probabilities: Callable[[Tensor], Tensor]  # logits -> of each class, `[b, classes]`
    average: Callable[[Sequence[Tensor]], Tensor]  # logits of several models -> those of their mean probabilities
    sums: Callable[[Tensor, Tensor, Tensor], Sums]  # (logits, labels, valid), see `metrics.sums`
    summarize: Callable[[Mapping[str, Any]], dict[str, float]]  # the totals of the sums to metrics
    metrics: tuple[str, ...]  # their names, the main one first
    title: str  # of the main one
    logits: Callable[[Tensor], Tensor]  # some that have these probabilities
    answers: Callable[[Tensor], Tensor]  # logits -> the most probable labels, as a batch holds labels


def choose(name: str, threshold: float = 0.5) -> Task:
    """The task of a name, `classes` or `multilabel`; `threshold`: the lowest probability of one of several labels."""
    if name == "classes":
        return Task(
            mixing.mix_targets, metrics.cross_entropy, metrics.softmax, metrics.average_probabilities,
            metrics.sums, metrics.summarize, ("acc1", "acc5", "balanced_acc", "macro_f1", "loss"),
            "top-1", lambda probabilities: probabilities.clamp_min(1e-38).log(), lambda logits: logits.argmax(-1),
        )  # fmt: skip
    assert name == "multilabel", name
    return Task(
        functools.partial(mixing.mix_targets, answers=multilabel.ANSWERS), multilabel.cross_entropy, Tensor.sigmoid,
        multilabel.average_probabilities, functools.partial(multilabel.sums, threshold=threshold),
        functools.partial(multilabel.summarize, threshold=threshold),
        ("map", "macro_f1", "micro_f1", "threshold", "loss"),
        "mAP", lambda probabilities: probabilities.logit(1e-7), lambda logits: logits >= 0,
    )  # fmt: skip
