"""The scores of an evaluation with several labels per image: average precision, and what the report shows.

Average precision ranks all images, so the scores of all are kept: 4 bytes per image and class on the device until the
evaluation ends, and then on the host of every process, which all compute the same.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pcpvt.data.decode import RGB, Reading
from pcpvt.data.sources import Dataset
from pcpvt.distributed import collectives
from pcpvt.evaluate.mistakes import MISTAKES, thumbnail
from pcpvt.functional import multilabel
from pcpvt.functional.metrics import mean


class ScoreLog:
    """Collects scores; called with each evaluation batch and its logits, on the device."""

    def __init__(self, samples: int, threshold: float):
        self.samples, self.threshold = samples, threshold
        self._rows: list[tuple[Tensor, Tensor, Tensor]] = []
        self._table: dict[str, np.ndarray] = {}  # once it has been gathered
        self._precision: list[float | None] = []

    def __call__(self, batch: dict[str, Tensor], logits: Tensor) -> None:
        # New tensors on the device: the batch's memory is reused, and reading it back now would stall the device.
        usable = torch.isfinite(logits).all(1, keepdim=True)
        scores = torch.where(usable, logits, -torch.inf)
        if scores.dtype != torch.float64:
            scores = scores.float()
        self._rows.append((torch.stack((batch["id"], batch["valid"].long())), scores, batch["label"] > 0.5))

    def table(self) -> dict[str, np.ndarray]:
        """Per sample, over all processes: `seen` (bool `[n]`), `scores` (logits) and `labels` (bool) `[n, classes]`.

        Samples that were unreadable are not `seen`; those whose logits are not finite have the lowest scores.
        """
        if self._table:
            return self._table
        classes, dtype = self._rows[0][1].shape[1], self._rows[0][1].cpu().numpy().dtype
        seen, scores = np.zeros(self.samples, dtype), np.zeros((self.samples, classes), dtype)
        labels = np.zeros((self.samples, classes), np.uint8)
        for about, logits, own in self._rows:
            ids, valid = about.cpu().numpy()
            rows = valid > 0
            where = ids[rows]
            seen[where], scores[where], labels[where] = 1, logits.cpu().numpy()[rows], own.cpu().numpy()[rows]
        # Each sample belongs to one process; the others add zeros.
        seen, scores, labels = map(collectives.sum_array, (seen, scores, labels))
        self._table = {"seen": seen > 0, "scores": scores, "labels": labels > 0}
        self._rows.clear()
        return self._table

    def average_precision(self) -> list[float | None]:
        """The average precision of each class in percent; None of a class without labels."""
        if not self._precision:
            seen, scores, labels = self.table().values()
            found = multilabel.average_precision(scores[seen], labels[seen])
            self._precision = [None if value is None else 100 * value for value in found]
        return self._precision

    def metrics(self) -> dict[str, float]:
        """`map`: the mean of the average precision of the classes that have labels, in percent."""
        return {"map": mean([value for value in self.average_precision() if value is not None])}

    def summarize(
        self, table: dict[str, np.ndarray], dataset: Dataset, size: tuple[int, int], crop: float, reading: Reading = RGB
    ) -> dict[str, Any]:
        """What the report shows of the table, as JSON values.

        `classes`; `images`, `right` and `predicted` of each, counts, and `precisions`, the average precision of each;
        `answers`, the most confident wrong ones: an image and a class that is predicted and no label, or a label and
        not predicted.
        """
        # Those without finite logits have no confidence.
        ids = np.flatnonzero(table["seen"] & np.isfinite(table["scores"]).all(1))
        probabilities = torch.from_numpy(table["scores"][ids]).sigmoid().numpy()
        labels = table["labels"][ids]
        predicted = probabilities >= self.threshold
        rows, wrong = np.nonzero(predicted != labels)
        errors = np.abs(labels[rows, wrong] - probabilities[rows, wrong])
        order = np.lexsort((wrong, rows, -errors))[:MISTAKES]
        return {
            "classes": dataset.classes,
            "threshold": self.threshold,
            "images": table["labels"][table["seen"]].sum(0).tolist(),
            "right": (labels & predicted).sum(0).tolist(),
            "predicted": predicted.sum(0).tolist(),
            "precisions": self.average_precision(),
            "seen": int(table["seen"].sum()),
            "answers": [
                {
                    "name": dataset.name(int(ids[row])), "class": int(one), "label": bool(labels[row, one]),
                    "probability": round(float(probabilities[row, one]), 4),
                    "picture": thumbnail(dataset, int(ids[row]), size, crop, reading),
                }
                for row, one in zip(rows[order], wrong[order], strict=True)
            ],
        }  # fmt: skip
