"""Where samples come from: image folders, timm's dataset readers, the embedded digits, and synthetic images.

A data set is a picklable sequence of (image, label). An image is a path, an open binary file, a PIL image or a decoded
uint8 array `[h, w, 3]`; decoding and augmenting are the loader's business.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch

from pcpvt import rng
from pcpvt.data.decode import decode_errors
from pcpvt.errors import UserError

EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}


class Dataset(Protocol):
    classes: list[str]
    in_memory: bool  # decoding costs nothing: no loader processes are needed

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Any, int]: ...

    def name(self, index: int) -> str:
        """What to call a sample in a message."""
        ...


class Arrays:
    """Decoded images in memory: uint8 `[n, h, w, 3]` and int64 `[n]`."""

    in_memory = True

    def __init__(self, images: np.ndarray, labels: np.ndarray, classes: Sequence[str], what: str):
        self.images, self.labels, self.classes, self.what = images, labels, list(classes), what

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.images[index], int(self.labels[index])

    def name(self, index: int) -> str:
        return f"{self.what}[{index}]"


class Folder:
    """Files below one folder per class, in sorted order; classes are the sorted folder names."""

    in_memory = False

    def __init__(self, root: str):
        self.root = root
        self.classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
        self.samples: list[tuple[str, int]] = []
        for label, name in enumerate(self.classes):
            found = [
                os.path.join(folder, file)
                for folder, _, files in os.walk(os.path.join(root, name), followlinks=True)
                for file in files
                if os.path.splitext(file)[1].lower() in EXTENSIONS
            ]
            if not found:
                raise UserError(
                    f"{os.path.join(root, name)}: no images in this class folder: add some or remove the folder"
                )
            self.samples += [(path, label) for path in sorted(found)]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[str, int]:
        return self.samples[index]

    def name(self, index: int) -> str:
        return self.samples[index][0]


class TimmReader:
    """A dataset that timm reads by index: `tar` (PATH/train.tar, PATH/val.tar), `hfds/NAME`, `torch/NAME`.

    Args:
        split: as timm or the data set calls it.

    Raises:
        UserError: when timm cannot open it, or only as a stream: the order of samples is a function of the seed here.
    """

    in_memory = False

    def __init__(self, name: str, root: str, split: str):
        from pcpvt import torchvision_compat  # noqa: F401 - before timm
        import timm.data  # isort: skip

        try:
            if name == "tar":
                file = os.path.join(root, f"{split}.tar")
                data = timm.data.create_dataset("", root=file if os.path.exists(file) else os.path.join(root, split))
            else:
                with contextlib.redirect_stdout(None):  # some readers print what they raise
                    data = timm.data.create_dataset(name, root=root or None, split=split, is_training=False)
        except (Exception, SystemExit) as error:  # whatever the reader, its package or the network raise
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            remedy = "check name, path and config.data.val_split"
            if isinstance(error, ModuleNotFoundError):
                remedy = f"pip install {error.name}"
            raise UserError(
                f"config.data.name: {name!r}: timm could not open its {split} split ({reason}): {remedy}"
            ) from None
        if isinstance(data, torch.utils.data.IterableDataset):
            raise UserError(
                f"config.data.name: {name!r} is a stream: use a reader with random access, such as hfds/..."
            )
        self.opened = (name, root, split)
        # timm's reader hands over files still encoded, which leaves decoding, and its errors, to this package.
        self.samples = getattr(data, "reader", data)
        count = len(self.samples)
        if not count:
            raise UserError(f"config.data.name: {name!r}: its {split} split holds no images: check the path")
        known = getattr(self.samples, "class_to_idx", None) or getattr(self.samples, "class_name_to_idx", None)
        if known:
            self.classes = sorted(known, key=known.get)
        else:
            self.classes = [str(i) for i in range(1 + max(self[i][1] for i in range(count)))]

    def __reduce__(self) -> tuple:
        return TimmReader, self.opened  # an open archive cannot travel to a loader process: each opens its own

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        with decode_errors(self.name(index)):  # torchvision's sets decode here
            image, label, *_ = self.samples[index]
            return image, int(label)

    def name(self, index: int) -> str:
        name, _, split = self.opened
        # hfds/... would read the whole sample for a path that is seldom there, and CIFAR10's `filename` is a text.
        if name.lower().startswith(("hfds/", "torch/")):
            return f"{name}/{split}[{index}]"
        return self.samples.filename(index, absolute=True)


def digits(split: str, size: tuple[int, int]) -> Arrays:
    """scikit-learn's 1,797 scanned digits, enlarged bicubically; every fifth of each class is held out as `val`."""
    from PIL import Image
    from sklearn.datasets import load_digits

    data = load_digits()
    held_out = np.zeros(len(data.target), bool)
    for label in range(10):
        held_out[np.flatnonzero(data.target == label)[::5]] = True
    chosen = held_out if split == "val" else ~held_out
    grey = np.round(data.images[chosen] * (255 / 16)).astype(np.uint8)
    large = [np.asarray(Image.fromarray(g).resize(size[::-1], Image.Resampling.BICUBIC)) for g in grey]
    images = np.repeat(np.stack(large)[..., None], 3, axis=-1)
    return Arrays(images, data.target[chosen], [str(d) for d in range(10)], f"digits/{split}")


