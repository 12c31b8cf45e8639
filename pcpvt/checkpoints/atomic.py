"""Files that are whole or not there: a crash at any point leaves the old content or the new, never a part."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Calls `write(temporary path)`, then makes the result durable under its final name.

    Raises:
        OSError: as the file system gives it; what was at `path` is unharmed and no temporary file stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)  # it might be somebody's link to elsewhere
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)  # safetensors makes its files readable to their owner alone
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except SafetensorError as error:  # what the system said is in its text alone
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise OSError(f"{path}: {error}") from error
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Waits until a file's content, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
        if hasattr(os, "posix_fadvise"):  # what is read back then comes from the disk
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)


def remove_leftovers(folder: Path) -> None:
    """Removes the temporary files of processes that were killed while writing; nobody else may be writing there."""
    for pattern in (".*.tmp", ".tmp??????"):  # ours, and those of safetensors
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)
