"""`checkpoints/manifest.json`: the checkpoints that were written whole, their checksums, and what became known later.

A checkpoint is written before it is evaluated, so that an evaluation can be killed; its result is noted here. A note
belongs to the file with the same digest and to no other. A manifest that is missing or damaged counts as empty: a
checkpoint describes and verifies itself, and only an evaluation has to be repeated.
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


def put(folder: Path, name: str, **entry: Any) -> None:
    """Adds to the entry of the checkpoint `name`, which a new digest starts anew; entries of files that are gone go.

    Raises:
        OSError: when it cannot be written; the former manifest then stays.
    """
    entries = {known: value for known, value in load(folder).items() if (folder / known).exists()}
    former = entries.get(name, {})
    if entry.get("digest", former.get("digest")) != former.get("digest"):
        former = {}  # what was noted is about another file
    entries[name] = {**former, **entry}
    value = {"checkpoints": entries, "checksum": _checksum(entries)}
    text = json.dumps(value, indent=1) + "\n"
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
