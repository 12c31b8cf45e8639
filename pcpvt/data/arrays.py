"""Data in memory: scikit-learn's digits, and random images for benchmarks."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

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
    """scikit-learn's 1,797 scanned digits, enlarged bicubically; every fifth of each class is held out as `val`.

    They are read from its file: the import of `sklearn.datasets` takes two thirds as long as torch's.
    """
    from PIL import Image

    package = importlib.util.find_spec("sklearn")
    assert package is not None and package.origin is not None, "scikit-learn is a dependency"
    table = np.loadtxt(Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz", delimiter=",")
    pixels, target = table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(np.int64)
    held_out = np.zeros(len(target), bool)
    for label in range(10):
        held_out[np.flatnonzero(target == label)[::5]] = True
    selected = held_out if split == "val" else ~held_out
    grey = np.round(pixels[selected] * (255 / 16)).astype(np.uint8)
    large = [np.asarray(Image.fromarray(g).resize(size[::-1], Image.Resampling.BICUBIC)) for g in grey]
    images = np.repeat(np.stack(large)[..., None], 3, axis=-1)
    return Arrays(images, target[selected], [str(d) for d in range(10)], f"digits/{split}", split)


def synthetic(split: str, size: tuple[int, int], num_classes: int, count: int = 256) -> Arrays:
    """Random images and labels in memory, for benchmarks that exclude reading."""
    generator = rng.generator(0, f"synthetic/{split}")
    images = generator.integers(0, 256, (count, *size, 3), dtype=np.uint8)
    labels = generator.integers(0, num_classes, count)
    return Arrays(images, labels, [str(i) for i in range(num_classes)], f"synthetic/{split}", split)
