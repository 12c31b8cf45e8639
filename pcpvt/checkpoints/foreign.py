"""Other people's weights: read any of the usual files, fit them to a model, and write them for timm.

What is read: checkpoints of the Twins authors and of timm (`.pth`, `.pt`, old and new format), plain state
dicts, safetensors, our own checkpoints, and `timm:NAME` from timm's hub. Nothing in a file is ever run. What
comes out is the flat `dict[str, Tensor]` under the reference names, or one line that says what is wrong and
what to do.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from pcpvt.checkpoints import checkpoint, unpickle
from pcpvt.checkpoints.unpickle import one_line
from pcpvt.errors import UserError, suppress_logging

__all__ = ["WHICH", "from_checkpoint", "is_ours", "read", "write_timm"]

WHICH = ("auto", "params", "ema")
# Where training scripts put a state dict: the Twins authors and DeiT `model`, `model_ema`; timm `state_dict`,
# `state_dict_ema`; `module` is one more wrapping by DDP.
_RAW = ("model", "state_dict", "module")
_EMA = ("model_ema", "state_dict_ema", "ema")
# Left in the names by DDP, torch.compile and wrapper modules; no layer of the model is called so.
_PREFIXES = frozenset({"module", "_orig_mod", "model"})
DESCRIPTION = (
    "description"  # key of the JSON about an exported model (classes, size, normalisation) in a file's metadata
)
_NESTING = 8  # deeper nesting than any real file; a pickled dict may even contain itself
_LISTED = 10


def read(path_or_name: str | os.PathLike[str], *, which: str = "params") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the weights of a local file or of `timm:NAME`.

    Args:
        which: "params" or "ema"; "auto" takes from our own checkpoints what training evaluated (the average where there
            is one) and from all others the params.

    Returns:
        The params (own copies, on the CPU, in the file's dtype) and what was found: `source` ("pcpvt", "safetensors",
        "torch", "timm"), `which` ("params" or "ema"), `entry` (the place inside the file), `epoch` and `step` (int or
        None), `classes` (list of names or None), `notes` (lines for the log), `meta` (the JSON of our own checkpoints).

    Raises:
        UserError: naming the file and the remedy.
    """
    if which not in WHICH:
        raise UserError(f"config.weights: {which!r} is not known: choose from {', '.join(WHICH)}")
    if str(path_or_name).startswith("timm:"):
        return _from_timm(str(path_or_name), which)
    if is_ours(path_or_name):
        path = pathlib.Path(os.path.expanduser(path_or_name))
        try:
            return from_checkpoint(checkpoint.read(path), which)
        except RecursionError:  # JSON of a hostile depth
            raise UserError(f"{path}: damaged (its metadata cannot be read): use another checkpoint") from None
    which = "params" if which == "auto" else which
    path = pathlib.Path(os.path.expanduser(path_or_name))
    try:
        if path.is_dir():
            raise UserError(f"{path}: a folder: name the weights file inside it")
        if not path.is_file():
            raise UserError(f"{path}: no such file: give a .pth, .pt or .safetensors file, or timm:NAME")
        with path.open("rb") as file:
            start = file.read(9)
        if not start:
            raise UserError(f"{path}: an empty file: get it again")
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


def is_ours(path: str | os.PathLike[str]) -> bool:
    """Whether a file says that it is a checkpoint of this program; a damaged or missing one does not."""
    try:
        with safetensors.safe_open(os.path.expanduser(path), framework="pt") as file:
            return checkpoint.KEY in (file.metadata() or {})
    except (safetensors.SafetensorError, OSError, RecursionError):  # the last from JSON of a hostile depth
        return False


