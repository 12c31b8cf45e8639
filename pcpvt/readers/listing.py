"""The list of a split's samples, as every reader gives it, and the check of its labels."""

import collections
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from pcpvt.errors import UserError
from pcpvt.readers.files import Identity, left_out_text

MOST_CLASSES = 1_000_000  # a larger number is no label


class Listing(NamedTuple):
    """The samples of a split without their images."""

    classes: list[str]
    paths: list[str]
    labels: np.ndarray  # int64 `[n]`
    left_out: collections.Counter[str]  # files that are no images, by suffix
    places: set[Identity]  # folders or archives that hold the images
    loose: int = 0  # images that lie beside the class folders
    sets: list[tuple[int, ...]] | None = None  # with several labels per image, labels are numbers of these sets
    hint: str = ""  # what else a user should know

    def notes(self, where: str) -> list[str]:
        """What a user should know about what was left out."""
        parts = [text] if (text := left_out_text(self.left_out)) else []
        if self.loose:
            parts.append(f"{self.loose} image{'s' if self.loose > 1 else ''} beside the class folders")
        left_out = [f"{where}: left out {'; '.join(parts)}"] if parts else []
        return [*left_out, self.hint] if self.hint else left_out


def unlabelled(paths: list[str]) -> Listing:
    """Images to classify: of no class, all with label 0."""
    return Listing([], paths, np.zeros(len(paths), np.int64), collections.Counter(), set())


def checked_labels(labels: Iterable[Any], classes: int, name: Callable[[int], str], remedy: str) -> np.ndarray:
    """The labels as int64 `[n]`.

    Args:
        classes: their number.
        name: a sample's name, by its index.
        remedy: what to do where a label is none.

    Raises:
        UserError: for the first label that is no whole number from 0 to `classes - 1`.
    """
    checked = []
    for i, label in enumerate(labels):
        if type(label) is not int or not 0 <= label < classes:
            raise UserError(
                f"{name(i)}: its label {label!r} is not one of the numbers from 0 to {classes - 1}: {remedy}"
            )
        checked.append(label)
    return np.array(checked, np.int64)


def name_labels(labels: Sequence[Any], name: Callable[[int], str], remedy: str) -> tuple[list[str], np.ndarray]:
    """Class names and labels, from labels without a class map: texts, which are sorted, or whole numbers from 0.

    Raises:
        UserError: for the first label that is neither.
    """
    if labels and all(type(label) is bool for label in labels):
        labels = [str(label) for label in labels]
    if labels and all(isinstance(label, str) and label.strip() for label in labels):
        classes = sorted(set(labels))
        positions = {label: i for i, label in enumerate(classes)}
        return classes, np.array([positions[label] for label in labels], np.int64)
    if any(isinstance(label, str) for label in labels):
        wrong = next(i for i, label in enumerate(labels) if not (isinstance(label, str) and label.strip()))
        raise UserError(f"{name(wrong)}: its label {labels[wrong]!r} is no class name, as others have: {remedy}")
    numbers = checked_labels(labels, MOST_CLASSES, name, remedy)
    return [str(i) for i in range(int(numbers.max(initial=-1)) + 1)], numbers


def name_label_sets(
    values: Sequence[Any], name: Callable[[int], str], remedy: str, classes: Sequence[str] | None = None
) -> tuple[list[str], np.ndarray, list[tuple[int, ...]]]:
    """Class names, the number of each sample's set of labels, int64 `[n]`, and the class numbers in each set.

    Args:
        values: a list of labels of each sample, which may be empty.
        classes: names of the label numbers; None: as of `name_labels`.

    Raises:
        UserError: for the first value that is no list, or a label that is none.
    """
    for i, value in enumerate(values):
        if not isinstance(value, list | tuple):
            raise UserError(f"{name(i)}: its labels {value!r} are no list, as config.task=multilabel needs: {remedy}")
    owners = [i for i, value in enumerate(values) for _ in value]
    labels = [label for value in values for label in value]

    def owner(label: int) -> str:
        return name(owners[label])

    if classes is None:
        classes, numbers = name_labels(labels, owner, remedy)
    else:
        numbers = checked_labels(labels, len(classes), owner, remedy)
    ends = np.cumsum([0, *map(len, values)])
    sets: dict[tuple[int, ...], int] = {}  # to its number
    own = [tuple(sorted(set(numbers[a:b].tolist()))) for a, b in itertools.pairwise(ends)]
    found = np.array([sets.setdefault(labels, len(sets)) for labels in own], np.int64)
    return list(classes), found, list(sets)
