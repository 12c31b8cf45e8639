"""The flight recorder: the last collectives of a rank, with sizes, times and states, in the workdir's `debug/`.

torch's own records (TORCH_FR_BUFFER_SIZE) exist for gloo and NCCL, torch_npu's for HCCL; `Device.recording` has the
variables. `write` writes them as `rank-N-collectives.json`: when a wait was over, for another rank's question, and on
SIGUSR1. A watchdog of NCCL or HCCL that ends the process, outside Python, writes `watchdog-rank-N` before, which
torch's `python -m torch.distributed.flight_recorder.fr_trace` reads.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from pcpvt.distributed import stacks

LIMIT = 5.0  # seconds for a record: reading the state of a device that hangs may hang too
AT_ONCE = 60.0  # seconds that may lie between a watchdog's file and the end of its process: its own limit for writing


class _Recorder:
    """What this process can write."""

    read: Callable[[], Mapping[str, bytes]] | None = None
    path: Path | None = None


_recorder = _Recorder()


def install(variables: Mapping[str, str], read: Callable[[], Mapping[str, bytes]], rank: int) -> None:
    """Switches recording on, where this process writes its stacks too; before the process group is made.

    Args:
        variables: of the environment, set unless they are already set; `{file}` stands for the watchdog's prefix.
        read: the records as JSON, by library.
    """
    folder = stacks.folder()
    if folder is None:
        return
    prefix = str(watchdog_file(folder, rank)).removesuffix(str(rank))  # torch adds the rank
    for name, value in variables.items():
        os.environ.setdefault(name, value.format(file=prefix))
    _recorder.path, _recorder.read = folder / f"rank-{rank}-collectives.json", read


def watchdog_file(folder: Path, rank: int) -> Path:
    """Where the watchdog of a library writes what it has recorded."""
    return folder / f"watchdog-rank-{rank}"


def ended_by_watchdog(folder: Path, rank: int, timestamp: float) -> bool:
    """Whether the watchdog of a rank that ended at a time (in seconds since 1970) has written its file then."""
    with contextlib.suppress(OSError):
        return watchdog_file(folder, rank).stat().st_mtime >= timestamp - AT_ONCE
    return False


def write() -> None:
    """Writes the record, in a thread of its own, for which this one waits `LIMIT` seconds at most."""
    if _recorder.read is not None:
        thread = threading.Thread(target=_write, name="flight recorder", daemon=True)
        thread.start()
        thread.join(LIMIT)


def _write() -> None:
    read, path = _recorder.read, _recorder.path
    assert read is not None and path is not None
    parts = [f'"time": "{time.strftime("%Y-%m-%d %H:%M:%S")}", "step": {stacks.step()}']
    with contextlib.suppress(Exception):  # of any library, and a full disk: the error that led here matters more
        parts += [f'"{library}": {record.decode()}' for library, record in read().items()]
        path.write_text(f"{{{', '.join(parts)}}}\n")
