"""Checkpoints: one safetensors file each, no pickle, written so that a crash at any point leaves the earlier ones whole.

`checkpoints/step-00000100.safetensors` holds the flat TrainState and, in its metadata under the key `pcpvt`, a JSON object:
`step`, `config`, `model`, `classes`, `image_size`, `metrics` and `digest`. The digest covers the JSON and every tensor's
name, dtype, shape and bytes, so a flipped or missing byte anywhere is noticed when the file is read.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pcpvt.errors import UserError

KEY = "pcpvt"
FORMAT = 1
_NAME = re.compile(r"step-(\d{8,})\.safetensors")


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, or not one of ours."""


class Checkpoint(NamedTuple):
    path: Path
    meta: dict[str, Any]
    tensors: dict[str, Tensor]


def digest(meta: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """Hex BLAKE2b over the canonical JSON of `meta` (without `digest`) and all tensors in order of their names."""
    total = hashlib.blake2b(digest_size=16)
    total.update(json.dumps({k: v for k, v in meta.items() if k != "digest"}, sort_keys=True).encode())
    for name in sorted(tensors):
        value = tensors[name].contiguous()
        total.update(f"\0{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        total.update(memoryview(value.reshape(-1).view(torch.uint8).numpy()))
    return total.hexdigest()


def save(folder: Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> Path:
    """Writes one checkpoint: temporary name, fsync, rename, fsync of the folder.

    Args:
        tensors: on the host; not changed by anybody while this runs.
        meta: must hold `step`.

    Raises:
        OSError: as the file system gives it; nothing earlier is harmed and no temporary file stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    meta = {"format": FORMAT, **meta}
    meta["digest"] = digest(meta, tensors)
    path = folder / f"step-{meta['step']:08d}.safetensors"
    write_atomically(path, lambda temporary: save_file(tensors, temporary, {KEY: json.dumps(meta)}))
    return path


def write_atomically(path: Path, write) -> None:
    """Calls `write(temporary path)`, then makes the result durable under its final name."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except SafetensorError as error:  # safetensors reports a full disk in its own exception
        raise OSError(f"{path}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_meta(path: Path) -> dict[str, Any]:
    """The JSON of a checkpoint without its tensors.

    Raises:
        CheckpointError: when the file is not a checkpoint of ours.
    """
    try:
        with safe_open(path, "pt") as file:
            meta = json.loads((file.metadata() or {})[KEY])
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint: check the path") from None
    except KeyError:
        raise CheckpointError(
            f"{path}: safetensors, but not a checkpoint of pcpvt: use --config.finetune for weights"
        ) from None
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as a checkpoint ({error}): use another") from None
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: checkpoint of an unknown format: use the version of pcpvt that wrote it"
        )
    return meta


def read(path: Path) -> Checkpoint:
    """A whole checkpoint, verified.

    Raises:
        CheckpointError: when anything of it is damaged.
    """
    meta = read_meta(path)
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: damaged ({error}): use another checkpoint") from None
    if digest(meta, tensors) != meta.get("digest"):
        raise CheckpointError(f"{path}: damaged (its checksum does not match): use another checkpoint")
    return Checkpoint(path, meta, tensors)


def steps(folder: Path) -> dict[int, Path]:
    """Step to file, ascending; temporary files and other names are not counted."""
    if not folder.is_dir():
        return {}
    found = {int(m[1]): entry for entry in folder.iterdir() if (m := _NAME.fullmatch(entry.name))}
    return dict(sorted(found.items()))


def score(meta: dict[str, Any]) -> tuple[float, int]:
    """What "best" means: higher top-1, then the later step; a checkpoint that was not evaluated ranks below all."""
    metrics = meta.get("metrics")
    return (metrics["acc1"] if metrics else -1.0, meta["step"])


def by_score(folder: Path) -> list[Path]:
    """Evaluated checkpoints, best first; unreadable files are left out."""
    ranked = []
    for path in steps(folder).values():
        try:
            meta = read_meta(path)
        except CheckpointError:
            continue
        if meta.get("metrics"):
            ranked.append((score(meta), path))
    return [path for _, path in sorted(ranked, reverse=True)]


def prune(folder: Path, keep: int) -> None:
    """Removes all but the best checkpoint and the `keep` newest, and temporary files that a crash left."""
    everything = list(steps(folder).values())
    wanted = {*everything[-keep:], *by_score(folder)[:1]}
    for path in everything:
        if path not in wanted:
            path.unlink(missing_ok=True)
    for leftover in folder.glob(".step-*.tmp"):
        leftover.unlink(missing_ok=True)
