"""torchvision's datasets, `torch/NAME`, opened by timm."""

import contextlib
from typing import Any

import numpy as np

from pcpvt.data.decode import decode_errors
from pcpvt.errors import UserError, one_line
from pcpvt.readers.listing import checked_labels

TRAIN, TEST = ("train", "training"), ("validation", "val", "valid", "eval", "evaluation", "test")
TWO_SPLITS = ("cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist", "qmnist")  # timm takes any name for the test's
REMEDY = "the set is damaged: restore it"


class TorchSet:
    """One split of a torchvision dataset, which decodes its images itself.

    Args:
        name: with the prefix `torch/`.
        root: folder that holds it.
        split: its name in timm.

    Raises:
        UserError: when timm cannot open it.
    """

    in_memory = False

    def __init__(self, name: str, root: str, split: str):
        from pcpvt import torchvision_compat  # noqa: F401 - before timm
        import timm.data  # isort: skip
        from PIL import EpsImagePlugin

        EpsImagePlugin.gs_binary = False  # torchvision's datasets decode by themselves: they must not run Ghostscript
        short = name.lower().partition("/")[2]
        if short in ("folder", "image_folder"):
            raise UserError(f"config.data.name: {name!r}: image folders are read with config.data.name=folder")
        if short in TWO_SPLITS and split not in TRAIN + TEST:
            raise UserError(f"config.data.val_split: {split!r}: {name!r} has the splits train and test: name one")
        try:
            with contextlib.redirect_stdout(None):  # some readers also print their error
                data: Any = timm.data.create_dataset(name, root=root or None, split=split, is_training=False)
        except (Exception, SystemExit) as error:  # of the reader, its package or the network
            remedy = "check name, path and config.data.val_split"
            if isinstance(error, ModuleNotFoundError):
                remedy = f"pip install {error.name}"
            raise UserError(
                f"config.data.name: {name!r}: timm could not open its {split} split ({one_line(error)}): {remedy}"
            ) from None
        self.arguments, self.split, self.samples = (name, root, split), split, data
        if not len(self):
            raise UserError(f"config.data.name: {name!r}: its {split} split holds no images: check the path")
        labels = _labels(data)
        indices = getattr(data, "class_to_idx", None)
        if indices:
            self.classes = sorted(indices, key=indices.get)
        elif labels is not None:
            self.classes = [str(i) for i in range(1 + max(labels))]
        else:
            raise UserError(
                f"config.data.name: {name!r}: tells neither class names nor labels without decoding every image: "
                "use it as a folder or through hfds/..."
            )
        if labels is not None:
            self.labels = checked_labels(labels, len(self.classes), self.name, REMEDY)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        with decode_errors(self.name(index)):
            image, label, *_ = self.samples[index]
        label = label.item() if hasattr(label, "item") else label
        return image, int(checked_labels([label], len(self.classes), lambda _: self.name(index), REMEDY)[0])

    def name(self, index: int) -> str:
        name, _, split = self.arguments
        return f"{name}/{split}[{index}]"

    def key(self, index: int) -> str:
        return str(index)

    def shared(self, other: "TorchSet") -> int:
        """Samples that both splits hold."""
        ours, theirs = self.split, other.split
        return len(other) if ours == theirs or {ours, theirs} <= set(TRAIN) else 0


def _labels(data: Any) -> list[Any] | None:
    """The labels that a dataset keeps beside its images; None if it keeps none."""
    for attribute in ("targets", "labels", "samples", "index"):
        values = getattr(data, attribute, None)
        if values is None or callable(values) or len(values) != len(data):
            continue
        if attribute == "samples":  # of (path, label)
            values = [label for _, label in values]
        elif attribute == "index":  # iNaturalist's, of (label, file)
            values = [label for label, _ in values]
        values = np.asarray(values)
        return (values[:, 0] if values.ndim == 2 else values).tolist()  # QMNIST's have eight columns
    return None
