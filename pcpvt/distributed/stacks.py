"""Where a process is: Python stacks in the workdir's `debug/`, on SIGUSR1, for another rank, or at the end of a wait.

SIGUSR1 is handled by faulthandler in C, so it also works while the main thread hangs in a library. An empty file is
removed at the end.
"""

import contextlib
import faulthandler
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import TextIO

_PACKAGE = str(Path(__file__).parent.parent)


class _Dump:
    """The file of this process, and the step that it is at."""

    file: TextIO | None = None
    step = 0  # steps done


_dump = _Dump()


def install(folder: Path, rank: int) -> None:
    """Opens this rank's file in a folder, which is created, and handles SIGUSR1 from now on."""
    folder.mkdir(exist_ok=True)
    _dump.file = open(folder / f"rank-{rank}.txt", "w", errors="backslashreplace")  # noqa: SIM115 - until the end
    faulthandler.register(signal.SIGUSR1, _dump.file, all_threads=True)


def uninstall() -> None:
    """Closes the file; removes it, and the folder, if nothing was written."""
    if _dump.file is None:
        return
    faulthandler.unregister(signal.SIGUSR1)
    file, _dump.file = _dump.file, None
    path = Path(file.name)
    with contextlib.suppress(OSError):  # the folder holds other ranks' files, or the user has removed it
        file.close()
        if path.stat().st_size == 0:
            path.unlink()
            path.parent.rmdir()


def at_step(step: int) -> None:
    """Notes how many steps are done."""
    _dump.step = step


def write() -> None:
    """Writes the stacks of all threads, with the time and the step."""
    if _dump.file is not None:
        with contextlib.suppress(OSError, ValueError):  # a full disk; closed meanwhile
            _dump.file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}: {place()}\n")
            _dump.file.flush()
            faulthandler.dump_traceback(_dump.file, all_threads=True)


def place() -> str:
    """The innermost function of this package that the main thread is in, and the step."""
    frame: FrameType | None = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame and not frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.f_back
    after = f"after step {_dump.step}"
    if frame is None:
        return after
    name = frame.f_code.co_filename.removeprefix(_PACKAGE).lstrip("/")
    return f"in {frame.f_code.co_name} of {name}, line {frame.f_lineno}, {after}"
