"""Loads the weights that a command works on: `config.checkpoint`, or the best checkpoint of the workdir.

`--mode=eval`, `predict`, `export` and the Python API all use these functions, so that one file means the same to each.
The member names of `config.eval.ensemble` are parsed here too.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

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
    classes: list[str] | None  # of its training data, where the file names them
    meta: dict[str, Any]  # JSON of a checkpoint of pcpvt: step, config, image_size, metrics, ...; empty for other files
    notes: list[str]  # for the log


def load_model(
    path: str | Path, *, model: str = "", num_classes: int | None = None, which: str = "auto", pad: str = "pad"
) -> LoadedModel:
    """The weights of one file, with their model.

    Args:
        path: a file of pcpvt, of timm or of the Twins authors, `timm:NAME`, or a workdir, for its best checkpoint.
        model: a name of `models.pcpvt.SPECS`; empty: the one that the weights belong to.
        num_classes: outputs that the model must have; None: as many as the file's head has.
        which: "params", "ema", or "auto" (see `foreign.read`).
        pad: see `models.pcpvt.PCPVT`.

    Raises:
        UserError: one line, when the file is missing, damaged, or of another model.
    """
    path, weights = read_weights(path, which)
    name = model or FAMILY.get(depths(weights.params), "")
    if not name:
        raise UserError(f"{path}: the model cannot be told from {depths(weights.params)} blocks per stage: name it")
    head = weights.params.get("head.weight")
    outputs = num_classes or (head.shape[0] if head is not None and head.ndim == 2 else 1000)
    built = pcpvt.build(name, outputs, pad)
    params, notes = match_params(weights.params, pcpvt.shapes(built), head="exact", path=path)
    return LoadedModel(path, weights.which, built, params, weights.classes, weights.meta, [*weights.notes, *notes])


def read_weights(path: str | Path, which: str = "auto") -> tuple[str, foreign.Weights]:
    """The file that `path` means (of a workdir its best checkpoint), and its weights. See `foreign.read`."""
    path = os.path.expanduser(path)
    if (Path(path) / "checkpoints").is_dir():
        best = best_checkpoint(Path(path) / "checkpoints")
        return str(best.path), foreign.from_checkpoint(best, which)
    return path, foreign.read(path, which=which)


def load_configured(config: ConfigDict, workdir: Path) -> LoadedModel:
    """The weights that a config asks for; without `config.checkpoint` the best of the workdir."""
    options = {"num_classes": config.num_classes, "which": config.weights, "pad": config.model.pad}
    return load_model(config.checkpoint or workdir, model=config.model.name, **options)


def best_checkpoint(folder: Path) -> checkpoint.Checkpoint:
    """The best whole checkpoint of a folder, or the newest if none was evaluated; warns of damaged ones.

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


def check_labels(loaded: LoadedModel, classes: Sequence[str], num_classes: int | None = None) -> None:
    """Checks that the data's labels match the model's outputs.

    Where the file names its classes, the data's must be the same, in the same order. Elsewhere their number must be the
    number of outputs, or smaller if `num_classes` confirms the number of outputs: the data's are then the first ones.

    Raises:
        UserError: when they do not match.
    """
    outputs = loaded.model.num_classes
    if loaded.classes is not None and list(loaded.classes) != list(classes):
        raise UserError(
            f"{loaded.path}: was trained on {_listed(loaded.classes)} and the data have {_listed(classes)}: "
            "give the data it was trained on"
        )
    if loaded.classes is None and len(classes) != outputs and not (num_classes == outputs and len(classes) < outputs):
        raise UserError(
            f"{loaded.path}: has {outputs} classes and the data have {_listed(classes)}: give the data it was trained "
            f"on, or config.num_classes={outputs} if the data's classes are the first of those"
        )


def _listed(names: Sequence[str]) -> str:
    return f"{len(names)} classes ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"


def class_names(loaded: LoadedModel) -> list[str]:
    """Names of the outputs: from the file, ImageNet's for 1000 unnamed ones, numbers for the rest."""
    outputs = loaded.model.num_classes
    names = list(loaded.classes or ())
    if loaded.classes is None and outputs == 1000:
        from pcpvt import torchvision_compat  # noqa: F401 - before timm
        from timm.data import ImageNetInfo  # isort: skip

        imagenet = ImageNetInfo()
        names = [imagenet.index_to_description(i) for i in range(outputs)]
    return [*names, *(str(i) for i in range(len(names), outputs))]


def member_names(text: str) -> list[str]:
    """The members of `config.eval.ensemble`; `ema` alone is short for `params,ema`."""
    names = [word.strip() for word in text.split(",") if word.strip()]
    return list(OWN) if names == ["ema"] else names


def trained_config(path: str, members: Sequence[str], workdir: Path) -> tuple[dict[str, Any] | None, str]:
    """The config that weights were trained with, nested, and the file it comes from; None for weights without one.

    Args:
        path: `config.checkpoint`, or empty.
        members: of an ensemble; without `path`, the first file among them decides.
        workdir: where the config is when no file is named.
    """
    file = os.path.expanduser(path or next((name for name in members if name not in OWN), ""))
    if not file or Path(file).is_dir():
        where = Path(file or workdir) / "config.json"
        return stored.read_config(where), str(where)
    config = checkpoint.read_meta(Path(file)).get("config") if checkpoint.is_checkpoint(file) else None
    return None if config is None else stored.nested(config), file
