"""Reads files written by torch.save without running anything in them.

A pickle is a program. torch's restricted unpickler builds tensors and plain containers and refuses every other name.
Allowed in addition are `argparse.Namespace`, in which the reference code keeps its arguments, and a few harmless types
often found inside one, each replaced by an empty class. What else this process has allowed does not apply here.
"""

import argparse
import contextlib
import re
import tarfile
import threading
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from pcpvt.errors import UserError, one_line

_ZIP_START = b"PK\x03\x04"
_PICKLE_START = b"\x80"  # the PROTO opcode; torch.save has never written a protocol below 2
_LOCK = threading.Lock()  # torch's list of allowed names belongs to the process


class Ignored:
    """Replaces a path or a numpy value of a file: takes any arguments and state, and stores nothing."""

    def __init__(self, *args: object) -> None:
        pass

    __setstate__ = __init__


_PATHS = ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
_IGNORED = (
    *(f"{module}.{name}" for module in ("pathlib", "pathlib._local") for name in _PATHS),
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *("numpy.dtype", "numpy.ndarray"),
)
_ALLOWED: list[Any] = [argparse.Namespace, *((Ignored, name) for name in _IGNORED)]


def load(path: Path) -> Any:
    """The object that torch.save wrote to `path`, on the CPU.

    The new (zip) format is memory-mapped and its tensors refer to the file: copy what must outlive it.

    Raises:
        UserError: when the file is damaged, is of another kind, or names anything that would have to run.
    """
    with path.open("rb") as file:
        start = file.read(16)
    if fault := _fault(path, start):
        raise UserError(f"{path}: {fault}")
    try:
        with _LOCK, _only_our_names(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # those that matter are raised below, as one line
            return torch.load(str(path), map_location="cpu", weights_only=True, mmap=start.startswith(_ZIP_START))
    except Exception as error:  # hostile bytes raise almost anything: struct.error, IndexError, KeyError, ...
        raise UserError(f"{path}: {_refusal(error)}") from None


def _fault(path: Path, start: bytes) -> str:
    """Why torch.save did not write a file, or not as it is now, and the remedy; empty when nothing is found.

    A zip is refused if it is TorchScript, compressed (when mapped, packed bytes would pass for numbers) or damaged:
    torch itself does not compare the checksums of the records.
    """
    if start.startswith(_ZIP_START):
        try:
            with zipfile.ZipFile(path) as archive:
                if any(name.endswith("/constants.pkl") for name in archive.namelist()):  # torch's own criterion
                    return "a TorchScript archive: save the model's state_dict() instead"
                if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
                    return "a compressed zip, which torch.save does not write: unpack it and name the file inside"
                damaged = archive.testzip()
        except Exception as error:
            return f"a damaged or incomplete file ({one_line(error)}): get it again"
        return "" if damaged is None else f"damaged: the checksum of record {one_line(damaged)} is wrong: get it again"
    if tarfile.is_tarfile(path):
        return (
            "a tar archive (torch before 0.1.10 wrote such files too): unpack it and name the file inside, or save it "
            "again with a later torch"
        )
    if start.startswith(_PICKLE_START):
        return ""
    return (
        f"neither a PyTorch nor a safetensors file (it begins with {start!r}): download it again, and check that the "
        "file itself came, not a web page or a git-lfs pointer"
    )


def _refusal(error: Exception) -> str:
    """What torch's error says about the file, and the remedy."""
    if refused := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return (
            f"refused, because reading it would run {refused[1][:120]}, and nothing in a weights file is run: if you "
            "trust the file, load it where it was made and save only its tensors: "
            "torch.save({'model': model.state_dict()}, path)"
        )
    reason = re.search(r"WeightsUnpickler error:\s*(.+)", str(error))
    return (
        f"cannot be read as a PyTorch file ({one_line(reason[1] if reason else error)}): damaged, incomplete or not "
        "written by torch.save: get it again, or save it again with torch.save(model.state_dict(), path)"
    )


@contextlib.contextmanager
def _only_our_names() -> Iterator[None]:
    """Allows `_ALLOWED` only, and restores afterwards what the process had allowed before."""
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        with torch.serialization.safe_globals(_ALLOWED):
            yield
    finally:
        torch.serialization.add_safe_globals(before)
