"""Images of the data for calibration and comparison, drawn by key and preprocessed as for an evaluation."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from pcpvt import rng
from pcpvt.data import augment
from pcpvt.data.decode import DecodeError, Picture
from pcpvt.data.sources import Dataset
from pcpvt.errors import UserError
from pcpvt.runtime.session import Session


class Sample(NamedTuple):
    """One image."""

    name: str
    pixels: np.ndarray  # uint8 `[h, w, channels]`
    label: Any  # as the dataset gives it


def draw(session: Session, dataset: Dataset, count: int, purpose: str) -> Iterator[Sample]:
    """Up to `count` readable images, at least one, in an order that `config.seed` and `purpose` determine.

    Raises:
        UserError: when none can be read.
    """
    drawn = 0
    for index in rng.generator(session.config.seed, purpose).permutation(len(dataset)).tolist():
        if drawn == count:
            return
        name = dataset.name(index)
        try:
            image, label = dataset[index]  # some readers decode here
            picture = Picture(image, name, session.reading)
            pixels = augment.eval_sample(picture, session.size, session.config.eval.crop)
        except DecodeError:
            if session.config.data.on_error == "error":
                raise
            continue
        drawn += 1
        yield Sample(name, pixels, label)
    if not drawn:
        few = f"none of the {len(dataset)} images ({dataset.split})"
        raise UserError(f"config.data.path: {few} can be read: check the files")
