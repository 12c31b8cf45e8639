"""Image files below folders: which names are images, which are no data at all, and what is left out.

Every folder is read once, by its identity on disk, so links that lead back above themselves end. Folders come before
links to folders: a link into another class's folder does not take its images.
"""

import collections
import contextlib
import importlib.util
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import features

# The suffixes of the formats that `data.decode` reads.
SUFFIXES = {
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".bmp", ".dib", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm",
    ".pbm", ".pnm", ".npy",
}  # fmt: skip
HEIF = {".heic", ".heif"}  # read where pillow-heif is installed
if importlib.util.find_spec("pillow_heif"):
    SUFFIXES |= HEIF
if "avif" in features.get_supported_modules():  # of Pillow 11.3 and later
    SUFFIXES.add(".avif")
# What systems put beside files: macOS, Synology, ext4, Windows. Names that begin with a dot are no data either.
SYSTEM = {"__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information", "Thumbs.db", "desktop.ini"}

Identity = tuple[int, int]  # of a folder or a file: device and inode


class Found(NamedTuple):
    """Images below one folder."""

    paths: list[str]  # sorted
    left_out: collections.Counter[str]  # other files, by suffix
    folders: set[Identity]  # that were read
    same_as: str  # the folder read before that this one is, by another name; then nothing else is set


def is_data(name: str) -> bool:
    """Whether a file, a folder or a part of a path may be data: not hidden, and not the system's."""
    return not name.startswith(".") and name not in SYSTEM


def suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def is_image(name: str) -> bool:
    return suffix(name) in SUFFIXES


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder or a link to one."""
    with contextlib.suppress(OSError):  # a link to itself
        return entry.is_dir()
    return False


def identity(path: str) -> Identity:
    found = os.stat(path)
    return found.st_dev, found.st_ino


def natural(name: str) -> list[str | int]:
    """A sorting key: numbers by value, without case, as timm sorts."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name.lower())]


def search(folders: Sequence[str], root: str) -> list[Found]:
    """The images below each of the folders.

    Args:
        root: holds the folders; links to it or to what holds it are not followed.

    Raises:
        OSError: when a folder cannot be read.
    """
    above = Path(os.path.realpath(root))
    seen = {identity(str(folder)): str(folder) for folder in (above, *above.parents)}
    found = [Found([], collections.Counter(), set(), "") for _ in folders]
    pending = list(enumerate(folders))
    while pending:
        links: list[tuple[int, str]] = []
        for i, folder in pending:
            inside = [folder]
            while inside:
                current = inside.pop()
                key = identity(current)
                if key in seen:
                    if current == folders[i]:
                        found[i] = found[i]._replace(same_as=seen[key])
                    continue
                seen[key] = current
                found[i].folders.add(key)
                inside += _read(current, i, found[i], links)
        pending = links
    for one in found:
        one.paths.sort()
    return found


def _read(folder: str, number: int, found: Found, links: list[tuple[int, str]]) -> list[str]:
    """Adds one folder's files, and its links to folders; returns the folders in it."""
    inside = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if not is_data(entry.name):
                continue
            if is_folder(entry):
                if entry.is_symlink():
                    links.append((number, entry.path))
                else:
                    inside.append(entry.path)
            elif is_image(entry.name):
                found.paths.append(entry.path)
            else:
                found.left_out[suffix(entry.name)] += 1
    links.sort()  # the order of folders on disk is not a function of their names
    return inside


def image_files(folder: str) -> tuple[list[str], collections.Counter[str]]:
    """The sorted paths of all images below a folder, and the number of other files by suffix; links are followed."""
    (found,) = search([folder], os.path.dirname(os.path.realpath(folder)))
    return found.paths, found.left_out


def left_out_text(counts: collections.Counter[str]) -> str:
    """`3 files: 2 .heic (pip install 'pcpvt[heic]' reads them), 1 without suffix`; empty where there are none."""
    if not counts:
        return ""
    parts = []
    for name, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        hint = " (pip install 'pcpvt[heic]' reads them)" if name in HEIF else ""
        parts.append(f"{count} {name or 'without suffix'}{hint}")
    more = f" and {len(parts) - 6} more kinds" if len(parts) > 6 else ""
    total = sum(counts.values())
    return f"{total} file{'s' if total > 1 else ''}: {', '.join(parts[:6])}{more}"