def _info(source: str, which: str, entry: str, found: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    def integer(name: str) -> int | None:
        return found[name] if type(found.get(name)) is int else None

    classes = found.get("classes")
    named = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    return {
        "source": source, "which": which, "entry": entry, "epoch": integer("epoch"), "step": integer("step"),
        "classes": classes if named else None, "notes": notes, "meta": dict(found) if source == "pcpvt" else {},
    }  # fmt: skip


def _ema_note(path: object, entry: str) -> str:
    return f"{path}: also holds EMA weights ({entry}), which were not asked for"


def _from_timm(name: str, which: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from pcpvt import torchvision_compat  # noqa: F401, I001  # before timm
    import timm

    if which == "ema":
        raise UserError(f"{name}: holds no EMA weights, only params: use config.weights=params")
    model_name = name.removeprefix("timm:")
    # is_model also keeps timm's own schemes (local-dir:, hf-hub:) out: those may name any file or model.
    if not timm.is_model(model_name):
        known = ", ".join(f"timm:{model}" for model in timm.list_models("twins_pcpvt_*"))
        raise UserError(f"{one_line(name)}: timm has no such model: use one of {known}")
    try:
        with suppress_logging():
            model = timm.create_model(model_name, pretrained=True)
    except Exception as error:  # whatever the network, the hub or timm raise
        raise UserError(
            f"{name}: timm could not fetch it ({type(error).__name__}: {one_line(error)}): try again with a "
            "network, or download the file elsewhere and give its path"
        ) from None
    return _clean(model.state_dict(), name), _info("timm", "params", model_name, {}, [])


def _from_safetensors(path: pathlib.Path, which: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            if which == "ema":
                raise _absent(path, which, ["params"])
            state = {name: file.get_tensor(name) for name in list(file.keys())}
            return _clean(state, path), _info("safetensors", which, "", _described(file.metadata()), [])
    except (safetensors.SafetensorError, RecursionError) as error:  # the second from JSON of a hostile depth
        raise UserError(f"{path}: a damaged or incomplete safetensors file ({one_line(error)}): get it again") from None


def _described(metadata: Mapping[str, str] | None) -> dict[str, Any]:
    """What `write_timm` was told to put beside the tensors; nothing when it is not such JSON."""
    try:
        found = json.loads((metadata or {}).get(DESCRIPTION, "{}"))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def from_checkpoint(loaded: checkpoint.Checkpoint, which: str = "auto") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """`read` for a checkpoint of our own that is open already; the optimizer's moments are left behind."""
    path, meta, tensors = loaded
    groups = {name.split("/")[0] for name in tensors}
    if which == "auto":
        which = "ema" if "ema" in groups else "params"
    if which not in groups:
        raise _absent(path, which, groups)
    prefix = f"{which}/"
    state = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    notes = [_ema_note(path, "ema")] if which == "params" and "ema" in groups else []
    return _clean(state, path), _info("pcpvt", which, which, meta, notes)


def _from_torch(path: pathlib.Path, which: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tree = _plain(unpickle.load(path), path)
    top, entry, at_ema, ema_beside = tree, [], False, ""
    for _ in range(_NESTING):
        ema = next((name for name in _EMA if _is_entry(tree.get(name))), "")
        raw = next((name for name in _RAW if _is_entry(tree.get(name))), "")
        if ema and not at_ema and which == "params":
            ema_beside = ema
            if not raw:
                raise UserError(f"{path}: holds EMA weights only ({ema}), no params: use config.weights=ema")
        step = ema if ema and not at_ema and which == "ema" else raw
        if not step:
            break
        at_ema = at_ema or step == ema
        entry.append(step)
        tree = _plain(tree[step], path)
    if which == "ema" and not at_ema:
        raise _absent(path, which, ["params"] if tree is top else [str(name) for name in top])
    notes = [_ema_note(path, ema_beside)] if ema_beside else []
    return _clean(tree, path), _info("torch", which, ".".join(entry), top, notes)


def _absent(path: object, which: str, holds: Iterable[str]) -> UserError:
    what = "EMA weights" if which == "ema" else "params"
    listed = [one_line(name) for name in sorted(holds)]
    more = f" and {len(listed) - _LISTED} more" if len(listed) > _LISTED else ""
    return UserError(
        f"{path}: holds no {what}, only {', '.join(listed[:_LISTED]) or 'nothing'}{more}: "
        f"use config.weights={'params' if which == 'ema' else 'ema'}, or give another file"
    )


def _is_entry(value: object) -> bool:
    return isinstance(value, dict) and dict.__len__(value) > 0


def _plain(value: object, path: object) -> dict[Any, Any]:
    """A plain copy: an OrderedDict out of a pickle may carry attributes that hide its methods."""
    if not isinstance(value, dict):
        raise UserError(
            f"{path}: holds a {type(value).__name__}, not a dict of tensors: save model.state_dict() instead"
        )
    return dict(dict.items(value))


def _clean(state: Mapping[Any, Any], path: object) -> dict[str, Tensor]:
    """Drop wrapper prefixes at any depth, refuse all but ordinary tensors, and copy those out of the file."""
    if not state:
        raise UserError(f"{path}: holds no tensors: give a file with weights")
    params: dict[str, Tensor] = {}
    for key, value in state.items():
        fault = _fault(value) if isinstance(key, str) else "has no name that is text"
        if fault:
            raise UserError(f"{path}: entry {one_line(key)} {fault}: save model.state_dict() alone, or under 'model'")
        name = ".".join(part for part in key.split(".") if part not in _PREFIXES)
        if name in params:
            raise UserError(f"{path}: {one_line(name)} is there twice, under different prefixes: keep one of the two")
        # Not value.clone(): an unpickled tensor may carry attributes that hide its methods.
        params[name] = torch.clone(torch.Tensor.detach(value), memory_format=torch.contiguous_format)
    return params


def _fault(value: object) -> str:
    if isinstance(value, unpickle.Ignored):
        return "is a numpy value or a path, not a tensor"
    if not isinstance(value, Tensor):
        return f"is of type {type(value).__name__}, not a tensor"
    if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
        return "is sparse, quantised or without data"
    if torch.Tensor.numel(value) * value.itemsize > torch.Tensor.untyped_storage(value).nbytes():
        return "claims more numbers than are stored"
    return ""


def write_timm(
    params: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: dict[str, str] | None = None
) -> None:
    """Write safetensors that `timm.create_model(name, num_classes=N, checkpoint_path=path)` loads strictly.

    The file appears whole or not at all: it is written under a temporary name, flushed to the disk and
    renamed. Raises UserError when it cannot be written, or when its name does not end in .safetensors, by
    which timm tells the format.
    """
    path = pathlib.Path(path)
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: timm reads safetensors by their name only: let it end in .safetensors")
    tensors = {
        name: torch.clone(value.detach().cpu(), memory_format=torch.contiguous_format) for name, value in params.items()
    }
    described = {"format": "pt", **(metadata or {})}
    try:
        checkpoint.write_atomically(path, lambda temporary: safetensors.torch.save_file(tensors, temporary, described))
    except OSError as error:
        reason = one_line(error.strerror or error)
        raise UserError(
            f"{path}: cannot be written ({reason}): check the folder, its permissions and free space"
        ) from None
