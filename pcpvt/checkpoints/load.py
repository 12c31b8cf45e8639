"""Loads the weights that a command works on: `config.checkpoint`, or the best checkpoint of the workdir.

`--mode=eval`, `predict`, `export` and the Python API all use these functions, so that one file means the same to each.
Weights are matched to their model by names and shapes; an error lists the differences and says what to do. The member
names of `config.eval.ensemble` are parsed here too.
"""

import itertools
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from ml_collections import ConfigDict
from torch import Tensor

from pcpvt.checkpoints import checkpoint, description, foreign, hub
from pcpvt.checkpoints.channels import FIRST, adapt_channels
from pcpvt.checkpoints.checkpoint import CheckpointError
from pcpvt.checkpoints.description import Description
from pcpvt.config import stored
from pcpvt.errors import UserError, one_line, warn
from pcpvt.models import pcpvt

OWN = ("params", "ema")  # in an ensemble: the raw and the averaged weights of the checkpoint that eval would take alone
_FAMILY = {spec.depths: name for name, spec in pcpvt.SPECS.items()}  # blocks per stage: model
HEAD = ("head.weight", "head.bias")
Shapes = Mapping[str, torch.Size]  # of a model's parameters, by name


class Classifier(Protocol):
    """A model whose outputs may have names."""

    @property
    def path(self) -> str: ...

    @property
    def outputs(self) -> int: ...

    @property
    def classes(self) -> list[str] | None: ...


class LoadedModel(NamedTuple):
    """Weights that fit their model, and what is known about them."""

    path: str  # the file, or timm:NAME
    which: str  # "params" or "ema"
    model: pcpvt.PCPVT
    params: pcpvt.Params  # on the host, float32 or float64
    said: Description  # what the file says about itself
    meta: dict[str, Any]  # JSON of a checkpoint of pcpvt: step, config, image_size, metrics, ...; empty for other files
    notes: list[str]  # for the log

    @property
    def classes(self) -> list[str] | None:
        """Names of its training data's classes, where the file gives them."""
        return self.said.classes

    @property
    def outputs(self) -> int:
        """The number of its classes."""
        return self.model.num_classes


def load_model(
    path: str | Path, *, model: str = "", num_classes: int | None = None, which: str = "auto", pad: str = "pad",
    in_chans: int | None = None, task: str = "",
) -> LoadedModel:  # fmt: skip
    """The weights of one file, with their model.

    Args:
        path: a file of pcpvt, of timm or of the Twins authors, `timm:NAME`, `hf-hub:OWNER/NAME`, a folder of such a
            model, or a workdir, for its best checkpoint.
        model: a name of `models.pcpvt.SPECS`; empty: the one that the weights belong to.
        num_classes: outputs that the model must have; None: as many as the file's head has.
        which: "params", "ema", or "auto" (see `foreign.read`).
        pad: see `models.pcpvt.PCPVT`.
        in_chans: channels of the images; None: those of the file.
        task: how the outputs are read (see `functional.tasks`); empty: as the file says, else classes.

    Raises:
        UserError: one line, when the file is missing, damaged, or of another model.
    """
    path, weights = read_weights(path, which)
    name = model or _FAMILY.get(_depths(weights.params), "")
    if not name:
        raise UserError(f"{path}: the model cannot be told from {_depths(weights.params)} blocks per stage: name it")
    head = weights.params.get("head.weight")
    outputs = num_classes or (head.shape[0] if head is not None and head.ndim == 2 else 1000)
    params, adapted = weights.params, list[str]()
    first = params.get(FIRST)
    if in_chans is None:
        in_chans = first.shape[1] if first is not None and first.ndim == 4 else 3
    else:
        params, adapted = adapt_channels(params, in_chans, path)
    built = pcpvt.build(name, outputs, pad, in_chans, task or weights.said.task or "classes")
    params, notes = match_params(params, pcpvt.shapes(built), path=path, exact=True)
    return LoadedModel(
        path, weights.which, built, params, weights.said, weights.meta, [*weights.notes, *adapted, *notes]
    )


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
    options |= {"in_chans": config.model.in_chans, "task": config.task}
    return load_model(config.checkpoint or workdir, model=config.model.name, **options)


