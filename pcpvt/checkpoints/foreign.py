"""Weights files of other programs: reads them for a model, and writes them for timm.

What is read: checkpoints of the Twins authors and of timm (`.pth`, `.pt`, old and new format), plain state dicts,
safetensors, checkpoints of pcpvt, `timm:NAME` from timm's hub, and `hf-hub:OWNER/NAME`, a timm model there, or a folder
as it is there. Nothing in a file is ever run. The result is the flat `dict[str, Tensor]` under the reference names (see
`names`), or a one-line error that says what is wrong and what to do.
"""

import argparse
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from pcpvt.checkpoints import checkpoint, description, hub, tensorfile, unpickle
from pcpvt.checkpoints.atomic import write_atomically
from pcpvt.checkpoints.description import Description
from pcpvt.checkpoints.names import reference_names
from pcpvt.config.fields import GRAPHS
from pcpvt.errors import UserError, one_line

WHICH = ("auto", "params", "ema")
# Where training scripts put a state dict: the Twins authors and DeiT `model`, `model_ema`; timm `state_dict`,
# `state_dict_ema`; `module` is one more wrapping by DDP.
_RAW = ("model", "state_dict", "module")
_EMA = ("model_ema", "state_dict_ema", "ema")
DESCRIPTION = "description"  # metadata key: JSON about an exported model (classes, size, normalisation)
_MAX_NESTING = 8  # deeper than any real file; a pickled dict may even contain itself
MAX_LISTED = 10  # entries in an error


class Weights(NamedTuple):
    """The weights of one file."""

    params: dict[str, Tensor]  # own copies, on the CPU, in the file's dtype
    which: str  # "params" or "ema"
    said: Description  # what the file says about itself
    notes: list[str]  # for the log
    meta: dict[str, Any]  # JSON of a checkpoint of pcpvt; empty for other files

    @property
    def classes(self) -> list[str] | None:
        """Names of the outputs, where the file gives them."""
        return self.said.classes


def read(path_or_name: str | os.PathLike[str], *, which: str = "params") -> Weights:
    """Reads the weights of a local file, of `timm:NAME` or of `hf-hub:OWNER/NAME`.

    Args:
        which: "params" or "ema"; "auto" takes from checkpoints of pcpvt what training evaluated (the average where
            there is one) and from all other files the params.

    Raises:
        UserError: naming the file and the remedy.
    """
    if which not in WHICH:
        raise UserError(f"config.weights: {which!r} is not known: choose from {', '.join(WHICH)}")
    if str(path_or_name).startswith(hub.TIMM):
        if which == "ema":
            raise UserError(f"{path_or_name}: holds no EMA weights, only params: use config.weights=params")
        state, said = hub.fetch_timm(str(path_or_name))
        return _weights(path_or_name, state, "params", said)
    if str(path_or_name).startswith(hub.HUB):
        return _from_hub(str(path_or_name), which)
    path = Path(os.path.expanduser(path_or_name))
    try:
        if path.is_dir() and hub.is_folder(path):
            return _from_folder(path, which)
        if path.is_dir():
            raise UserError(f"{path}: a folder: name the weights file inside it")
        if not path.is_file():
            raise UserError(f"{path}: no such file: give a .pth, .pt or .safetensors file, or timm:NAME")
        if path.suffix in GRAPHS:
            raise UserError(
                f"{path}: an exported graph, which --mode=eval and predict alone take as config.checkpoint: give the "
                "checkpoint that it was exported from"
            )
        with path.open("rb") as file:
            start = file.read(9)
        if not start:
            raise UserError(f"{path}: an empty file: get it again")
        if checkpoint.is_checkpoint(path):
            return from_checkpoint(checkpoint.read(path), which)
        which = "params" if which == "auto" else which
        if start[8:] == b"{":  # a safetensors header follows its own 8-byte length
            return _from_safetensors(path, which)
        if path.suffix == ".safetensors":
            raise UserError(
                f"{path}: not a safetensors file, whatever its name says: get it again, or rename it to "
                ".pth if torch.save wrote it"
            )
        return _from_torch(path, which)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({one_line(error.strerror or error)}): check its permissions"
        ) from None


