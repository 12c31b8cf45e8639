"""Tar archives: `<class>/**` as in folders, or WebDataset's `KEY.jpg` with its label in `KEY.cls`.

The headers of an archive are read whenever it is opened, at 16 us a member, so what is known of it is never out of date
and nothing is written beside it. An image is then read at its position in the file. Archives inside archives are read
too. The class is the innermost folder, or, for images at the top, the name of their archive; classes and images are
sorted as timm sorts them (`files.natural`).
"""

import collections
import glob
import os
import tarfile
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from pcpvt.errors import UserError
from pcpvt.readers.files import identity, is_data, is_image, left_out_text, natural, suffix
from pcpvt.readers.listing import name_labels
from pcpvt.readers.splits import shown


class Member(NamedTuple):
    """A file in an archive, which may be inside another one."""

    archive: int  # index of the outer archive
    path: str  # in its archive
    folder: str  # that it lies in, or the name of the inner archive, or of the outer one if there are several
    offset: int  # bytes from the start of the outer archive
    size: int  # bytes


class Archives:
    """The images of one split's archives, as a dataset: an image is the bytes of its file.

    Args:
        files: paths of the archives.
        split: their name.

    Raises:
        UserError: for an archive that is damaged or compressed, one without images, or a label that cannot be read.
    """

    in_memory = False

    def __init__(self, files: Sequence[str], split: str):
        self.files, self.split = sorted(files), shown(split)
        self.left_out: collections.Counter[str] = collections.Counter()
        members: list[Member] = []
        labels: list[Member] = []
        self.stamps = [_stamp(os.stat(file)) for file in self.files]
        for number in range(len(self.files)):
            for member in self._members(number):
                (labels if suffix(member.path) == ".cls" else members).append(member)
        members = sorted(members, key=lambda member: natural(member.path))
        if not members:
            raise UserError(f"config.data.path: {self.files[0]}: holds no images: check the path")
        self.paths = [member.path for member in members]
        self.archive = np.array([member.archive for member in members], np.int32)
        self.offset = np.array([member.offset for member in members], np.int64)
        self.size = np.array([member.size for member in members], np.int64)
        text = left_out_text(self.left_out)
        self.remarks = [f"{self.files[0]}{', ...' if len(self.files) > 1 else ''}: left out {text}"] if text else []
        self.classes, self.labels = self._by_number(members, labels) if labels else self._by_folder(members)

    def _members(self, number: int) -> Iterator[Member]:
        """The images and labels of one archive; other files are counted."""
        file = self.files[number]
        stem = os.path.splitext(os.path.basename(file))[0]
        if len(self.files) == 1 or stem.startswith(f"{self.split}-"):
            stem = ""  # it names no class
        try:
            with tarfile.open(file, "r:") as archive:
                yield from self._walk(archive, number, stem, 0)
        except tarfile.ReadError as error:
            raise UserError(
                f"config.data.path: {file}: cannot be read as a tar archive ({error}): restore it, or unpack it if "
                "it is compressed"
            ) from None
        except OSError as error:
            raise UserError(f"config.data.path: {file}: cannot be read ({error.strerror or error})") from None

    def _walk(self, archive: tarfile.TarFile, number: int, stem: str, start: int) -> Iterator[Member]:
        for info in archive:
            archive.members = []  # type: ignore[attr-defined]  # tarfile keeps all of them, 2 kB each
            parts = [part for part in info.name.split("/") if part not in (".", "")]
            if info.isdir() or not all(map(is_data, parts)):
                continue
            if not info.isreg() or info.issparse():
                self.left_out["(link or device)"] += 1
            elif suffix(info.name) == ".tar":
                inner = archive.extractfile(info)
                assert inner is not None
                with tarfile.open(fileobj=inner, mode="r:") as nested:
                    name = os.path.splitext(parts[-1])[0]
                    yield from self._walk(nested, number, name, start + info.offset_data)
            elif is_image(info.name) or suffix(info.name) == ".cls":
                folder = parts[-2] if len(parts) > 1 else stem
                yield Member(number, "/".join(parts), folder, start + info.offset_data, info.size)
            else:
                self.left_out[suffix(info.name)] += 1

    def _by_folder(self, members: Sequence[Member]) -> tuple[list[str], np.ndarray]:
        classes = sorted({member.folder for member in members}, key=natural)
        positions = {name: i for i, name in enumerate(classes)}
        return classes, np.array([positions[member.folder] for member in members], np.int64)

    def _by_number(self, members: Sequence[Member], files: Sequence[Member]) -> tuple[list[str], np.ndarray]:
        """Classes and labels from `.cls` files: class numbers, or names."""
        texts: dict[tuple[int, str], str] = {}
        for file in files:
            content = self._read(file.archive, file.offset, file.size)
            texts[file.archive, _key(file.path)] = content.decode("utf-8", "backslashreplace").strip()
        found: list[str | None] = [texts.get((member.archive, _key(member.path))) for member in members]
        known = [text for text in found if text is not None]
        numeric = all(text.lstrip("-").isdigit() for text in known)
        labels = [int(text) if numeric and text is not None else text for text in found]
        return name_labels(labels, self.name, "correct its .cls file")

    def _read(self, archive: int, offset: int, size: int) -> bytes:
        with open(self.files[archive], "rb") as file:
            if _stamp(os.fstat(file.fileno())) != self.stamps[archive]:
                raise UserError(f"config.data.path: {self.files[archive]}: has changed since it was opened: restart")
            file.seek(offset)
            return file.read(size)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        place = int(self.archive[index]), int(self.offset[index]), int(self.size[index])
        return self._read(*place), int(self.labels[index])

    def name(self, index: int) -> str:
        return f"{self.files[self.archive[index]]}:{self.paths[index]}"

    def key(self, index: int) -> str:
        return f"{os.path.basename(self.files[self.archive[index]])}:{self.paths[index]}"

    def shared(self, other: "Archives") -> int:
        """Samples that both splits hold: of the same archives."""
        theirs = set(map(identity, other.files))
        return sum(int((self.archive == i).sum()) for i, file in enumerate(self.files) if identity(file) in theirs)


def _stamp(found: os.stat_result) -> tuple[int, int]:
    return found.st_size, found.st_mtime_ns


def _key(path: str) -> str:
    """A sample's name in WebDataset: up to the first dot of the file's name."""
    folder, _, name = path.rpartition("/")
    return f"{folder}/{name.partition('.')[0]}"


def find(path: str, split: str) -> list[str]:
    """The archives of a split: `PATH/SPLIT.tar`, `PATH/SPLIT/*.tar` or `PATH/SPLIT-*.tar`; "." names all there are."""
    if split == ".":
        return [path] if os.path.isfile(path) else _tars(path, "*")
    whole = os.path.join(path, f"{split}.tar")
    if os.path.isfile(whole):
        return [whole]
    return _tars(os.path.join(path, split), "*") or _tars(path, f"{glob.escape(split)}-*")


def _tars(folder: str, pattern: str) -> list[str]:
    found = glob.glob(os.path.join(glob.escape(folder), f"{pattern}.tar"))
    return sorted(file for file in found if is_data(os.path.basename(file)))