def best_checkpoint(folder: Path) -> checkpoint.Checkpoint:
    """The best whole checkpoint of a folder, or the newest if none was evaluated; warns of damaged ones.

    Raises:
        CheckpointError: when there is none.
    """
    for path in dict.fromkeys([*checkpoint.by_score(folder), *reversed(checkpoint.steps(folder).values())]):
        try:
            return checkpoint.read(path)
        except CheckpointError as error:
            warn(f"{error}; trying the next best")
    raise CheckpointError(f"{folder}: holds no usable checkpoint: train first, or give --config.checkpoint=FILE")


def class_names(loaded: Classifier) -> list[str]:
    """Names of the outputs: from the file, ImageNet's for 1000 unnamed ones, numbers for the rest."""
    outputs = loaded.outputs
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

    Without `path` (`config.checkpoint`) the first file among the members of an ensemble decides, else the workdir.
    """
    file = os.path.expanduser(path or next((name for name in members if name not in OWN), ""))
    if not file or (Path(file).is_dir() and not hub.is_folder(Path(file))):
        where = Path(file or workdir) / "config.json"
        return stored.read_config(where), str(where)
    config = checkpoint.read_meta(Path(file)).get("config") if checkpoint.is_checkpoint(file) else None
    return None if config is None else stored.nested(config), file


def describe(path: str, which: str = "auto") -> Description:
    """What weights say about themselves; a model that they do not name is the one that their parameters belong to.

    Of safetensors files of pcpvt only the header is read. UserError as of `foreign.read`.
    """
    path = os.path.expanduser(path)
    if hub.is_name(path):
        return hub.describe(path)
    if hub.is_folder(Path(path)):
        return foreign.describe_folder(Path(path))
    if Path(path).is_dir():
        where = Path(path) / "config.json"
        if not where.is_file():
            return Description()  # the error comes when the weights are read
        return described(stored.read_config(where))
    if checkpoint.is_checkpoint(path):
        return description.from_checkpoint(checkpoint.read_meta(Path(path)))
    said = foreign.describe_export(Path(path))
    if not said.model:
        weights = foreign.read(path, which=which)
        said = weights.said._replace(model=weights.said.model or _FAMILY.get(_depths(weights.params), ""))
    return said


def described(config: Mapping[str, Any]) -> Description:
    """What a stored config, nested, says about the weights that were trained with it."""
    flat = stored.flat(config)
    size = flat.get("image_size")
    return description.from_export(
        {
            "model": flat.get("model.name"),
            "image_size": [size, flat.get("image_width") or size],
            "crop": flat.get("eval.crop"),
            "task": flat.get("task", "classes"),
        }
    )


def origin(finetune: str, workdir: Path) -> str:
    """Where a fine-tuning takes model and image size from: its own workdir once it has begun, else the weights.

    So the weights, which are read at step 0 only, may be gone later.
    """
    begun = (workdir / "config.json").is_file() and bool(checkpoint.steps(workdir / "checkpoints"))
    return str(workdir) if begun and stored.read_config(workdir / "config.json").get("finetune") else finetune


def match_params(
    weights: pcpvt.Params, shapes: Shapes, *, path: object, exact: bool = False, fresh: Collection[str] = ()
) -> tuple[dict[str, Tensor], list[str]]:
    """The weights in the order of the model's `shapes`, and notes for the log.

    16-bit weights are widened to float32, which is exact; float64 stays.

    Args:
        path: for errors.
        exact: every parameter is wanted; otherwise the head is left out when its class count differs or the file has
            none, so that the caller keeps a fresh one.
        fresh: names to leave out, whatever the file has.

    Raises:
        UserError: lists at most ten missing, unexpected and misshapen parameters and says what to do.
    """
    notes, skipped = [], set(fresh)
    if not exact and not skipped.issuperset(HEAD):
        note, replaced = _compare_heads(weights, shapes)
        notes.append(note)
        skipped.update(HEAD if replaced else ())
    wanted = {name: shape for name, shape in shapes.items() if name not in skipped}
    present = [(name, shape, weights[name]) for name, shape in wanted.items() if name in weights]
    missing = [f"missing {name}" for name in wanted if name not in weights]
    unexpected = [f"unexpected {one_line(name)}" for name in weights if name not in shapes and name not in skipped]
    unfit = [
        f"{name} is {_described(value)}, not {tuple(shape)}"
        for name, shape, value in present
        if value.shape != shape or not value.is_floating_point()
    ]
    # One of each kind in turn: five hundred missing parameters must not hide the one of the wrong shape.
    faults = [fault for turn in itertools.zip_longest(missing, unexpected, unfit) for fault in turn if fault]
    if faults:
        more = f"; ... and {len(faults) - foreign.MAX_LISTED} more" if len(faults) > foreign.MAX_LISTED else ""
        listed = "; ".join(faults[: foreign.MAX_LISTED])
        raise UserError(f"{path}: does not fit the model: {listed}{more}: {_remedy(weights, shapes, exact)}")
    wide = (torch.float32, torch.float64)
    if narrow := sorted({_dtype(value) for *_, value in present if value.dtype not in wide}):
        notes.append(f"weights: converted from {', '.join(narrow)} to float32")
    return {name: value if value.dtype in wide else value.float() for name, _, value in present}, notes


def _compare_heads(weights: pcpvt.Params, shapes: Shapes) -> tuple[str, bool]:
    """The log's line about the head, and whether it is left out; `match_params` finds any other fault of it."""
    theirs, ours = weights.get("head.weight"), shapes.get("head.weight")
    if ours is None:
        return "head: the model has none", True
    if not any(name in weights for name in HEAD):
        return f"head: the file has none: a fresh one for {ours[0]} classes", True
    if theirs is not None and theirs.shape[1:] == ours[1:] and theirs.shape[:1] != ours[:1]:
        return f"head: {theirs.shape[0]} classes in the file, {ours[0]} here: replaced by a fresh one", True
    return f"head: kept, {ours[0]} classes in the file and here", False


