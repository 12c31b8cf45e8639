"""Weights of the classes in the loss (`config.class_weights`), and a warning where the classes are far from equal."""

import math
import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pcpvt.data.classes import known_labels, labels_of
from pcpvt.data.label_sets import LabelSets
from pcpvt.data.sources import Dataset
from pcpvt.errors import UserError

UNEQUAL = 10  # times as many images in the largest class as in the smallest: then a warning


class ClassWeights(NamedTuple):
    """The weights of a run, one per output; None: no weights."""

    weights: list[float] | None
    notes: list[str]  # for the log
    warnings: list[str]


def of_run(setting: str, dataset: Dataset, outputs: int) -> ClassWeights:
    """The weights as `config.class_weights` says: `none`, `balanced` or a file.

    Raises:
        UserError: when the file cannot be read or does not fit the classes.
    """
    classes = dataset.classes
    several = isinstance(dataset, LabelSets)
    if isinstance(dataset, LabelSets):
        counts = dataset.counts.tolist()
    else:
        labels = labels_of(dataset) if setting == "balanced" else known_labels(dataset)
        counts = None if labels is None else np.bincount(labels, minlength=outputs).tolist()
    if setting == "none":
        unequal = [] if counts is None else imbalance(counts[: len(classes)], classes, several=several)
        return ClassWeights(None, [], unequal)
    if setting == "balanced":
        assert counts is not None
        weights = balanced(counts)
    else:
        weights = [*read(setting, classes), *[0.0] * (outputs - len(classes))]
    known = [weight for weight in weights if weight]
    note = f"class weights: {setting}, from {min(known):.3g} to {max(known):.3g}"
    return ClassWeights(weights, [note], [])


def balanced(counts: Sequence[int]) -> list[float]:
    """images / (classes * images of the class), as scikit-learn's `balanced`; 0 for a class without images.

    The mean weight over the images is 1, so the loss keeps its size.
    """
    present = sum(count > 0 for count in counts)
    return [sum(counts) / (present * count) if count else 0.0 for count in counts]


def imbalance(counts: Sequence[int], classes: Sequence[str], *, several: bool = False) -> list[str]:
    """A warning where the largest class has more than UNEQUAL times the images of the smallest that has any."""
    found = [(count, name) for count, name in zip(counts, classes, strict=True) if count]
    (least, rare), (most, frequent) = min(found), max(found)
    if most <= UNEQUAL * least:
        return []
    advice = "judge by balanced_acc, and consider --config.class_weights=balanced and --config.best=balanced_acc"
    if several:
        advice = "judge by map and average_precision, where every class counts the same"
    return [
        f"the classes differ {most / least:.3g}-fold in number: {frequent} has {most} training images, {rare} {least}: "
        f"{advice}"
    ]


def check_same(setting: str, workdir: object, stored: Sequence[float] | None, weights: Sequence[float] | None) -> None:
    """Raises UserError unless a run goes on with the weights that it began with (`stored`).

    A file may have changed, or the images of the classes that `balanced` counts.
    """
    if stored == weights or setting == "none":
        return
    pairs = enumerate(zip(stored or [], weights or [], strict=False))
    changed = next((f"output {i}: {before:g} there, {now:g} here" for i, (before, now) in pairs if before != now), "")
    raise UserError(
        f"config.class_weights: {setting}: the weights are no longer those that {workdir} was trained with"
        f"{f' ({changed})' if changed else ''}: restore them, or start anew with another --workdir"
    )


def read(path: str, classes: Sequence[str]) -> list[float]:
    """The weights in a file: one a line, in the order of the classes, or `name<TAB>weight` lines in any order.

    Raises:
        UserError: when it cannot be read, lacks a class, or holds what is no weight.
    """
    try:
        with open(os.path.expanduser(path), encoding="utf-8-sig", errors="surrogateescape") as file:
            lines = [line.rstrip("\r\n") for line in file if line.strip()]
    except OSError as error:
        raise UserError(
            f"config.class_weights: {path!r}: cannot be read ({error.strerror}): give none, balanced or a file"
        ) from None
    named = {name: text for name, tab, text in (line.rpartition("\t") for line in lines) if tab}
    if not named and len(lines) != len(classes):
        raise UserError(
            f"config.class_weights: {path}: has {len(lines)} weights for {len(classes)} classes: correct it"
        )
    if named and (missing := [name for name in classes if name not in named]):
        listed = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise UserError(f"config.class_weights: {path}: lacks {len(missing)} classes of the data ({listed}): add them")
    weights = []
    for text in [named[name] for name in classes] if named else lines:
        try:
            weight = float(text)
        except ValueError:
            weight = math.nan
        if not 0 <= weight < math.inf:
            raise UserError(f"config.class_weights: {path}: {text.strip()!r} is no weight: give numbers from 0 up")
        weights.append(weight)
    if not any(weights):
        raise UserError(f"config.class_weights: {path}: all weights are 0: correct it")
    return weights
