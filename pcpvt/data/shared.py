"""The list of samples in memory that loader processes share: at ImageNet's size a copy each would take 0.28 GB."""

import mmap
import os
import tempfile
import weakref
from array import array
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np


class Samples(Sequence[tuple[str, int]]):
    """Read-only pairs of a path and a label. Pickled, it is a reference to this process's memory.

    A process may unpickle it on the same host as long as this object exists.

    Attributes:
        labels: int32 `[n]`.
    """

    def __init__(self, pairs: Iterable[tuple[str, int]]):
        text, ends, labels = bytearray(), array("q"), array("i")
        for path, label in pairs:
            text += os.fsencode(path)
            ends.append(len(text))
            labels.append(label)
        self._length = len(labels)
        file = _anonymous_file()
        self._descriptor = file.fileno()
        weakref.finalize(self, file.close)
        for part in (ends, labels, text):
            file.write(part)
        file.flush()
        self._map(self._descriptor)

    def _map(self, descriptor: int) -> None:
        size = os.fstat(descriptor).st_size
        memory = mmap.mmap(descriptor, size, prot=mmap.PROT_READ) if size else b""
        self._ends = np.frombuffer(memory, np.int64, self._length)
        self.labels = np.frombuffer(memory, np.int32, self._length, self._ends.nbytes)
        self._text = np.frombuffer(memory, np.uint8, offset=self._ends.nbytes + self.labels.nbytes)

    def __reduce__(self) -> tuple[Any, ...]:
        return _attach, (f"/proc/{os.getpid()}/fd/{self._descriptor}", self._length)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> tuple[str, int]:  # type: ignore[override]  # no slices
        index = range(self._length)[index]
        begin = self._ends[index - 1] if index else 0
        return os.fsdecode(self._text[begin : self._ends[index]].tobytes()), int(self.labels[index])


def _attach(path: str, length: int) -> Samples:
    """The samples in another process's memory; they cannot be pickled again."""
    samples = Samples.__new__(Samples)
    samples._length, samples._descriptor = length, -1
    with open(path, "rb") as file:
        samples._map(file.fileno())
    return samples


def _anonymous_file() -> Any:
    """A file without a name: in memory, but not in /dev/shm, which is 64 MB in containers; elsewhere in a folder."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("pcpvt"), "w+b")
    return tempfile.TemporaryFile()
