"""Which weights a mode works on, read and checked: `config.checkpoint`, or the best of the workdir; own or foreign.

`--mode=eval`, `predict`, `export` and the Python API all come here, so that one file means the same to each of them:
`load` reads one, `choose` asks the config which, `check_classes` holds them against data, `class_names` says what the
outputs are called. The names of `config.eval.ensemble` are read here too.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict
from torch import Tensor

from pcpvt.checkpoints import checkpoint, foreign
from pcpvt.checkpoints.match import FAMILY, depths, match_params
from pcpvt.config import stored
from pcpvt.errors import UserError, warn
from pcpvt.models import pcpvt

OWN = ("params", "ema")  # in an ensemble: the raw and the averaged weights of the checkpoint that eval would take alone


class LoadedModel(NamedTuple):
    """Weights that fit their model, and what is known about them."""

    path: str  # the file, or timm:NAME
    which: str  # "params" or "ema"
    model: pcpvt.PCPVT
    params: pcpvt.Params  # on the host, float32 or float64
    classes: list[str] | None  # what it was trained on, where the file says so
    meta: dict[str, Any]  # the JSON of our own checkpoints: step, config, image_size, metrics, ...; of others empty
    notes: list[str]  # for the log


def load_model(
    path: str | Path, *, model: str = "", num_classes: int | None = None, which: str = "auto", pad: str = "pad"
) -> LoadedModel:
    """The weights of one file.

    Args:
        path: a file of ours, of timm or of the Twins authors, `timm:NAME`, or a workdir, for its best checkpoint.
        model: a name of `models.pcpvt.SPECS`; empty: the one that the weights belong to.
        num_classes: outputs that the model must have; None: as many as the file's head has.
        which: "params", "ema", or "auto" (see `foreign.read`).
        pad: see `models.pcpvt.PCPVT`.

    Raises:
        UserError: one line, when the file is missing, damaged, or of another model.
    """
    path, found, info = read_weights(path, which)
    name = model or FAMILY.get(depths(found), "")
    if not name:
        raise UserError(f"{path}: the model cannot be told from {depths(found)} blocks per stage: name it")
    head = found.get("head.weight")
    outputs = num_classes or (head.shape[0] if head is not None and head.ndim == 2 else 1000)
    built = pcpvt.build(name, outputs, pad)
    params, notes = match_params(found, pcpvt.shapes(built), head="exact", path=path)
    return LoadedModel(path, info["which"], built, params, info["classes"], info["meta"], [*info["notes"], *notes])


def read_weights(path: str | Path, which: str = "auto") -> tuple[str, dict[str, Tensor], dict[str, Any]]:
    """The file that `path` means, and `foreign.read` of it."""
    path = os.path.expanduser(path)
    if (Path(path) / "checkpoints").is_dir():
        loaded = best_checkpoint(Path(path) / "checkpoints")
        return str(loaded.path), *foreign.from_checkpoint(loaded, which)
    return path, *foreign.read(path, which=which)


def load_configured(config: ConfigDict, workdir: Path) -> LoadedModel:
    """The weights that a config asks for; without `config.checkpoint` the best of the workdir."""
    options = {"num_classes": config.num_classes, "which": config.weights, "pad": config.model.pad}
    return load_model(config.checkpoint or workdir, model=config.model.name, **options)


def best_checkpoint(folder: Path) -> checkpoint.Checkpoint:
    """The best checkpoint of a folder that is whole; damaged ones are named and passed over.

    Raises:
        CheckpointError: when there is none.
    """
    for path in dict.fromkeys([*checkpoint.by_score(folder), *reversed(checkpoint.steps(folder).values())]):
        try:
            return checkpoint.read(path)
        except checkpoint.CheckpointError as error:
            warn(f"{error}; trying the next best")
    raise checkpoint.CheckpointError(
        f"{folder}: holds no usable checkpoint: train first, or give --config.checkpoint=FILE"
    )


def check_labels(chosen: LoadedModel, classes: Sequence[str], num_classes: int | None = None) -> None:
    """Raises UserError unless the data's labels mean the model's outputs.

    Where the file names its classes, the data's must be the same, in the same order. Elsewhere their number must be the
    number of outputs, or `num_classes` must say that the data's are the first of more.
    """
    outputs = chosen.model.num_classes
    if chosen.classes is not None and list(chosen.classes) != list(classes):
        raise UserError(
            f"{chosen.path}: was trained on {_listed(chosen.classes)} and the data have {_listed(classes)}: "
            "give the data it was trained on"
        )
    if chosen.classes is None and len(classes) != outputs and not (num_classes == outputs and len(classes) < outputs):
        raise UserError(
            f"{chosen.path}: has {outputs} classes and the data have {_listed(classes)}: give the data it was trained "
            f"on, or config.num_classes={outputs} if the data's classes are the first of those"
        )


def _listed(names: Sequence[str]) -> str:
    return f"{len(names)} classes ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"


def class_names(chosen: LoadedModel) -> list[str]:
    """What the outputs are called: the file's names, ImageNet's for 1000 unnamed ones, numbers otherwise."""
    outputs = chosen.model.num_classes
    named = list(chosen.classes or ())
    if chosen.classes is None and outputs == 1000:
        from pcpvt import torchvision_compat  # noqa: F401 - before timm
        from timm.data import ImageNetInfo  # isort: skip

        imagenet = ImageNetInfo()
        named = [imagenet.index_to_description(i) for i in range(outputs)]
    return [*named, *(str(i) for i in range(len(named), outputs))]


def member_names(text: str) -> list[str]:
    """The members that `config.eval.ensemble` names; `ema` alone is short for `params,ema`."""
    names = [word.strip() for word in text.split(",") if word.strip()]
    return list(OWN) if names == ["ema"] else names


def trained_config(path: str, members: Sequence[str], workdir: Path) -> tuple[dict[str, Any] | None, str]:
    """The config that weights were trained with, nested, and where it stands; None for weights that bring none.

    Args:
        path: `config.checkpoint`, or empty.
        members: of an ensemble; without `path` the first file of them stands for all.
        workdir: where the config is when no file is named.
    """
    file = os.path.expanduser(path or next((name for name in members if name not in OWN), ""))
    if not file or Path(file).is_dir():
        where = Path(file or workdir) / "config.json"
        return stored.read_config(where), str(where)
    config = checkpoint.read_meta(Path(file)).get("config") if foreign.is_ours(file) else None
    return None if config is None else stored.nested(config), file