def _described(value: Tensor) -> str:
    return str(tuple(value.shape)) + ("" if value.is_floating_point() else f" {_dtype(value)}")


def _dtype(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _depths(names: Iterable[str]) -> tuple[int, ...]:
    """Blocks per stage, from names `blocks.{stage}.{block}.`"""
    blocks = {match.groups() for name in names if (match := re.match(r"blocks\.(\d)\.(\d{1,3})\.", name))}
    stages = [stage for stage, _ in blocks]
    return tuple(stages.count(stage) for stage in sorted(set(stages)))


def _remedy(weights: pcpvt.Params, shapes: Shapes, exact: bool) -> str:
    theirs, ours = _depths(weights), _depths(shapes)
    if theirs != ours and theirs in _FAMILY:
        return f"looks like {_FAMILY[theirs]}: use --config.model.name={_FAMILY[theirs]}"
    if theirs and theirs != ours:
        return f"the file has {theirs} blocks per stage, the model {ours}: use the config it was trained with"
    weight, ours_weight = weights.get("head.weight"), shapes.get("head.weight", ())
    if exact and weight is not None and weight.ndim == 2 and weight.shape[:1] != ours_weight[:1]:
        classes = weight.shape[0]
        return f"the file has {classes} classes: set config.num_classes={classes}, or fine-tune from it"
    return "use the config it was trained with, or give a Twins-PCPVT file"
