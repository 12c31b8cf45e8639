"""Checkpoints: one safetensors file each, no pickle, written so that a crash anywhere leaves the earlier ones whole.

`checkpoints/step-00000100.safetensors` holds the flat TrainState and, in its metadata under the key `pcpvt`, a JSON
object: `step`, `config`, `model`, `classes`, `image_size`, `metrics`, `digest` and what else a resumed run needs. The
digest covers the JSON and every tensor's name, dtype, shape and bytes, so a flipped or missing byte anywhere is noticed
when the file is read. The protocol: temporary name, fsync, read back, rename, fsync of the folder, manifest, pruning.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from pcpvt.checkpoints import manifest, tensorfile
from pcpvt.checkpoints.atomic import remove_leftovers, sync, write_atomically
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


def name_of(step: int) -> str:
    return f"step-{step:08d}.safetensors"


def digest(meta: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """Hex BLAKE2b over the canonical JSON of `meta` (without `digest`) and all tensors in order of their names."""
    return _digest(meta, sorted(tensors.items()))


def _digest(meta: dict[str, Any], tensors: Iterable[tuple[str, Tensor]]) -> str:
    total = hashlib.blake2b(digest_size=16)
    total.update(json.dumps({k: v for k, v in meta.items() if k != "digest"}, sort_keys=True).encode())
    for name, value in tensors:
        total.update(f"\0{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        total.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def save(folder: Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> Path:
    """Writes one checkpoint and enters it in the manifest.

    Args:
        tensors: on the host; not changed by anybody while this runs.
        meta: must hold `step`.

    Raises:
        OSError: as the file system gives it; nothing earlier is harmed and no temporary file stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name_of(meta["step"])
    known = write_tensors(path, tensors, meta)
    written = time.strftime("%Y-%m-%d %H:%M:%S")
    manifest.put(folder, path.name, digest=known, bytes=path.stat().st_size, written=written)
    return path


def write_tensors(path: Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> str:
    """Writes a checkpoint file, which is read back before it gets its name; returns its digest. See `save`."""
    meta = {"format": FORMAT, **meta}
    meta["digest"] = digest(meta, tensors)

    def write(temporary: Path) -> None:
        safetensors.torch.save_file(tensors, temporary, {KEY: json.dumps(meta)})
        sync(temporary)
        try:
            _verify(temporary)
        except CheckpointError as error:
            raise OSError(f"{path}: what was written does not read back ({error})") from error

    write_atomically(path, write)
    return meta["digest"]


def read_meta(path: Path) -> dict[str, Any]:
    """The JSON of a checkpoint without its tensors, which are not looked at.

    Raises:
        CheckpointError: when the file is not a checkpoint of ours.
    """
    return _noted(_checked(_header(path), path), path)


def read(path: Path) -> Checkpoint:
    """A whole checkpoint, verified.

    Raises:
        CheckpointError: when anything of it is damaged.
    """
    tensors: dict[str, Tensor] = {}
    meta = _verify(path, tensors.__setitem__)
    return Checkpoint(path, _noted(meta, path), tensors)


def _header(path: Path) -> dict[str, Any]:
    """Our JSON, as it stands in the file."""
    try:
        meta = json.loads(tensorfile.metadata(path)[KEY])
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint: check the path") from None
    except KeyError:
        raise CheckpointError(
            f"{path}: safetensors, but not a checkpoint of pcpvt: use --config.finetune for weights"
        ) from None
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as a checkpoint ({error}): use another") from None
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise CheckpointError(f"{path}: checkpoint of an unknown format: use the version of pcpvt that wrote it")
    return meta


def _verify(path: Path, keep: Callable[[str, Tensor], None] = lambda name, value: None) -> dict[str, Any]:
    """The JSON of a checkpoint whose digest is right; `keep` is called with each tensor before that is known.

    Raises:
        CheckpointError: when anything of it is damaged.
    """
    meta = _checked(_header(path), path)

    def read() -> Iterator[tuple[str, Tensor]]:
        for name, value in tensorfile.tensors(path):
            keep(name, value)
            yield name, value

    try:
        found = _digest(meta, read())
    except Exception as error:  # hostile bytes raise almost anything
        raise CheckpointError(f"{path}: damaged ({error}): use another checkpoint") from None
    if found != meta.get("digest"):
        raise CheckpointError(f"{path}: damaged (its checksum does not match): use another checkpoint")
    match = _NAME.fullmatch(path.name)
    if match and int(match[1]) != meta["step"]:
        raise CheckpointError(f"{path}: holds step {meta['step']}, not what its name says: rename it, or use another")
    return meta


def _is_metrics(value: object) -> bool:
    return value is None or (
        isinstance(value, dict) and "acc1" in value and all(isinstance(v, int | float) for v in value.values())
    )


# What a well-formed JSON object may still hold in a file from a stranger.
_FIELDS: dict[str, Callable[[Any], bool]] = {
    "step": lambda v: type(v) is int and v >= 0,
    "config": lambda v: isinstance(v, dict),
    "classes": lambda v: isinstance(v, list) and all(isinstance(name, str) for name in v),
    "image_size": lambda v: isinstance(v, list) and len(v) == 2 and all(type(side) is int for side in v),
    "examples": lambda v: type(v) is int and v > 0,
    "metrics": _is_metrics,
    "best": _is_metrics,
    "records": lambda v: type(v) is int and v >= 0,
}


def _checked(meta: dict[str, Any], path: Path) -> dict[str, Any]:
    wrong = [name for name, fits in _FIELDS.items() if name in meta and not fits(meta[name])]
    if wrong or "step" not in meta:
        raise CheckpointError(f"{path}: damaged ({', '.join(wrong) or 'step'} in its header): use another checkpoint")
    return meta


def _noted(meta: dict[str, Any], path: Path) -> dict[str, Any]:
    """The JSON with what the manifest adds to it; notes of the wrong types are none."""
    with contextlib.suppress(CheckpointError):
        return _checked({**meta, **manifest.notes(path.parent, path.name, meta.get("digest"))}, path)
    return meta


def steps(folder: Path) -> dict[int, Path]:
    """Step to file, ascending; temporary files and other names are not counted."""
    if not folder.is_dir():
        return {}
    found = {int(m[1]): entry for entry in folder.iterdir() if (m := _NAME.fullmatch(entry.name))}
    return dict(sorted(found.items()))


def is_whole(path: Path) -> bool:
    """Whether a checkpoint verifies."""
    try:
        return bool(_verify(path))
    except CheckpointError:
        return False


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


def prune(folder: Path, keep: int, latest: int, whole: Callable[[Path], bool] = is_whole) -> None:
    """Removes whole checkpoints up to step `latest` but the `keep` newest and the best one, and a crash's leftovers.

    What is damaged counts for nothing and is left for its owner to look at; what is later than `latest` was found
    damaged when the run was resumed. So the last good checkpoint always stays.
    """
    found = [path for step, path in steps(folder).items() if step <= latest and whole(path)]
    wanted = {*found[-keep:], *[path for path in by_score(folder) if path in found][:1]}
    for path in found:
        if path not in wanted:
            path.unlink(missing_ok=True)
    remove_leftovers(folder)