def _from_hub(name: str, which: str) -> Weights:
    path, said = hub.fetch(name)
    return _described(read(path, which=which), said)


def _from_folder(path: Path, which: str) -> Weights:
    said = describe_folder(path)
    return _described(read(hub.folder_weights(path), which=which), said)


def describe_folder(path: Path) -> Description:
    """What a folder says about itself: its `config.json`, and where that is silent, the header of its weights file."""
    said, own = hub.describe_folder(path), describe_export(path / hub.WEIGHTS)
    return own._replace(**{name: value for name, value in said._asdict().items() if value})


def _described(weights: Weights, said: Description) -> Weights:
    """Weights with what stands beside their file, which settles how their images are normalised."""
    params, notes = description.renormalise(weights.params, said)
    return weights._replace(params=params, said=said, notes=[*weights.notes, *notes])


def _from_safetensors(path: Path, which: str) -> Weights:
    try:
        state, metadata = dict(tensorfile.tensors(path)), tensorfile.metadata(path)
    except OSError:
        raise
    except Exception as error:  # hostile bytes raise almost anything
        raise UserError(f"{path}: a damaged or incomplete safetensors file ({one_line(error)}): get it again") from None
    if which == "ema":
        raise _absent(path, which, ["params"])
    return _weights(path, state, which, _exported(metadata))


def describe_export(path: Path) -> Description:
    """What a file that `--mode=export` wrote says about itself, without its weights; an empty one for other files."""
    try:
        return _exported(tensorfile.metadata(path))
    except (OSError, ValueError, RecursionError):
        return Description()


def _exported(metadata: Mapping[str, Any]) -> Description:
    try:
        return description.from_export(json.loads(metadata.get(DESCRIPTION, "{}")))
    except (ValueError, TypeError, RecursionError):
        return Description()


def from_checkpoint(loaded: checkpoint.Checkpoint, which: str = "auto") -> Weights:
    """`read` for a checkpoint of pcpvt that is already in memory; the optimizer's state is left out."""
    path, meta, tensors = loaded
    groups = {name.split("/")[0] for name in tensors}
    if which == "auto":
        which = "ema" if "ema" in groups else "params"
    if which not in groups:
        raise _absent(path, which, groups)
    prefix = f"{which}/"
    state = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    said = description.from_checkpoint(meta)
    return _weights(path, state, which, said, ema="ema" if "ema" in groups else "")._replace(meta=meta)


def _from_torch(path: Path, which: str) -> Weights:
    top = tree = _plain(unpickle.load(path), path)
    ema_found = ""  # the entry with EMA weights that is taken, or noted when params are
    for _ in range(_MAX_NESTING):
        ema, name = _entry(tree, _EMA), _entry(tree, _RAW)
        if ema and which == "params":
            ema_found = ema
            if not name:
                raise UserError(f"{path}: holds EMA weights only ({ema}), no params: use config.weights=ema")
        elif ema and not ema_found:
            ema_found = name = ema
        if not name:
            break
        tree = _plain(tree[name], path)
    if which == "ema" and not ema_found:
        raise _absent(path, which, ["params"] if tree is top else [str(name) for name in top])
    return _weights(path, tree, which, _script_said(top), ema=ema_found)


def _script_said(top: Mapping[Any, Any]) -> Description:
    """What the entries of a training script's checkpoint say: `classes`, and the arguments of timm's and of Twins'."""
    given = top.get("args")
    args = vars(given) if isinstance(given, argparse.Namespace) else {}
    side = args.get("img_size") or args.get("input_size")  # Twins' input_size is a number, timm's (channels, h, w)
    size = [side, side] if isinstance(side, int) else list(side)[-2:] if isinstance(side, list | tuple) else None
    fields = {"image_size": size, "crop": args.get("crop_pct"), "classes": top.get("classes")}
    fields |= {name: args.get(name) for name in ("mean", "std", "interpolation")}
    return description.from_export(fields)


