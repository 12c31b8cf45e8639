"""Reads safetensors files with read(2), one tensor at a time, into newly allocated memory.

The reader of the safetensors package maps the file. A failing disk, or a file cut short while it is read, would then be
a SIGBUS instead of an error, and tensors would be aligned as in the file, which can select other kernels. Its
`deserialize` needs the whole file in memory, but checkpoints are verified without room for all their tensors.
"""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
MAX_HEADER = 100_000_000  # bytes; the format's own limit


def metadata(path: Path) -> dict[str, Any]:
    """The `__metadata__` of a file; raises OSError, ValueError or RecursionError if it is damaged or no safetensors."""
    with path.open("rb") as file:
        return _header(file).get("__metadata__", {})


def tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) in order of the names.

    Raises:
        OSError, ValueError, TypeError, KeyError, RuntimeError, RecursionError: when it cannot be read, or is damaged.
    """
    with path.open("rb") as file:
        header = _header(file)
        header.pop("__metadata__", None)
        start, size = file.tell(), 0
        for entry in sorted(header.values(), key=lambda entry: entry["data_offsets"]):
            begin, size = size, size + math.prod(entry["shape"]) * DTYPES[entry["dtype"]].itemsize
            if entry["data_offsets"] != [begin, size]:
                raise ValueError("its tensors do not have the sizes of their shapes, or leave gaps")
        if start + size != os.fstat(file.fileno()).st_size:  # so no tensor is larger than the file
            raise ValueError("its tensors do not fill it: it is cut short, or not as its header says")
        for name, entry in sorted(header.items()):
            value = torch.empty(entry["shape"], dtype=DTYPES[entry["dtype"]])
            file.seek(start + entry["data_offsets"][0])
            if file.readinto(value.reshape(-1).view(torch.uint8).numpy().data) != value.nbytes:
                raise ValueError("it was cut short while it was read")
            yield name, value


def _header(file: BinaryIO) -> dict[str, Any]:
    """The JSON object at the beginning of a file; leaves the file's position at its end."""
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(MAX_HEADER, os.fstat(file.fileno()).st_size):
        raise ValueError("its length is not that of a header")
    header = json.loads(file.read(length))
    if not isinstance(header, dict) or not isinstance(header.get("__metadata__", {}), dict):
        raise ValueError("its header, or the metadata in it, is no JSON object")
    return header
