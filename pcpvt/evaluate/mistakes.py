"""`details.json`, `details-eval.json`: confusion matrix, classes and most confident mistakes of an evaluation.

A `PredictionLog` records each evaluation of a training, and the file is written when that evaluation is the best so
far, so a run needs no extra pass at its end and a killed run has its details too; `--mode=eval` writes its own file.
The cost per batch is a softmax and a maximum; nothing is read back from the device before the end. Every process fills
in its own samples, so the file is exact at any world size.
"""

import base64
import io
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pcpvt.data import augment
from pcpvt.data.decode import RGB, DecodeError, Picture, Reading
from pcpvt.data.sources import Dataset
from pcpvt.distributed import collectives
from pcpvt.errors import one_line
from pcpvt.images import bands
from pcpvt.runtime import records
from pcpvt.runtime.session import Session

Warn = Callable[[str], None]

MISTAKES = 24  # shown in the report
THUMBNAIL = 96  # pixels of the shorter side: 24 JPEGs of this size take some 80 kB
PAIRS = 40 * 40, 10  # confusions kept: all of 40 classes, else 10 per class; at 1000 classes the rest are single cases


class Log(Protocol):
    """What an evaluation records of each image: a `PredictionLog`, or with several labels a `scores.ScoreLog`."""

    def __call__(self, batch: dict[str, Tensor], logits: Tensor) -> None: ...

    def table(self) -> dict[str, np.ndarray]: ...

    def metrics(self) -> dict[str, float]: ...

    def average_precision(self) -> list[float | None] | None: ...

    def summarize(
        self, table: dict[str, np.ndarray], dataset: Dataset, size: tuple[int, int], crop: float, reading: Reading
    ) -> dict[str, Any]: ...


class PredictionLog:
    """Collects predictions; called with each evaluation batch and its logits, on the device."""

    def __init__(self, samples: int):
        self.samples = samples
        self._rows: list[tuple[Tensor, Tensor]] = []

    def __call__(self, batch: dict[str, Tensor], logits: Tensor) -> None:
        probabilities = logits.float().softmax(-1)
        confidence, predicted = probabilities.max(-1)
        own = probabilities.gather(1, batch["label"][:, None])[:, 0]
        valid = batch["valid"] & torch.isfinite(confidence)
        # New tensors on the device: the batch's memory is reused, and reading it back now would stall the device.
        self._rows.append(
            (torch.stack((batch["id"], valid.long(), batch["label"], predicted)), torch.stack((confidence, own)))
        )

    def table(self) -> dict[str, np.ndarray]:
        """Per sample, over all processes: `seen` (bool), `label`, `predicted`, `confidence`, `own` (of the label).

        Samples that were unreadable or whose logits are not finite are not `seen`.
        """
        table: np.ndarray = np.zeros((5, self.samples))
        for whole, fractions in self._rows:
            ids, valid, *labels = whole.cpu().numpy()
            where, rows = ids[valid > 0], valid > 0
            table[0, where] = 1
            for row, values in enumerate((*labels, *fractions.cpu().numpy()), 1):
                table[row, where] = values[rows]
        # Each sample belongs to one process; the others add zeros.
        table = np.array(collectives.sum_numbers(table.reshape(-1).tolist())).reshape(table.shape)
        seen, label, predicted, confidence, own = table
        return {
            "seen": seen > 0, "label": label.astype(np.int64), "predicted": predicted.astype(np.int64),
            "confidence": confidence, "own": own,
        }  # fmt: skip

    def metrics(self) -> dict[str, float]:
        """None beside those that sums give."""
        return {}

    def average_precision(self) -> list[float | None] | None:
        """None: it is of several labels per image (see `scores.ScoreLog`)."""
        return None

    def summarize(
        self, table: dict[str, np.ndarray], dataset: Dataset, size: tuple[int, int], crop: float, reading: Reading = RGB
    ) -> dict[str, Any]:
        """What the report shows of the table; see the function `summarize`."""
        return summarize(table, dataset, size, crop, reading)


def summarize(
    table: dict[str, np.ndarray], dataset: Dataset, size: tuple[int, int], crop: float, reading: Reading = RGB
) -> dict[str, Any]:
    """What the report shows of a `PredictionLog.table`, as JSON values.

    `classes`; `images`, `right` and `predicted` per class; `confusions`, [label, predicted, count] without the right
    ones, most frequent first; `mistakes`, the most confident ones, with pictures of `size` and `crop` as in the
    evaluation.
    """
    seen = table["seen"]
    label, predicted = table["label"][seen], table["predicted"][seen]
    # A head may have more outputs than the data have classes.
    n = max(len(dataset.classes), int(predicted.max(initial=-1)) + 1)
    classes = [*dataset.classes, *(f"output {i}" for i in range(len(dataset.classes), n))]
    pairs, counts = np.unique(label * n + predicted, return_counts=True)
    wrong = [(int(c), int(p) // n, int(p) % n) for p, c in zip(pairs, counts, strict=True) if p // n != p % n]
    wrong.sort(key=lambda item: (-item[0], item[1:]))
    ids = np.flatnonzero(seen & (table["label"] != table["predicted"]))
    ids = ids[np.lexsort((ids, -table["confidence"][ids]))][:MISTAKES]
    return {
        "classes": classes,
        "images": np.bincount(label, minlength=n).tolist(),
        "right": np.bincount(label[label == predicted], minlength=n).tolist(),
        "predicted": np.bincount(predicted, minlength=n).tolist(),
        "confusions": [[i, j, c] for c, i, j in wrong[: max(PAIRS[0], PAIRS[1] * n)]],
        "confusions_in_all": len(wrong),
        "mistakes": [
            {
                "name": dataset.name(int(i)),
                **{name: int(table[name][i]) for name in ("label", "predicted")},
                **{name: round(float(table[name][i]), 4) for name in ("confidence", "own")},
                "picture": thumbnail(dataset, int(i), size, crop, reading),
            }
            for i in ids
        ],
    }  # fmt: skip


def write(
    session: Session, predictions: Log, dataset: Dataset, about: dict[str, Any], warn: Warn,
    file: str = records.DETAILS,
) -> None:  # fmt: skip
    """Write the details on the main process, or warn: the report will lack them. All processes must call this.

    Args:
        about: what was evaluated: `step` of the checkpoint in a training, and the figures of each class.
    """
    table, path = predictions.table(), session.workdir / file
    if session.world.is_main:
        try:
            summary = predictions.summarize(table, dataset, session.size, session.config.eval.crop, session.reading)
            records.write_json(path, {**about, **summary})
        except (OSError, MemoryError) as error:
            warn(f"{path}: not written ({one_line(error)}); the report will lack it")


def thumbnail(dataset: Dataset, index: int, size: tuple[int, int], crop: float, reading: Reading) -> str:
    """A sample's evaluation crop as a small JPEG data URI; empty when it cannot be read any more."""
    scale = min(1.0, THUMBNAIL / min(size))
    small = round(size[0] * scale), round(size[1] * scale)
    try:
        image, _ = dataset[index]  # some readers decode here
        pixels = augment.eval_sample(Picture(image, dataset.name(index), reading), small, crop)
    except DecodeError:
        return ""
    out = io.BytesIO()
    Image.fromarray(bands.shown(pixels)).save(out, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()
