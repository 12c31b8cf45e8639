"""Which output of a model belongs to which class of the data: by name wherever there are names.

A file that names its classes is matched by name. One that does not (timm's, the Twins authors') has ImageNet's classes
if it has 1000 outputs and the data's classes are called by WordNet ids or by numbers; otherwise the outputs are taken
in the order of the data's classes, which is said where the usual orders differ. `config.data.class_map` overrides all.
"""

import collections
import re
from collections.abc import Sequence
from typing import NamedTuple

from ml_collections import ConfigDict

from pcpvt.checkpoints.foreign import Weights
from pcpvt.checkpoints.load import Classifier, class_names
from pcpvt.data.classes import class_order, labels_of, orders_differ, read_map, relabelled
from pcpvt.data.label_sets import LabelSets
from pcpvt.data.sources import Dataset
from pcpvt.errors import UserError
from pcpvt.models.pcpvt import Params

IMAGENET = 1000  # outputs
Outputs = list[int | None]  # of each class of the data; None: the model has none for it


class Matched(NamedTuple):
    """A dataset labelled by a model's outputs."""

    dataset: Dataset
    left_out: dict[str, int]  # images of each class that the model does not know (of several labels: only these)
    notes: list[str]  # for the log
    warnings: list[str]


def by_knowledge(names: Sequence[str] | None, outputs: int, classes: Sequence[str]) -> Outputs | None:
    """The outputs of the classes as far as names tell them; None where the file's names are not known."""
    if names is not None:
        known = {name: i for i, name in enumerate(names[:outputs])}
        return [known.get(name) for name in classes]
    if outputs != IMAGENET or not classes:
        return None
    if all(re.fullmatch(r"n\d{8}", name) for name in classes):
        ids = {name: i for i, name in enumerate(wordnet_ids())}
        return [ids.get(name) for name in classes]
    if all(name.isascii() and name.isdigit() for name in classes) and len(set(map(int, classes))) == len(classes):
        return [int(name) if int(name) < outputs else None for name in classes]
    return None


def wordnet_ids() -> list[str]:
    """The WordNet ids of ImageNet's 1000 classes, in order of the outputs of every model for them."""
    from pcpvt import torchvision_compat  # noqa: F401 - before timm
    from timm.data import ImageNetInfo  # isort: skip

    return list(ImageNetInfo().label_names())


def match(loaded: Classifier, dataset: Dataset, config: ConfigDict) -> Matched:
    """The dataset under labels that are the model's outputs; classes that the model does not know are left out.

    `config.num_classes` confirms that the data's classes, if fewer, are the first outputs. `config.data.class_order`
    and `.class_map` have arranged the dataset already.

    Raises:
        UserError: when no class of the data is known to the model, or nothing tells which outputs they are.
    """
    matched = _match(loaded, dataset, config)
    return _over_all_outputs(loaded, matched, dataset.classes) if isinstance(matched.dataset, LabelSets) else matched


def _match(loaded: Classifier, dataset: Dataset, config: ConfigDict) -> Matched:
    outputs, classes, path = loaded.outputs, dataset.classes, loaded.path
    num_classes, order, class_map = config.num_classes, config.data.class_order, config.data.class_map
    if class_map and read_map(class_map).positional:
        if len(classes) > outputs:
            raise UserError(
                f"config.data.class_map: {class_map}: has labels up to {len(classes) - 1} and {path} has {outputs} "
                "outputs: correct it"
            )
        return Matched(dataset, {}, [], [])
    found = by_knowledge(loaded.classes, outputs, classes)
    if found is None:
        if len(classes) != outputs and not (num_classes == outputs and len(classes) < outputs):
            raise UserError(
                f"{path}: has {outputs} classes and the data have {listed(classes)}: give the data it was trained on, "
                f"config.num_classes={outputs} if the data's classes are the first of those, or config.data.class_map"
            )
        return Matched(dataset, {}, [], assumed_order(path, classes, order))
    if all(output is None for output in found):
        theirs = listed(loaded.classes) if loaded.classes is not None else "ImageNet's classes"
        raise UserError(
            f"{path}: was trained on {theirs} and the data have {listed(classes)}, none of those: give the data it was "
            "trained on, or say by config.data.class_map which class is which"
        )
    if found == list(range(len(classes))):
        return Matched(dataset, {}, [], [])
    unknown = [i for i, output in enumerate(found) if output is None]
    left_out, warnings = {}, []
    if unknown:
        several = isinstance(dataset, LabelSets)
        counts = dataset.counts if isinstance(dataset, LabelSets) else collections.Counter(labels_of(dataset))
        left_out = {classes[i]: int(counts[i]) for i in unknown}
        what = "labels are left out, the images stay" if several else "images are left out"
        warnings = [
            f"{path}: does not know {len(unknown)} classes of the data ({shortened([classes[i] for i in unknown])}): "
            f"their {sum(left_out.values())} {what}"
        ]
    how = "by name" if loaded.classes is not None else "as ImageNet's"
    notes = [f"classes: {len(classes) - len(unknown)} of the model's {outputs} are matched {how}"]
    return Matched(relabelled(dataset, found, class_names(loaded)), left_out, notes, warnings)


