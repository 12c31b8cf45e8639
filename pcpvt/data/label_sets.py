"""Datasets whose images have several labels each (`config.task=multilabel`).

Readers give every image one number, that of its set of labels, and the list of the sets; so splits, parts and memory
shared by loader processes work as with one label. `LabelSets` turns the number into a multi-hot row.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from pcpvt.errors import UserError


class LabelSets:
    """A dataset of (image, multi-hot row, float32 `[classes]`).

    It has no `labels`, which are one whole number per image: what needs those must ask for `counts`, or refuse.

    Args:
        dataset: whose labels are numbers of sets, int64 `[n]`.
        sets: the class numbers in each set.
        classes: names of the classes.

    Raises:
        UserError: when no image has a label.
    """

    def __init__(self, dataset: Any, sets: Sequence[Sequence[int]], classes: Sequence[str]):
        self.dataset, self.classes, self.in_memory = dataset, list(classes), dataset.in_memory
        self.split, self.remarks = dataset.split, getattr(dataset, "remarks", [])
        self._ends = np.cumsum([0, *map(len, sets)])
        self._members = np.fromiter(itertools.chain.from_iterable(sets), np.int32)
        if len(dataset) and not self.counts.any():
            raise UserError(f"config.data.path: none of the {len(dataset)} images ({self.split}) has a label: add some")

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, np.ndarray]:
        image, label = self.dataset[index]
        row = np.zeros(len(self.classes), np.float32)
        row[self._set(label)] = 1
        return image, row

    def name(self, index: int) -> str:
        return self.dataset.name(index)

    def _set(self, number: int) -> np.ndarray:
        return self._members[self._ends[number] : self._ends[number + 1]]

    @property
    def counts(self) -> np.ndarray:
        """The images of each class, int64 `[classes]`."""
        return class_counts(self.dataset.labels, self._members, self._ends, len(self.classes))

    def relabelled(self, labels: Sequence[int | None], classes: Sequence[str]) -> "LabelSets":
        """The same images under other labels.

        Args:
            labels: the new label of each class; None: the images lose this one. Several classes may become one.
            classes: names of the new labels.
        """
        sets = [
            sorted({new for old in self._set(number) if (new := labels[old]) is not None})
            for number in range(len(self._ends) - 1)
        ]
        return LabelSets(self.dataset, sets, classes)


def class_counts(numbers: np.ndarray, members: np.ndarray, ends: np.ndarray, classes: int) -> np.ndarray:
    """The images of each class, int64 `[classes]`, from each image's set and the sets one after the other."""
    images = np.bincount(numbers, minlength=len(ends) - 1)
    return np.bincount(members, np.repeat(images, np.diff(ends)), classes).astype(np.int64)


def strata(numbers: np.ndarray, sets: Sequence[Sequence[int]], classes: int) -> np.ndarray:
    """What a held-out part has the same share of, instead of a class: each image's rarest label, -1 for none, `[n]`.

    Args:
        numbers: the set of each image, int64 `[n]`.
    """
    members = np.fromiter(itertools.chain.from_iterable(sets), np.int32)
    counts = class_counts(numbers, members, np.cumsum([0, *map(len, sets)]), classes)
    rarest = [min(members, key=lambda label: (counts[label], label), default=-1) for members in sets]
    return np.array(rarest, np.int64)[numbers]
