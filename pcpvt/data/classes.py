"""Class names: their order, the file that maps them to labels (`config.data.class_map`), datasets of other labels."""

import os
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from pcpvt.data.label_sets import LabelSets
from pcpvt.data.sources import Dataset
from pcpvt.errors import UserError

MOST = 1_000_000  # labels in a class map


def class_order(names: Iterable[str], order: str) -> list[str]:
    """Names in "natural" order (as timm: numbers by value, without case) or in order of their "bytes" (torchvision)."""
    return sorted(names, key=_natural if order == "natural" else None)


def _natural(name: str) -> tuple[list[str | int], str]:
    parts = re.split(r"(\d+)", name.lower())  # text and digits in turn
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name


def orders_differ(names: Sequence[str]) -> bool:
    """Whether the two orders of these names are not the same."""
    return class_order(names, "natural") != class_order(names, "bytes")


class ClassMap(NamedTuple):
    """Labels of class names, from a file."""

    labels: dict[str, int]
    classes: list[str]  # names of the labels
    positional: bool  # a label is an output of the model; otherwise it is a name, which the model may know


def read_map(path: str) -> ClassMap:
    """Reads `config.data.class_map`: a name a line, in order of the labels, or `name<TAB>label` lines.

    A label is a number from 0, or a name. Several names may have one label.

    Raises:
        UserError: when it cannot be read, or a line of it cannot be understood.
    """
    path = os.path.expanduser(path)
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
            rows = [(i, line.rstrip("\r\n")) for i, line in enumerate(file, 1) if line.strip()]
    except OSError as error:
        raise UserError(f"config.data.class_map: {path}: cannot be read ({error.strerror}): check the path") from None
    if not rows:
        raise UserError(f"config.data.class_map: {path}: is empty: write a class name a line, or name<TAB>label")
    tabs = {"\t" in line for _, line in rows}
    pairs = [line.rsplit("\t", 1) if "\t" in line else [line, str(i)] for i, (_, line) in enumerate(rows)]
    labels: dict[str, str] = {}
    for (number, line), (name, label) in zip(rows, pairs, strict=True):
        if len(tabs) > 1 or not label.strip() or name in labels:
            fault = "is named twice" if name in labels else "is not like the other lines"
            raise UserError(
                f"config.data.class_map: {path}:{number}: {line!r} {fault}: give every class once, all lines as a name "
                "or all as name<TAB>label"
            )
        labels[name] = label.strip()
    if all(label.isascii() and label.isdigit() for label in labels.values()):
        found = {name: int(label) for name, label in labels.items()}
        if max(found.values()) >= MOST:
            raise UserError(f"config.data.class_map: {path}: label {max(found.values())} is out of range: count from 0")
        names = {label: name for name, label in reversed(found.items())}  # the first name of each label
        return ClassMap(found, [names.get(i, str(i)) for i in range(max(found.values()) + 1)], True)
    classes = class_order(set(labels.values()), "bytes")
    return ClassMap({name: classes.index(label) for name, label in labels.items()}, classes, False)


class Relabelled:
    """A dataset whose labels are replaced; samples of classes that have no new label are left out.

    Args:
        labels: the new label of each class of the dataset, or None.
        classes: names of the new labels.
    """

    def __init__(self, dataset: Dataset, labels: Sequence[int | None], classes: Sequence[str]):
        self.dataset, self.new, self.classes, self.in_memory = dataset, labels, list(classes), dataset.in_memory
        every = None not in labels
        self.rows = None if every else [i for i, label in enumerate(labels_of(dataset)) if labels[label] is not None]

    def __len__(self) -> int:
        return len(self.dataset if self.rows is None else self.rows)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, label = self.dataset[self._row(index)]
        new = self.new[label]
        assert new is not None  # `rows` leaves it out
        return image, new

    def name(self, index: int) -> str:
        return self.dataset.name(self._row(index))

    def _row(self, index: int) -> int:
        return index if self.rows is None else self.rows[index]

    @property
    def labels(self) -> np.ndarray:
        """The labels of all samples, int64."""
        new = [self.new[label] for label in labels_of(self.dataset)]
        return np.array([label for label in new if label is not None], np.int64)

    def __getattr__(self, name: str) -> Any:  # what one kind of dataset has more, such as `split`
        if name in ("dataset", "__setstate__"):  # not yet there while it is unpickled
            raise AttributeError(name)
        return getattr(self.dataset, name)


def relabelled(dataset: Dataset, labels: Sequence[int | None], classes: Sequence[str]) -> Dataset:
    """The dataset under other labels: see `Relabelled`, or, with several labels per image, `LabelSets.relabelled`."""
    if isinstance(dataset, LabelSets):
        return dataset.relabelled(labels, classes)
    return Relabelled(dataset, labels, classes)


def known_labels(dataset: Dataset) -> list[int] | None:
    """The labels of all samples; None where the samples would have to be read for them."""
    known = getattr(dataset, "labels", None)
    if known is not None:
        return [int(label) for label in (known() if callable(known) else known)]
    samples = getattr(dataset, "samples", None)
    if isinstance(samples, list):
        return [label for _, label in samples]
    targets = getattr(samples, "targets", None)  # of timm's tar readers and torchvision's datasets
    if targets is not None and len(targets) == len(dataset):
        return [int(label) for label in targets]
    return None


def labels_of(dataset: Dataset) -> list[int]:
    """The labels of all samples; those of datasets that do not keep them are read one by one."""
    known = known_labels(dataset)
    return [dataset[i][1] for i in range(len(dataset))] if known is None else known


def arrange(dataset: Dataset, order: str, map_file: str) -> Dataset:
    """The dataset with its labels as `config.data.class_map` says, or else in `config.data.class_order`.

    Raises:
        UserError: when the class map cannot be read, or lacks a class of the data.
    """
    if map_file:
        known = read_map(map_file)
        missing = [name for name in dataset.classes if name not in known.labels]
        if missing:
            listed = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
            raise UserError(
                f"config.data.class_map: {map_file}: lacks {len(missing)} classes of the data ({listed}): add them"
            )
        return relabelled(dataset, [known.labels[name] for name in dataset.classes], known.classes)
    classes = dataset.classes if order == "auto" else class_order(dataset.classes, order)
    if classes == dataset.classes:
        return dataset
    positions = {name: i for i, name in enumerate(classes)}
    return relabelled(dataset, [positions[name] for name in dataset.classes], classes)
