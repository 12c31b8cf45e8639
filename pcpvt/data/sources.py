"""Datasets: image folders, archives, manifests, Hugging Face and torchvision sets, embedded digits, synthetic images.

A dataset is a picklable sequence of (image, label). An image is a path, encoded bytes, an open binary file, a PIL image
or a decoded uint8 array `[h, w, 3]`; the loader decodes and augments it. `readers` finds what lies where.
"""

import difflib
import os
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from pcpvt import rng
from pcpvt.data.shared import Samples
from pcpvt.data.torch_sets import TorchSet
from pcpvt.errors import UserError
from pcpvt.readers import folder, manifest, splits
from pcpvt.readers.archive import Archives, find
from pcpvt.readers.files import identity
from pcpvt.readers.huggingface import HubSet
from pcpvt.readers.listing import Listing
from pcpvt.readers.manifest import Columns
from pcpvt.readers.splits import Splits

STREAMS = ("hfids/", "tfds/", "wds/")  # of timm: their order cannot be a function of the seed
NAMES = ("digits", "folder", "synthetic", "tar", "hfds/NAME", "torch/NAME")


class Dataset(Protocol):
    """Datasets may also have `labels` (int64 `[n]`, without reading an image) and `remarks` for the user."""

    classes: list[str]
    split: str  # as its source calls it
    in_memory: bool  # images are decoded already, so no loader processes are needed

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Any, int]: ...

    def name(self, index: int) -> str:
        """A sample's name in messages."""
        ...


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


class Files:
    """Image files, by their paths.

    Args:
        root: the folder that a file's key, which is the same wherever the data lie, begins below.
    """

    in_memory = False

    def __init__(self, listing: Listing, split: str, root: str):
        self.classes, self.split, self.root = listing.classes, splits.shown(split), root
        self.samples = Samples(zip(listing.paths, listing.labels.tolist(), strict=True))
        self.labels, self.places, self.remarks = listing.labels, listing.places, listing.notes(root)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "places": set()}  # loader processes do not need them

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[str, int]:
        return self.samples[index]

    def name(self, index: int) -> str:
        return self.samples[index][0]

    def key(self, index: int) -> str:
        return self.name(index).removeprefix(self.root + os.sep)

    def shared(self, other: "Files") -> int:
        """Samples of the other split that this one holds too: in the same folders, or of the same path."""
        if self.places:
            here = {path: identity(path) in self.places for path in {os.path.dirname(p) for p, _ in other.samples}}
            return sum(here[os.path.dirname(path)] for path, _ in other.samples)
        return len({path for path, _ in self.samples} & {path for path, _ in other.samples})


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
        self.relabel = np.arange(len(dataset.classes)) if relabel is None else np.array(relabel)
        self.classes = list(dataset.classes if classes is None else classes)
        self.labels, self.remarks = self.relabel[dataset.labels[self.rows]], getattr(dataset, "remarks", [])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, _ = self.dataset[int(self.rows[index])]
        return image, int(self.labels[index])

    def name(self, index: int) -> str:
        return self.dataset.name(int(self.rows[index]))


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
    return Arrays(images, data.target[selected], [str(d) for d in range(10)], f"digits/{split}", split)


def synthetic(split: str, size: tuple[int, int], num_classes: int, count: int = 256) -> Arrays:
    """Random images and labels in memory, for benchmarks that exclude reading."""
    generator = rng.generator(0, f"synthetic/{split}")
    images = generator.integers(0, 256, (count, *size, 3), dtype=np.uint8)
    labels = generator.integers(0, num_classes, count)
    return Arrays(images, labels, [str(i) for i in range(num_classes)], f"synthetic/{split}", split)


def open_split(
    name: str, path: str, split: str, size: tuple[int, int], num_classes: int | None = None,
    wanted: Splits = Splits(), columns: Columns = Columns(),  # noqa: B008 - immutable
) -> Dataset:  # fmt: skip
    """One split of a dataset.

    Args:
        name: one of `NAMES`.
        path: see `docs/data.md`: the folder with the splits, a manifest, archives, or the root of a torchvision set.
        split: `train` or `val`.
        wanted: what these are called in the source.

    Raises:
        UserError: when there is no such data, or it cannot be read.
    """
    splits.check(wanted)
    if name in ("digits", "synthetic"):
        if wanted.fraction or wanted.given("train") or wanted.given("val") not in ("", "val"):
            field = "val_fraction" if wanted.fraction else "train_split" if wanted.given("train") else "val_split"
            raise UserError(f"config.data.{field}: {name} has splits of its own, train and val: leave it unset")
        return digits(split, size) if name == "digits" else synthetic(split, size, num_classes or 1000)
    found = _open(name, os.path.expanduser(path), wanted.source(split), wanted, columns)
    part = _parts(found, wanted)[split == "val"] if wanted.fraction else found
    return part if split == "train" else _with_images(part, wanted)


def _with_images(val: Any, wanted: Splits) -> Any:
    """A validation split; UserError when it has no images at all, of which no metric could be computed."""
    if len(val):
        return val
    if wanted.fraction:
        raise UserError(
            f"config.data.val_fraction: {wanted.fraction:g}: every class has one image, which is for training: add "
            "images, or train without validation by config.eval_every=0"
        )
    raise UserError(
        f"config.data.path: {val.split} has no images: add some, or hold out a part of the training "
        "images by config.data.val_fraction=0.2"
    )


