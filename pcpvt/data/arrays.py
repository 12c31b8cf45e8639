"""Data in memory: scikit-learn's digits, and random images for benchmarks."""

import functools
import importlib.metadata
from collections.abc import Sequence

import numpy as np

from pcpvt import rng


class Arrays:
    """Decoded images in memory: uint8 `[n, h, w, 3]`, with labels, int64 `[n]`."""

    in_memory = True

    def __init__(self, images: np.ndarray, labels: np.ndarray, classes: Sequence[str], what: str, split: str = "val"):
        self.images, self.labels, self.classes, self.what, self.split = images, labels, list(classes), what, split

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.images[index], int(self.labels[index])

    def name(self, index: int) -> str:
        return f"{self.what}[{index}]"


def digits(split: str, size: tuple[int, int]) -> Arrays:
    """scikit-learn's 1,797 scanned digits, enlarged bicubically; every fifth of each class is held out as `val`."""
    from PIL import Image

    pixels, labels = _read_digits()
    held_out = np.zeros(len(labels), bool)
    for label in range(10):
        held_out[np.flatnonzero(labels == label)[::5]] = True
    selected = held_out if split == "val" else ~held_out
    grey = np.round(pixels[selected] * (255 / 16)).astype(np.uint8)
    large = [np.asarray(Image.fromarray(g).resize(size[::-1], Image.Resampling.BICUBIC)) for g in grey]
    images = np.repeat(np.stack(large)[..., None], 3, axis=-1)
    return Arrays(images, labels[selected], [str(d) for d in range(10)], f"digits/{split}", split)


@functools.cache
def _read_digits() -> tuple[np.ndarray, np.ndarray]:
    """What scikit-learn's `load_digits` gives, without importing it and SciPy, which takes half as long as torch.

    Returns: float `[1797, 8, 8]` from 0 to 16, and labels, int64 `[1797]`.
    """
    file = importlib.metadata.distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")
    table = np.loadtxt(str(file), delimiter=",")
    return table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(np.int64)


def synthetic(split: str, size: tuple[int, int], num_classes: int, count: int = 256) -> Arrays:
    """Random images and labels in memory, for benchmarks that exclude reading."""
    generator = rng.generator(0, f"synthetic/{split}")
    images = generator.integers(0, 256, (count, *size, 3), dtype=np.uint8)
    labels = generator.integers(0, num_classes, count)
    return Arrays(images, labels, [str(i) for i in range(num_classes)], f"synthetic/{split}", split)
