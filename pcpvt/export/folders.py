"""Folders that an export writes: one of an earlier export is replaced only if nothing in it was added or changed.

`export.json` in such a folder lists its files with their digests.
"""

import hashlib
import json
import os
from pathlib import Path

from pcpvt.errors import UserError, one_line

MANIFEST = "export.json"


def replace(new: Path, path: Path) -> None:
    """Lists a new folder's files in it and gives it its final name; `new` lies in a folder that is removed afterwards.

    Raises:
        UserError: see `check`.
    """
    digests = {file.relative_to(new).as_posix(): _digest(file) for file in sorted(new.rglob("*")) if file.is_file()}
    (new / MANIFEST).write_text(json.dumps({"written by": "pcpvt", "files": digests}, indent=2) + "\n")
    check(path)
    if path.exists():
        os.replace(path, new.with_name(f"{new.name}.old"))
    os.replace(new, path)


def check(path: Path) -> None:
    """Raises UserError when something is at `path` that is no empty folder and no unchanged one of an export."""
    if not os.path.lexists(path):
        return
    if not path.is_dir() or path.is_symlink():
        raise UserError(f"config.export.output: {path}: a file or a link: name a new folder")
    known = _manifest(path)
    for parent, _, names in os.walk(path):  # ends at the first such file: it could be a home folder
        for file in (Path(parent, name) for name in sorted(names)):
            name = file.relative_to(path).as_posix()
            if name == MANIFEST:
                continue
            if name not in known:
                raise UserError(
                    f"config.export.output: {path}: holds {one_line(name)}, which no export wrote: give another folder"
                )
            if _digest(file) != known[name]:
                raise UserError(
                    f"config.export.output: {path}: {one_line(name)} was changed since its export: move it out of the "
                    "folder, or give another one"
                )


def _manifest(path: Path) -> dict[str, str]:
    try:
        files = json.loads((path / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    return files if isinstance(files, dict) else {}


def _digest(path: Path) -> str:
    total = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            total.update(block)
    return total.hexdigest()