def _parts(whole: Any, wanted: Splits) -> tuple[View, View]:
    """The training and the held-out part of a dataset."""
    held_out = splits.hold_out(whole.labels, whole.key, wanted.fraction, wanted.seed)
    share = 100 * wanted.fraction
    train = View(whole, f"{100 - share:g}% of {whole.split}", np.flatnonzero(~held_out))
    return train, View(whole, f"{share:g}% of {whole.split}", np.flatnonzero(held_out))


def _open(name: str, path: str, split: str, wanted: Splits, columns: Columns) -> Any:
    """A whole split of the source."""
    kind = name.lower()
    if kind.startswith("hfds/"):
        return HubSet(name, path, split, wanted, columns)
    if kind.startswith("torch/"):
        return TorchSet(name, path, wanted.train if split == "train" else wanted.val)
    if kind.startswith(STREAMS):
        raise UserError(f"config.data.name: {name!r} is a stream: use a reader with random access, such as hfds/...")
    if name not in ("folder", "tar"):
        near = difflib.get_close_matches(name, NAMES, 1)
        raise UserError(
            f"config.data.name: {name!r} is not known: "
            + (f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(NAMES)}")
        )
    if not path:
        raise UserError("config.data.path: not set: give the folder that holds train/<class>/* and val/<class>/*")
    if not os.path.exists(path):
        raise UserError(f"config.data.path: {path} does not exist: give the folder that holds train/ and val/")
    suffix = os.path.splitext(path)[1].lower()
    if os.path.isfile(path) and suffix in (".csv", ".tsv"):
        listing, chosen = manifest.read(path, split, wanted, columns)
        return Files(listing, chosen, os.path.dirname(os.path.abspath(path)))
    for field, given in zip(("image_column", "label_column"), columns, strict=True):
        if given:
            raise UserError(f"config.data.{field}: {given!r}: only manifests and hfds/... have columns: leave it unset")
    if name == "tar" or suffix == ".tar":
        return _open_archives(path, split, wanted)
    if not os.path.isdir(path):
        raise UserError(f"config.data.path: {path} is no folder, .csv or .tar file: unpack it, or give another")
    try:
        root, chosen = folder.find(path, split, wanted)
        return Files(folder.read(root, may_be_empty=split == "val"), chosen, root)
    except UserError:
        if find(path, ".") or find(os.path.join(path, split), "."):
            raise UserError(f"config.data.path: {path} holds .tar archives: set config.data.name=tar") from None
        raise


def _open_archives(path: str, split: str, wanted: Splits) -> Archives:
    given = wanted.given(split)
    for chosen in [given] if given else [*splits.USUAL[split], *(["."] if wanted.fraction else [])]:
        if files := find(path, chosen):
            return Archives(files, chosen)
    raise splits.missing_split(path, [os.path.basename(file) for file in find(path, ".")], split, wanted)


def open_training(
    name: str, path: str, size: tuple[int, int], num_classes: int | None = None,
    wanted: Splits = Splits(), columns: Columns = Columns(), *, validates: bool = True,  # noqa: B008 - immutable
) -> tuple[Dataset, Dataset]:  # fmt: skip
    """The training and the validation split, with the same classes; the latter is empty unless `validates`.

    Raises:
        UserError: when one of them cannot be opened, or they do not fit one another.
    """
    arguments = size, num_classes, wanted, columns
    train = open_split(name, path, "train", *arguments)
    if len(train.classes) == 1 and name != "synthetic":
        raise UserError(
            f"config.data.path: the training images have one class, {train.classes[0]!r}: any model would be 100 % "
            "right: put them into one folder per class"
        )
    if not validates:
        return train, Arrays(np.zeros((0, *size, 3), np.uint8), np.zeros(0, np.int64), train.classes, "none", "none")
    if isinstance(train, View):  # the other part of the same images
        val: Dataset = _with_images(_parts(train.dataset, wanted)[1], wanted)
    else:
        val = open_split(name, path, "val", *arguments)
        shared = train.shared(val) if hasattr(train, "shared") and type(train) is type(val) else 0
        if shared:
            raise UserError(
                f"config.data.val_split: {shared} of the {len(val)} validation images ({val.split}) are training "
                f"images ({train.split}) too: give splits without common images, such as train[:80%] and train[80%:] "
                "of hfds/..., or config.data.val_fraction=0.2 alone"
            )
    return train, align(train.classes, val)


def align(classes: Sequence[str], val: Dataset) -> Dataset:
    """The validation split under the labels of the training split's classes, by name; it may lack some of them.

    Raises:
        UserError: when it has images of other classes.
    """
    labels = getattr(val, "labels", None)
    present = set(range(len(val.classes)) if labels is None else np.unique(labels).tolist())
    ours = {name: i for i, name in enumerate(classes)}
    if unknown := [val.classes[i] for i in sorted(present) if val.classes[i] not in ours]:
        raise UserError(
            f"config.data.path: {val.split} has images of {named(unknown)} that the training images lack: remove "
            "them, or add such images to the training ones"
        )
    if list(classes) == val.classes:
        return val
    return View(val, val.split, relabel=[ours.get(name, -1) for name in val.classes], classes=classes)


def absent(dataset: Dataset) -> list[str]:
    """The classes that have no images."""
    labels = getattr(dataset, "labels", None)
    counts = np.bincount([] if labels is None else labels, minlength=len(dataset.classes))
    return [] if labels is None else [name for name, count in zip(dataset.classes, counts, strict=True) if not count]


def named(classes: Sequence[str]) -> str:
    """`2 classes (cat, dog)`."""
    more = ", ..." if len(classes) > 3 else ""
    return f"{len(classes)} class{'es' if len(classes) > 1 else ''} ({', '.join(classes[:3])}{more})"