def _weights(path: object, state: Mapping[Any, Any], which: str, said: Description, ema: str = "") -> Weights:
    """Checked weights; `said` is what their file says, and `ema` the entry with EMA weights, if there is one."""
    notes = [f"{path}: also holds EMA weights ({ema}), which were not asked for"] if ema and which == "params" else []
    params, normalised = description.renormalise(_clean(state, path), said)
    return Weights(params, which, said, [*notes, *normalised], {})


def _absent(path: Path, which: str, holds: Iterable[str]) -> UserError:
    what, other = ("EMA weights", "params") if which == "ema" else ("params", "ema")
    listed = [one_line(name) for name in sorted(holds)]
    more = f" and {len(listed) - MAX_LISTED} more" if len(listed) > MAX_LISTED else ""
    return UserError(
        f"{path}: holds no {what}, only {', '.join(listed[:MAX_LISTED]) or 'nothing'}{more}: "
        f"use config.weights={other}, or give another file"
    )


def _entry(tree: dict[Any, Any], names: Iterable[str]) -> str:
    """The first of the names that leads to a non-empty dict; empty when none does."""
    return next((name for name in names if isinstance(tree.get(name), dict) and dict.__len__(tree[name])), "")


def _plain(value: object, path: Path) -> dict[Any, Any]:
    """A plain copy of a dict: an OrderedDict from a pickle may carry attributes that hide its methods."""
    if not isinstance(value, dict):
        raise UserError(
            f"{path}: holds a {type(value).__name__}, not a dict of tensors: save model.state_dict() instead"
        )
    return dict(dict.items(value))


def _clean(state: Mapping[Any, Any], path: object) -> dict[str, Tensor]:
    """Maps the names to the reference names, refuses all but ordinary tensors, and copies those."""
    if not state:
        raise UserError(f"{path}: holds no tensors: give a file with weights")
    for key, value in state.items():
        fault = _fault(value) if isinstance(key, str) else "has no name that is text"
        if fault:
            raise UserError(f"{path}: entry {one_line(key)} {fault}: save model.state_dict() alone, or under 'model'")
    params: dict[str, Tensor] = {}
    names = reference_names(state, path)
    for key, value in state.items():
        name = names[key]
        if name in params:
            raise UserError(f"{path}: {one_line(name)} is there twice, under different prefixes: keep one of the two")
        # Not value.clone(): an unpickled tensor may carry attributes that hide its methods.
        params[name] = torch.clone(torch.Tensor.detach(value), memory_format=torch.contiguous_format)
    return params


def _fault(value: object) -> str:
    """Why a value is not an ordinary tensor; empty when it is one."""
    if isinstance(value, unpickle.Ignored):
        return "is a numpy value or a path, not a tensor"
    if not isinstance(value, Tensor):
        return f"is of type {type(value).__name__}, not a tensor"
    if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
        return "is sparse, quantised or without data"
    if torch.Tensor.numel(value) * value.itemsize > torch.Tensor.untyped_storage(value).nbytes():
        return "claims more numbers than are stored"
    return ""


def write_timm(params: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Atomically writes safetensors that `timm.create_model(name, num_classes=N, checkpoint_path=path)` loads strictly.

    Raises:
        UserError: when it cannot be written, or when its name does not end in .safetensors, by which timm recognises
            the format.
    """
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: timm reads safetensors by their name only: let it end in .safetensors")
    tensors = {n: v.detach().cpu().clone(memory_format=torch.contiguous_format) for n, v in params.items()}
    described = {"format": "pt", **(metadata or {})}
    try:
        write_atomically(path, lambda temporary: safetensors.torch.save_file(tensors, temporary, described))
    except OSError as error:
        reason = one_line(error.strerror or error)
        raise UserError(
            f"{path}: cannot be written ({reason}): check the folder, its permissions and free space"
        ) from None
