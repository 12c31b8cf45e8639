"""A part of a dataset, or the dataset under other labels, with labels that are known without reading an image."""

from collections.abc import Sequence
from typing import Any

import numpy as np


class View:
    """A part of a dataset, or the dataset under other labels.

    Args:
        rows: of the samples, int64; None: all.
        relabel: the new label of each class; None: as it is. Needs `classes`, the names of the new labels.
    """

    def __init__(
        self, dataset: Any, split: str, rows: np.ndarray | None = None,
        relabel: Sequence[int] | None = None, classes: Sequence[str] | None = None,
    ):  # fmt: skip
        self.dataset, self.split, self.in_memory = dataset, split, dataset.in_memory
        self.rows = np.arange(len(dataset)) if rows is None else rows
        self.classes, own = list(dataset.classes if classes is None else classes), dataset.labels[self.rows]
        self.labels = own if relabel is None else np.array(relabel)[own]
        self.sets, self.remarks = getattr(dataset, "sets", None), getattr(dataset, "remarks", [])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, _ = self.dataset[int(self.rows[index])]
        return image, int(self.labels[index])

    def name(self, index: int) -> str:
        return self.dataset.name(int(self.rows[index]))
