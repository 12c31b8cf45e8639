"""Checkpoints: one safetensors file each, without pickle, written so that a crash leaves the earlier ones whole.

`checkpoints/step-00000100.safetensors` holds the flat TrainState and, in its metadata under the key `pcpvt`, a JSON
object: `step`, `config`, `model`, `classes`, `image_size`, `metrics`, `digest` and what else a resumed run needs. The
digest covers the JSON and every tensor's name, dtype, shape and bytes, so a flipped or missing byte anywhere is noticed
when the file is read. The protocol: temporary name, fsync, read back, rename, fsync of the folder, manifest, pruning.
"""

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from pcpvt.checkpoints import tensorfile
from pcpvt.checkpoints.atomic import remove_leftovers, sync, write_atomically
from pcpvt.errors import UserError
from pcpvt.functional import metrics

KEY = "pcpvt"
FORMAT = 1
MANIFEST = "manifest.json"
NOTES = ("metrics", "best", "records", "stale")  # in the manifest: results of an evaluation later than the checkpoint
_NAME = re.compile(r"step-(\d{8,})\.safetensors")


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, or not one of pcpvt."""


class Checkpoint(NamedTuple):
    path: Path
    meta: dict[str, Any]
    tensors: dict[str, Tensor]


def name_of(step: int) -> str:
    return f"step-{step:08d}.safetensors"


def digest(meta: dict[str, Any], tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Hex BLAKE2b over the canonical JSON of `meta` (without `digest`) and the tensors, in order of their names."""
    total = hashlib.blake2b(digest_size=16)
    total.update(json.dumps({k: v for k, v in meta.items() if k != "digest"}, sort_keys=True).encode())
    for name, value in tensors:
        total.update(f"\0{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        total.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def save(folder: Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> Path:
    """Writes one checkpoint and adds it to the manifest.

    Nothing may change the tensors, which are on the host, while this runs; `meta` must hold `step`. Raises OSError as
    the file system gives it: earlier checkpoints are then unharmed and no temporary file stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name_of(meta["step"])
    checksum = write_tensors(path, tensors, meta)
    written = time.strftime("%Y-%m-%d %H:%M:%S")
    note(folder, path.name, digest=checksum, bytes=path.stat().st_size, written=written)
    return path


def write_tensors(path: Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> str:
    """Writes a checkpoint file, which is read back before it gets its name; returns its digest. See `save`."""
    meta = {"format": FORMAT, **meta}
    meta["digest"] = digest(meta, sorted(tensors.items()))

    def write(temporary: Path) -> None:
        safetensors.torch.save_file(tensors, temporary, {KEY: json.dumps(meta)})
        sync(temporary)
        try:
            _read(temporary, keep_tensors=False)
        except CheckpointError as error:
            raise OSError(f"{path}: what was written does not read back ({error})") from error

    write_atomically(path, write)
    return meta["digest"]


def is_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether a file's header says that it is a checkpoint of pcpvt; False when it is missing or cannot be parsed."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        return KEY in tensorfile.metadata(Path(path))
    return False


def read_meta(path: Path) -> dict[str, Any]:
    """The JSON of a checkpoint with the manifest's notes; the tensors are not read. Raises CheckpointError."""
    return _with_notes(_header(path), path)


def read(path: Path) -> Checkpoint:
    """A whole checkpoint, verified; raises CheckpointError when any part of it is damaged."""
    meta, tensors = _read(path, keep_tensors=True)
    return Checkpoint(path, _with_notes(meta, path), tensors)


def _header(path: Path) -> dict[str, Any]:
    """The JSON in the file, with fields of the right types."""
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
    wrong = _wrong_fields(meta)
    if wrong:
        raise CheckpointError(f"{path}: damaged ({', '.join(wrong)} in its header): use another checkpoint")
    return meta


def _read(path: Path, *, keep_tensors: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The JSON and the tensors of a checkpoint, verified; without `keep_tensors` one at a time is in memory."""
    meta = _header(path)
    try:
        tensors = dict(tensorfile.tensors(path)) if keep_tensors else {}
        checksum = digest(meta, tensors.items() if keep_tensors else tensorfile.tensors(path))
    except Exception as error:  # hostile bytes raise almost anything
        raise CheckpointError(f"{path}: damaged ({error}): use another checkpoint") from None
    if checksum != meta.get("digest"):
        raise CheckpointError(f"{path}: damaged (its checksum does not match): use another checkpoint")
    match = _NAME.fullmatch(path.name)
    if match and int(match[1]) != meta["step"]:
        raise CheckpointError(f"{path}: holds step {meta['step']}, not what its name says: rename it, or use another")
    return meta, tensors


def _is_metrics(value: object) -> bool:
    return value is None or (
        isinstance(value, dict)
        and ("acc1" in value or "map" in value)
        and all(isinstance(v, int | float) for v in value.values())
    )


# Types of the fields: a file from a stranger may hold any well-formed JSON.
_FIELDS: dict[str, Callable[[Any], bool]] = {
    "step": lambda v: type(v) is int and v >= 0,
    "config": lambda v: isinstance(v, dict),
    "classes": lambda v: isinstance(v, list) and all(isinstance(name, str) for name in v),
    "image_size": lambda v: isinstance(v, list) and len(v) == 2 and all(type(side) is int for side in v),
    "examples": lambda v: type(v) is int and v > 0,
    "metrics": _is_metrics,
    "best": _is_metrics,
    "records": lambda v: type(v) is int and v >= 0,
    "stale": lambda v: type(v) is int and v >= 0,
    "teacher": lambda v: isinstance(v, str),
    "class_weights": lambda v: v is None or (isinstance(v, list) and all(isinstance(w, int | float) for w in v)),
}


def _wrong_fields(meta: dict[str, Any]) -> list[str]:
    """The fields of a wrong type; only `step` is required."""
    return [name for name, fits in _FIELDS.items() if (name in meta or name == "step") and not fits(meta.get(name))]


def _with_notes(meta: dict[str, Any], path: Path) -> dict[str, Any]:
    """The JSON with the manifest's notes on the file with this digest, ignored if any is of a wrong type."""
    entry = read_manifest(path.parent).get(path.name, {})
    if entry.get("digest") != meta.get("digest"):
        return meta
    noted = {**meta, **{name: entry[name] for name in NOTES if name in entry}}
    return meta if _wrong_fields(noted) else noted


def note(folder: Path, name: str, **fields: Any) -> None:
    """Adds fields to a checkpoint's entry in the manifest; a new digest resets it. Drops entries of removed files.

    A checkpoint is written before its evaluation, which may be killed; the result is noted here afterwards. A note
    belongs to the file with the same digest and to no other. Raises OSError when the manifest cannot be written; the
    former one then stays.
    """
    entries = {known: entry for known, entry in read_manifest(folder).items() if (folder / known).exists()}
    entry = entries.get(name, {})
    if fields.get("digest", entry.get("digest")) != entry.get("digest"):
        entry = {}  # it describes another file
    entries[name] = {**entry, **fields}
    text = json.dumps({"checkpoints": entries, "checksum": _checksum(entries)}, indent=1) + "\n"
    write_atomically(folder / MANIFEST, lambda temporary: temporary.write_text(text))


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """File name to entry; empty when there is no manifest or it is damaged.

    Every checkpoint can be verified without the manifest, and only an evaluation has to be repeated.
    """
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        value = json.loads((folder / MANIFEST).read_text())
        entries = value["checkpoints"]
        if value["checksum"] == _checksum(entries) and isinstance(entries, dict):
            return {name: entry for name, entry in entries.items() if isinstance(entry, dict)}
    return {}


def _checksum(entries: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(entries, sort_keys=True).encode(), digest_size=16).hexdigest()


def steps(folder: Path) -> dict[int, Path]:
    """Step to file, ascending; files with other names, such as temporary ones, are left out."""
    if not folder.is_dir():
        return {}
    files = {int(m[1]): entry for entry in folder.iterdir() if (m := _NAME.fullmatch(entry.name))}
    return dict(sorted(files.items()))


def is_whole(path: Path) -> bool:
    """Whether a checkpoint verifies."""
    with contextlib.suppress(CheckpointError):
        _read(path, keep_tensors=False)
        return True
    return False


def by_score(folder: Path) -> list[Path]:
    """Evaluated checkpoints, best first by `config.best`, then the later step; unreadable files are left out."""
    ranked = []
    for path in steps(folder).values():
        with contextlib.suppress(CheckpointError):
            meta = read_meta(path)
            if meta.get("metrics"):
                by = str(meta.get("config", {}).get("best", "acc1"))
                ranked.append((metrics.score(meta["metrics"], by), meta["step"], path))
    return [path for *_, path in sorted(ranked, reverse=True)]


def newest_whole(folder: Path) -> Path | None:
    """The newest whole checkpoint in a folder, from which a run would go on."""
    return next((path for path in reversed(steps(folder).values()) if is_whole(path)), None)


def withdraw(folder: Path, passed: int, to: Path) -> tuple[list[str], str]:
    """Moves checkpoints of later steps than `passed` to another folder of the same disk.

    If none is left and `passed` is not 0, the oldest whole one stays: a new beginning would lose too much.

    Returns:
        The names of those moved, and of the later one that stays.
    """
    later = {step: path for step, path in steps(folder).items() if step > passed}
    stays = None
    if passed and not any(is_whole(path) for step, path in steps(folder).items() if step <= passed):
        stays = next((path for path in later.values() if is_whole(path)), None)
    moved = [path for path in later.values() if path != stays]
    for path in moved:
        to.mkdir(parents=True, exist_ok=True)
        path.replace(to / path.name)
    return [path.name for path in moved], stays.name if stays else ""


def prune(
    folder: Path, keep_checkpoints: int, latest: int, verified: dict[Path, bool], passed: int | None = None
) -> None:
    """Removes whole checkpoints up to step `latest` but the newest `keep_checkpoints` and the best, and leftover files.

    The newest up to step `passed` stays too, if it is given.

    Damaged checkpoints are not counted and stay for the user to look at; those after `latest` were found damaged when
    the run was resumed. So the last good checkpoint always stays.

    Args:
        verified: whether each file is whole, as far as it is known; the others are verified and added.
    """
    earlier = [path for step, path in steps(folder).items() if step <= latest]
    verified |= {path: is_whole(path) for path in earlier if path not in verified}
    found = [path for path in earlier if verified[path]]
    kept = [path for path in by_score(folder) if path in found][:1]
    if passed is not None:
        kept += [path for step, path in steps(folder).items() if step <= passed and path in found][-1:]
    for path in found[:-keep_checkpoints]:
        if path not in kept:
            path.unlink(missing_ok=True)
    remove_leftovers(folder)
