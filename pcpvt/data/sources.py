"""Datasets: image folders, timm's dataset readers, scikit-learn's digits, and synthetic images.

A dataset is a picklable sequence of (image, label). An image is a path, an open binary file, a PIL image or a decoded
uint8 array `[h, w, 3]`; the loader decodes and augments it.
"""

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


def image_files(folder: str) -> list[str]:
    """The sorted paths of all images below a folder, by their EXTENSIONS; links to folders are followed."""
    paths = (os.path.join(parent, file) for parent, _, files in os.walk(folder, followlinks=True) for file in files)
    return sorted(path for path in paths if os.path.splitext(path)[1].lower() in EXTENSIONS)


class Dataset(Protocol):
    classes: list[str]
    in_memory: bool  # images are decoded already, so no loader processes are needed

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Any, int]: ...

    def name(self, index: int) -> str:
        """A sample's name in messages."""
        ...


class Arrays:
    """Decoded images in memory: uint8 `[n, h, w, 3]`, with labels, int64 `[n]`."""

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
    """Image files in one folder per class, sorted by class and path; classes are the sorted folder names."""

    in_memory = False

    def __init__(self, root: str):
        self.root = root
        self.classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
        self.samples: list[tuple[str, int]] = []
        for label, name in enumerate(self.classes):
            folder = os.path.join(root, name)
            paths = image_files(folder)
            if not paths:
                raise UserError(f"{folder}: no images in this class folder: add some or remove the folder")
            self.samples += [(path, label) for path in paths]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[str, int]:
        return self.samples[index]

    def name(self, index: int) -> str:
        return self.samples[index][0]


class TimmReader:
    """A dataset that timm reads by index: `tar` (PATH/train.tar, PATH/val.tar), `hfds/NAME`, `torch/NAME`.

    Args:
        split: the split's name in timm or in the dataset.

    Raises:
        UserError: when timm cannot open it, or only as a stream, whose order cannot be a function of the seed.
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
                with contextlib.redirect_stdout(None):  # some readers also print their error
                    data = timm.data.create_dataset(name, root=root or None, split=split, is_training=False)
        except (Exception, SystemExit) as error:  # of the reader, its package or the network
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
        self.arguments, self.split = (name, root, split), split
        # timm's reader returns encoded files, so that `decode` decodes them and reports errors.
        self.samples = getattr(data, "reader", data)
        if not len(self):
            raise UserError(f"config.data.name: {name!r}: its {split} split holds no images: check the path")
        indices = getattr(self.samples, "class_to_idx", None) or getattr(self.samples, "class_name_to_idx", None)
        if indices:
            self.classes = sorted(indices, key=indices.get)
        else:
            self.classes = [str(i) for i in range(1 + max(self[i][1] for i in range(len(self))))]

    def __reduce__(self) -> tuple:
        return TimmReader, self.arguments  # an open archive cannot be pickled: each loader process opens its own

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        with decode_errors(self.name(index)):  # torchvision's datasets decode here
            image, label, *_ = self.samples[index]
            return image, int(label)

    def name(self, index: int) -> str:
        name, _, split = self.arguments
        # hfds/... would read the whole sample for a path that it rarely has, and CIFAR10's `filename` is a string.
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
    selected = held_out if split == "val" else ~held_out
    grey = np.round(data.images[selected] * (255 / 16)).astype(np.uint8)
    large = [np.asarray(Image.fromarray(g).resize(size[::-1], Image.Resampling.BICUBIC)) for g in grey]
    images = np.repeat(np.stack(large)[..., None], 3, axis=-1)
    return Arrays(images, data.target[selected], [str(d) for d in range(10)], f"digits/{split}")


def synthetic(split: str, size: tuple[int, int], num_classes: int, count: int = 256) -> Arrays:
    """Random images and labels in memory, for benchmarks that exclude reading."""
    generator = rng.generator(0, f"synthetic/{split}")
    images = generator.integers(0, 256, (count, *size, 3), dtype=np.uint8)
    labels = generator.integers(0, num_classes, count)
    return Arrays(images, labels, [str(i) for i in range(num_classes)], f"synthetic/{split}")


def open_split(
    name: str, path: str, split: str, size: tuple[int, int],
    num_classes: int | None = None, val_split: str = "validation",
) -> Dataset:  # fmt: skip
    """One split of a dataset.

    Args:
        name: `digits`, `folder`, `synthetic`, or a timm dataset name.
        path: the folder that contains `train/` and `val/`, or timm's root.
        split: `train` or `val`.
        val_split: the name of a timm dataset's validation split.

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
        dataset = Folder(root)
    except OSError as error:
        raise UserError(f"config.data.path: {error.filename}: cannot be read ({error.strerror})") from None
    if not len(dataset):
        raise UserError(f"config.data.path: {root} holds no class folders with images: check the path")
    return dataset


def check_classes(train: Dataset, val: Dataset) -> None:
    """Raises UserError unless both splits have the same classes in the same order."""
    if train.classes == val.classes:
        return
    parts = []
    for split, own, other in (("train", train, val), ("val", val, train)):
        if only := sorted(set(own.classes) - set(other.classes)):
            parts.append(f"{len(only)} only in {split} ({', '.join(only[:3])}{', ...' if len(only) > 3 else ''})")
    raise UserError(
        f"config.data.path: train and val have different classes: {'; '.join(parts)}: make the folders agree"
    )
