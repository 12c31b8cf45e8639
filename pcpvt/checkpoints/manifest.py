"""`checkpoints/manifest.json`: the completed checkpoints, their checksums, and the results of later evaluations.

A checkpoint is written before its evaluation, which may be killed; the result is noted here afterwards. A note
belongs to the file with the same digest and to no other. A manifest that is missing or damaged counts as empty: every
checkpoint can be verified without it, and only an evaluation has to be repeated.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

from pcpvt.checkpoints.atomic import write_atomically

FILE = "manifest.json"
NOTES = ("metrics", "best", "records")


def put(folder: Path, name: str, **fields: Any) -> None:
    """Adds fields to the entry of the checkpoint `name`; a new digest resets the entry. Drops entries of removed files.

    Raises:
        OSError: when it cannot be written; the former manifest then stays.
    """
    entries = {known: entry for known, entry in load(folder).items() if (folder / known).exists()}
    entry = entries.get(name, {})
    if fields.get("digest", entry.get("digest")) != entry.get("digest"):
        entry = {}  # it describes another file
    entries[name] = {**entry, **fields}
    text = json.dumps({"checkpoints": entries, "checksum": _checksum(entries)}, indent=1) + "\n"
    write_atomically(folder / FILE, lambda temporary: temporary.write_text(text))


def notes(folder: Path, name: str, digest: str | None) -> dict[str, Any]:
    """What was noted about the checkpoint `name` with this digest."""
    entry = load(folder).get(name, {})
    return {k: entry[k] for k in NOTES if k in entry} if entry.get("digest") == digest else {}


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """File name to entry; empty when there is no manifest or it is damaged."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        value = json.loads((folder / FILE).read_text())
        entries = value["checkpoints"]
        if value["checksum"] == _checksum(entries) and isinstance(entries, dict):
            return {name: entry for name, entry in entries.items() if isinstance(entry, dict)}
    return {}


def _checksum(entries: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(entries, sort_keys=True).encode(), digest_size=16).hexdigest()
