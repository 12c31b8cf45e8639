"""Safetensors files read with read(2), not mapped: a failing disk, or a file cut short meanwhile, is an error here.

With a mapping it would be a SIGBUS, and the tensors would lie wherever the file has them instead of aligned. One tensor
at a time is read, so that a file can be verified without room for all of it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
HEADER = 100_000_000  # bytes; the format's own limit


class _Entry(NamedTuple):
    dtype: torch.dtype
    shape: list[int]
    start: int  # bytes, from the end of the header
    end: int


def metadata(path: Path) -> dict[str, Any]:
    """The `__metadata__` of a file; its tensors are not looked at.

    Raises:
        OSError, ValueError, TypeError, RecursionError: when it cannot be read, or is of another format.
    """
    with path.open("rb") as file:
        found = _header(file).get("__metadata__", {})
    if not isinstance(found, dict):
        raise ValueError("its metadata are no object")
    return found


def tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) in order of the names.

    Raises:
        OSError, ValueError, TypeError, KeyError, RuntimeError, RecursionError: when it cannot be read, or is damaged.
    """
    with path.open("rb") as file:
        entries = {name: _entry(value) for name, value in _header(file).items() if name != "__metadata__"}
        begin, size = file.tell(), os.fstat(file.fileno()).st_size
        edges = [
            0,
            *(edge for span in sorted((e.start, e.end) for e in entries.values()) for edge in span),
            size - begin,
        ]
        if edges[::2] != edges[1::2]:
            raise ValueError("its tensors do not fill it without gaps")
        for name in sorted(entries):
            entry = entries[name]
            value = torch.empty(entry.shape, dtype=entry.dtype)
            file.seek(begin + entry.start)
            if file.readinto(value.reshape(-1).view(torch.uint8).numpy().data) != entry.end - entry.start:
                raise ValueError("it is cut short")
            yield name, value


def _header(file: BinaryIO) -> dict[str, Any]:
    """The JSON object at the beginning of a file, which is left at its end."""
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(HEADER, os.fstat(file.fileno()).st_size):
        raise ValueError("its length is not that of a header")
    header = json.loads(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("its header is no object")
    return header


def _entry(value: dict[str, Any]) -> _Entry:
    shape, (start, end) = list(value["shape"]), value["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, start, end)):
        raise ValueError("a shape or a position is no number")
    dtype = DTYPES[value["dtype"]]
    if math.prod(shape) * dtype.itemsize != end - start:
        raise ValueError("a tensor has not the size of its shape")
    return _Entry(dtype, shape, start, end)
