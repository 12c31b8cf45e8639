"""Datasets: image folders, archives, manifests, Hugging Face and torchvision sets, embedded digits, synthetic images.

A dataset is a picklable sequence of (image, label). An image is a path, encoded bytes, an open binary file, a PIL image
or a decoded uint8 array `[h, w, 3]`; the loader decodes and augments it. `readers` finds what lies where.
"""

import difflib
import os
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from pcpvt.data.arrays import Arrays, digits, synthetic
from pcpvt.data.label_sets import LabelSets, strata
from pcpvt.data.shared import Samples
from pcpvt.data.torch_sets import TorchSet
from pcpvt.data.view import View
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
    """Datasets may also have `labels` (int64 `[n]`, without reading an image) and `remarks` for the user.

    With several labels per image, a label is a multi-hot row (see `label_sets`).
    """

    classes: list[str]
    split: str  # as its source calls it
    in_memory: bool  # images are decoded already, so no loader processes are needed

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Any, Any]: ...

    def name(self, index: int) -> str:
        """A sample's name in messages."""
        ...


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
        self.sets = listing.sets

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
    return _labelled(_open_numbered(name, path, split, size, num_classes, wanted, columns), columns)


def _labelled(dataset: Any, columns: Columns) -> Dataset:
    """The dataset with its multi-hot labels where images have several."""
    if not columns.several:
        return dataset
    one_each = [(label,) for label in range(len(dataset.classes))]  # of synthetic images
    return LabelSets(dataset, getattr(dataset, "sets", one_each), dataset.classes)


def _open_numbered(
    name: str, path: str, split: str, size: tuple[int, int], num_classes: int | None, wanted: Splits, columns: Columns
) -> Any:
    """One split, its labels whole numbers: of classes, or of sets of them."""
    splits.check(wanted)
    lists = name == "synthetic" or name.lower().startswith("hfds/") or (name == "folder" and _is_manifest(path))
    if columns.several and not lists:
        raise UserError(
            f"config.task: multilabel: {path or name} gives one label per image: give config.data.path=FILE.csv with "
            "rows of path,label;label, or config.data.name=hfds/NAME with a column of lists"
        )
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
    several = getattr(whole, "sets", None)
    labels = whole.labels if several is None else strata(whole.labels, several, len(whole.classes))
    held_out = splits.hold_out(labels, whole.key, wanted.fraction, wanted.seed)
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
    if _is_manifest(path):
        listing, chosen = manifest.read(path, split, wanted, columns)
        return Files(listing, chosen, os.path.dirname(os.path.abspath(path)))
    for field, given in zip(("image_column", "label_column"), columns[:2], strict=True):
        if given:
            raise UserError(f"config.data.{field}: {given!r}: only manifests and hfds/... have columns: leave it unset")
    if name == "tar" or path.lower().endswith(".tar"):
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


def _is_manifest(path: str) -> bool:
    return os.path.splitext(path)[1].lower() in (".csv", ".tsv") and not os.path.isdir(os.path.expanduser(path))


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
    train = _open_numbered(name, path, "train", *arguments)
    if len(train.classes) == 1 and name != "synthetic" and not columns.several:
        raise UserError(
            f"config.data.path: the training images have one class, {train.classes[0]!r}: any model would be 100 % "
            "right: put them into one folder per class"
        )
    if not validates:
        nothing = Arrays(np.zeros((0, *size, 3), np.uint8), np.zeros(0, np.int64), train.classes, "none", "none")
        return _labelled(train, columns), nothing
    if isinstance(train, View):  # the other part of the same images
        val = _with_images(_parts(train.dataset, wanted)[1], wanted)
    else:
        val = _open_numbered(name, path, "val", *arguments)
        shared = train.shared(val) if hasattr(train, "shared") and type(train) is type(val) else 0
        if shared:
            raise UserError(
                f"config.data.val_split: {shared} of the {len(val)} validation images ({val.split}) are training "
                f"images ({train.split}) too: give splits without common images, such as train[:80%] and train[80%:] "
                "of hfds/..., or config.data.val_fraction=0.2 alone"
            )
    return _labelled(train, columns), align(train.classes, _labelled(val, columns))


def align(classes: Sequence[str], val: Dataset) -> Dataset:
    """The validation split under the labels of the training split's classes, by name; it may lack some of them.

    Raises:
        UserError: when it has images of other classes.
    """
    counts = image_counts(val)
    present = set(range(len(val.classes)) if counts is None else np.flatnonzero(counts).tolist())
    ours = {name: i for i, name in enumerate(classes)}
    if unknown := [val.classes[i] for i in sorted(present) if val.classes[i] not in ours]:
        raise UserError(
            f"config.data.path: {val.split} has images of {named(unknown)} that the training images lack: remove "
            "them, or add such images to the training ones"
        )
    if list(classes) == val.classes:
        return val
    if isinstance(val, LabelSets):
        return val.relabelled([ours.get(name) for name in val.classes], classes)
    return View(val, val.split, relabel=[ours.get(name, -1) for name in val.classes], classes=classes)


def absent(dataset: Dataset) -> list[str]:
    """The classes that have no images."""
    counts = image_counts(dataset)
    return [] if counts is None else [name for name, n in zip(dataset.classes, counts, strict=True) if not n]


def image_counts(dataset: Dataset) -> np.ndarray | None:
    """The images of each class, int64 `[classes]`; None where the samples would have to be read for them."""
    if isinstance(dataset, LabelSets):
        return dataset.counts
    labels = getattr(dataset, "labels", None)
    return None if labels is None else np.bincount(labels, minlength=len(dataset.classes))


def named(classes: Sequence[str]) -> str:
    """`2 classes (cat, dog)`."""
    more = ", ..." if len(classes) > 3 else ""
    return f"{len(classes)} class{'es' if len(classes) > 1 else ''} ({', '.join(classes[:3])}{more})"