def synthetic(split: str, size: tuple[int, int], num_classes: int, count: int = 256) -> Arrays:
    """Noise images with labels, for benchmarks: reading them costs nothing."""
    generator = rng.generator(0, f"synthetic/{split}")
    images = generator.integers(0, 256, (count, *size, 3), dtype=np.uint8)
    labels = generator.integers(0, num_classes, count)
    return Arrays(images, labels, [str(i) for i in range(num_classes)], f"synthetic/{split}")


def open_split(
    name: str,
    path: str,
    split: str,
    size: tuple[int, int],
    num_classes: int | None = None,
    val_split: str = "validation",
) -> Dataset:
    """One split of a data set.

    Args:
        name: `digits`, `folder`, `synthetic`, or a timm dataset name.
        path: the folder that holds `train/` and `val/`, or timm's root.
        split: `train` or `val`.
        val_split: what a timm dataset calls its `val`.

    Raises:
        UserError: for a missing or empty folder, or a name that timm cannot open.
    """
    if name == "digits":
        return digits(split, size)
    if name == "synthetic":
        return synthetic(split, size, num_classes or 1000)
    path = os.path.expanduser(path)
    if name != "folder":
        return TimmReader(name, path, val_split if split == "val" and name != "tar" else split)
    if not path:
        raise UserError("config.data.path: not set: give the folder that holds train/<class>/* and val/<class>/*")
    root = os.path.join(path, split)
    if not os.path.isdir(root):
        raise UserError(f"config.data.path: {root} is no folder: give the one that holds train/ and val/")
    try:
        source = Folder(root)
    except OSError as error:
        raise UserError(f"config.data.path: {error.filename}: cannot be read ({error.strerror})") from None
    if not len(source):
        raise UserError(f"config.data.path: {root} holds no class folders with images: check the path")
    return source


def check_classes(train: Dataset, val: Dataset) -> None:
    """Raises UserError unless both splits have the same classes in the same order."""
    if train.classes == val.classes:
        return
    only_train = sorted(set(train.classes) - set(val.classes))
    only_val = sorted(set(val.classes) - set(train.classes))
    parts = [
        f"{len(only)} only in {split} ({', '.join(only[:3])}{', ...' if len(only) > 3 else ''})"
        for split, only in (("train", only_train), ("val", only_val))
        if only
    ]
    raise UserError(
        f"config.data.path: train and val have different classes: {'; '.join(parts)}: make the folders agree"
    )
