"""Stored configs: the `config.json` of a workdir, the flat form in a checkpoint, and applying either to a config."""

import json
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from pcpvt.errors import UserError


def read_config(path: Path) -> dict[str, Any]:
    """The `config.json` of a workdir.

    Raises:
        UserError: when there is none or it is no JSON object.
    """
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: train first, or name the run with --workdir=DIR") from None
    except (OSError, ValueError, RecursionError) as error:
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
            raise UserError(f"{where}: unknown field {name!r}: use the version of pcpvt that wrote it")
        if isinstance(config[name], ConfigDict) and isinstance(value, dict):
            apply_config(config[name], value, where)
            continue
        try:
            if isinstance(config[name], ConfigDict):
                raise TypeError("it holds fields")
            config[name] = tuple(value) if isinstance(value, list) else value
        except (TypeError, ValueError) as error:
            raise UserError(f"{where}: {name}: {value!r} has the wrong type ({error}): restore the file") from None


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """`{"model": {"name": v}}`, also as ConfigDict, to `{"model.name": v}`, values as JSON gives them back."""
    out: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict | ConfigDict):
            out.update(flat(value, f"{prefix}{name}."))
        else:
            out[prefix + name] = list(value) if isinstance(value, tuple) else value
    return out


def nested(fields: dict[str, Any]) -> dict[str, Any]:
    """`{"model.name": v}` to `{"model": {"name": v}}`; where two names claim one place, the later one has it."""
    out: dict[str, Any] = {}
    for name, value in fields.items():
        *parents, leaf = name.split(".")
        node = out
        for parent in parents:
            if not isinstance(node.get(parent), dict):
                node[parent] = {}
            node = node[parent]
        node[leaf] = value
    return out
