"""Splits: which one of a source's names `config.data.train_split` and `.val_split` mean, and held-out parts.

`train` and `validation`, the defaults, mean whatever name the split usually has; another name is meant literally. "."
is all there is, without splits.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from pcpvt.errors import UserError

LISTED = 8  # names in an error
USUAL = {  # of "train" and "val"; the first one that there is
    "train": ("train", "training"),
    "val": ("validation", "val", "valid", "dev", "eval", "test", "testing"),
}


class Splits(NamedTuple):
    """Fields of `config.data`, and the seed of held-out parts."""

    train: str = "train"
    val: str = "validation"
    fraction: float = 0.0  # of the training images of each class, held out as validation
    seed: int = 0

    def given(self, split: str) -> str:
        """The name of "train" or "val" if it is meant literally, else empty."""
        name = self.train if split == "train" else self.val
        return "" if name == USUAL[split][0] else name

    def source(self, split: str) -> str:
        """The split of the source that "train" or "val" is taken from."""
        return "train" if self.fraction else split

    def whole(self, split: str) -> bool:
        """Whether a source without splits is itself this split."""
        return self.given(split) == "." or bool(self.fraction)


def shown(name: str) -> str:
    """The name of a split in messages and results."""
    return "all" if name == "." else name


def check(splits: Splits) -> None:
    """Raises UserError for fields that exclude one another."""
    if splits.fraction and splits.given("val"):
        raise UserError(
            f"config.data.val_split: {splits.val!r} and config.data.val_fraction={splits.fraction:g}: the validation "
            "images are a split or a part of the training images: leave one of them out"
        )


def choose(names: Iterable[str], split: str, splits: Splits) -> str:
    """The one of a source's split names that "train" or "val" means; empty if there is none."""
    names = list(names)
    if given := splits.given(split):
        return given if given == "." or given in names else ""
    lower = {name.lower(): name for name in sorted(names, reverse=True)}
    return next((lower[usual] for usual in USUAL[split] if usual in lower), "")


def missing_split(where: str, names: Sequence[str], split: str, splits: Splits) -> UserError:
    """The error for a source that lacks a split."""
    more = ", ..." if len(names) > LISTED else ""
    has = f"has the splits {', '.join(names[:LISTED])}{more}" if names else "has no splits"
    if given := splits.given(split):
        return UserError(f"config.data.{split}_split: {given!r}: {where} {has}: name one, or . for all there is")
    if split == "train":
        return UserError(
            f"config.data.train_split: {where} {has}, none for training: name one of them (. for all there is), or "
            "hold out a part of all by config.data.val_fraction=0.2"
        )
    return UserError(
        f"config.data.val_split: {where} {has}, none for validation: name one of them (. for all there is), hold out a "
        "part of the training images by config.data.val_fraction=0.2, or train without by config.eval_every=0"
    )


def hold_out(labels: np.ndarray, key: Callable[[int], str], fraction: float, seed: int) -> np.ndarray:
    """Which samples are held out, bool `[n]`: the same share of every class, rounded, a pure function of the arguments.

    Of each class those with the smallest digests of seed and key are held out, so that adding an image moves at most
    one other. A class of two or more has at least one image on each side; a class of one is for training.

    Args:
        key: a sample's name, the same wherever the data lie.
    """
    names = (f"{seed}/{key(i)}".encode("utf-8", "surrogateescape") for i in range(len(labels)))
    digests = [hashlib.sha256(name).digest() for name in names]
    held_out = np.zeros(len(labels), bool)
    by_class = np.argsort(labels, kind="stable")
    for rows in np.split(by_class, np.flatnonzero(np.diff(labels[by_class])) + 1):
        count = min(max(round(fraction * len(rows)), 1), len(rows) - 1)
        held_out[sorted(rows.tolist(), key=lambda i: digests[i])[:count]] = True
    return held_out
