"""`config.predict.sort_into`: copies of the classified images, one folder per predicted class."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from pcpvt.errors import UserError


def open_folder(path: str) -> Path:
    """Creates the folder; UserError when that fails or it holds anything, which would mix with the new copies."""
    folder = Path(os.path.expanduser(path))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UserError(f"config.predict.sort_into: {folder} is not empty: name a new folder")
    except OSError as error:
        raise UserError(f"config.predict.sort_into: {folder}: {error.strerror}: choose another folder") from None
    return folder


def folder_names(classes: Sequence[str]) -> list[str]:
    """A folder name for each class: its own name where that can be one, and no name twice."""
    names: dict[str, None] = {}  # in order
    for i, name in enumerate(classes):
        plain = "".join("_" if c in '/\\:*?"<>|' or not c.isprintable() else c for c in name)[:100].strip(" .")
        plain = plain or f"class {i}"
        names[plain if plain not in names else f"{plain} ({i})"] = None
    return list(names)


def copy(path: str, folder: Path, name: str) -> None:
    """Copies an image into a class folder under a name; UserError when that fails."""
    try:
        folder.mkdir(exist_ok=True)
        shutil.copy2(path, folder / name)
    except OSError as error:
        raise UserError(
            f"config.predict.sort_into: {folder / name}: cannot be written ({error.strerror or error}): free space, or "
            "choose another folder"
        ) from None
