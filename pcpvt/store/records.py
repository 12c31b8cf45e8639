"""What a run writes for its reader: `config.json`, `metrics.jsonl`, `result.json`, and the workdir that holds them."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from pcpvt.errors import UserError
from pcpvt.store.checkpoint import write_atomically


def open_workdir(path: Path) -> Path:
    """Creates the workdir and proves that it can be written."""
    try:
        (path / "checkpoints").mkdir(parents=True, exist_ok=True)
        probe = path / f".probe-{os.getpid()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"--workdir: {path} cannot be written ({error.strerror}): choose another with --workdir=DIR"
        ) from None
    return path


def write_json(path: Path, value: dict[str, Any]) -> None:
    """One JSON object, replaced as a whole."""
    text = json.dumps(value, indent=2) + "\n"
    write_atomically(path, lambda temporary: Path(temporary).write_text(text))


def read_config(path: Path) -> dict[str, Any]:
    """The `config.json` of a workdir.

    Raises:
        UserError: when there is none or it is no JSON object.
    """
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: train first, or name the run with --workdir=DIR") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable ({error}): restore it or train again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds no config: restore it or train again")
    return value


def apply_config(config: ConfigDict, stored: dict[str, Any], where: str) -> None:
    """Overwrites a config's fields with stored ones.

    Raises:
        UserError: for a stored field that this version does not know, or one of another type.
    """
    for name, value in stored.items():
        if name not in config:
            raise UserError(f"{where}: unknown field {name!r}: it was written by another version of pcpvt")
        if isinstance(config[name], ConfigDict) and isinstance(value, dict):
            apply_config(config[name], value, where)
            continue
        try:
            config[name] = tuple(value) if isinstance(value, list) else value
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{where}: {name}: {value!r} has the wrong type ({error}): restore the file"
            ) from None


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    """`{"model.name": v}` to `{"model": {"name": v}}`."""
    out: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, leaf = name.split(".")
        node = out
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return out


class MetricsFile:
    """`metrics.jsonl`: one object per record, appended and flushed; on resume, records after the resumed step are dropped."""

    def __init__(self, path: Path, step: int):
        self.path = path
        kept = [line for line in _lines(path) if line["step"] <= step]
        if kept or path.exists():
            text = "".join(json.dumps(line) + "\n" for line in kept)
            write_atomically(path, lambda temporary: Path(temporary).write_text(text))
        self.file = path.open("a")

    def write(self, record: dict[str, Any]) -> None:
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def _lines(path: Path) -> list[dict[str, Any]]:
    """Whole records; a line that a crash cut short is left out."""
    found = []
    if path.exists():
        for line in path.read_text().splitlines():
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
    return [line for line in found if isinstance(line, dict) and "step" in line]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All records of a run, in order."""
    return _lines(path)
