"""Where a process is: Python stacks in the workdir's `debug/`, on SIGUSR1, for another rank, or at the end of a wait.

SIGUSR1 is handled by faulthandler in C, so it also works while the main thread hangs in a library. It then reaches
Python, for the thread of `signals`. A rank that a library crashes (SIGSEGV, SIGABRT) writes its stacks too. Files are
appended to, since a restart must not remove what led to it; an empty one is removed at the end.
"""

import contextlib
import faulthandler
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

_PACKAGE = str(Path(__file__).parent.parent)


class _Dump:
    """The file of this process, and the step that it is at."""

    file: TextIO | None = None
    step = 0  # steps done
    before: Any = signal.SIG_DFL  # handler of SIGUSR1


_dump = _Dump()


def install(folder: Path, rank: int | None) -> None:
    """Opens this rank's file in a folder, which is created, and handles SIGUSR1 from now on.

    Args:
        rank: None in a process that no launcher has started; the stacks of its crash go to standard error (absl).
    """
    folder.mkdir(exist_ok=True)
    _dump.file = open(file_of(folder, rank or 0), "a", errors="backslashreplace")  # noqa: SIM115 - until the end
    _dump.before = signal.signal(signal.SIGUSR1, _pass)
    faulthandler.register(signal.SIGUSR1, _dump.file, all_threads=True, chain=True)
    if rank is not None:
        faulthandler.enable(_dump.file)


def _pass(number: int, frame: object) -> None:
    """Signal handler: Python has written the signal's number to its wakeup file by now (see `signals.install`)."""


def file_of(folder: Path, rank: int) -> Path:
    """A rank's file."""
    return folder / f"rank-{rank}.txt"


def folder() -> Path | None:
    """The folder of this process's file; None while there is none."""
    return Path(_dump.file.name).parent if _dump.file else None


def uninstall() -> None:
    """Closes the file; removes it, and the folder, if nothing was written."""
    if _dump.file is None:
        return
    faulthandler.unregister(signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, _dump.before)
    faulthandler.disable()
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


def step() -> int:
    """Steps done."""
    return _dump.step


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