def _over_all_outputs(loaded: Classifier, matched: Matched, classes: Sequence[str]) -> Matched:
    """Multi-hot rows over all outputs; a warning where the data's classes lack some of them."""
    dataset, names = matched.dataset, class_names(loaded)
    assert isinstance(dataset, LabelSets)
    if len(dataset.classes) < len(names):
        dataset = dataset.relabelled(range(len(dataset.classes)), names)
    warnings = list(matched.warnings)
    if never := [name for name, n in zip(names, dataset.counts, strict=True) if not n and name not in classes]:
        warnings.append(
            f"{loaded.path}: {len(never)} of its {len(names)} classes ({shortened(never)}) are no labels of the data: "
            "map is over the others, and a prediction of these counts as wrong"
        )
    return matched._replace(dataset=dataset, warnings=warnings)


def assumed_order(path: object, classes: Sequence[str], order: str) -> list[str]:
    """A warning that a file without names is taken to have the data's order, where that is not the only usual one."""
    if order != "auto" or not orders_differ(classes):
        return []
    orders = {name: class_order(classes, name) for name in ("natural", "bytes")}
    assumed = next((name for name, names in orders.items() if names == list(classes)), "the data's")
    return [
        f"{path}: names no classes, so its outputs are taken in the order {assumed} ({shortened(classes)}); in natural "
        f"order, timm's, they are {shortened(orders['natural'])}, by bytes {shortened(orders['bytes'])}: "
        "config.data.class_order=natural or bytes settles it"
    ]


def fit_head(
    path: object, weights: Weights, fresh: Params, classes: Sequence[str], config: ConfigDict
) -> tuple[Params | None, list[str]]:
    """The head to fine-tune from where names tell which class is which, and notes for the log.

    Args:
        fresh: initial parameters of the model.
        classes: of the data.

    Returns:
        `head.weight` and `head.bias` with the file's row of each class that it knows and fresh ones for the others, an
        empty dict for a fresh head, or None to take or leave the file's head whole, by the number of its classes.
    """
    theirs, ours = weights.params.get("head.weight"), fresh["head.weight"]
    positional = bool(config.data.class_map) and read_map(config.data.class_map).positional
    if theirs is None or theirs.shape[1:] != ours.shape[1:] or "head.bias" not in weights.params or positional:
        return None, []
    outputs = len(theirs)
    found = by_knowledge(weights.classes, outputs, classes)
    if found is None:
        kept = outputs == len(ours) == len(classes)
        return None, assumed_order(path, classes, config.data.class_order) if kept else []
    if outputs == len(ours) and found == list(range(len(classes))):
        return None, []
    rows = [i for i, output in enumerate(found) if output is not None]
    if not rows:
        if outputs != len(ours):
            return None, []
        names = listed(weights.classes or ["ImageNet's"])
        return {}, [f"head: none of the file's {names} is among {listed(classes)}: replaced by a fresh one"]
    head, taken = {}, [output for output in found if output is not None]
    for name in ("head.weight", "head.bias"):
        head[name] = fresh[name].clone()
        head[name][rows] = weights.params[name][taken].to(head[name].dtype)
    others = f", {len(ours) - len(rows)} start anew" if len(rows) < len(ours) else ""
    return head, [f"head: {len(rows)} of {len(ours)} classes are taken by name from the file's {outputs}{others}"]


def listed(names: Sequence[str]) -> str:
    """`3 classes (cat, dog, eel)`."""
    return f"{len(names)} classes ({shortened(names)})"


def shortened(names: Sequence[str]) -> str:
    return f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
