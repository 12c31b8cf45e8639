"""Loader processes as processes: what they hear of signals, when they end, and what is said when one dies."""

from __future__ import annotations

import atexit
import contextlib
import functools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from multiprocessing import resource_tracker
from pathlib import Path

from pcpvt.devices.base import keep_freed_memory
from pcpvt.errors import UserError


@contextlib.contextmanager
def worker_errors() -> Iterator[None]:
    """Turns what befalls loader processes into UserError."""
    try:
        yield
    except (RuntimeError, ConnectionError, EOFError) as error:
        reason = _why_worker_died(error)
        if not reason:
            raise
        raise UserError(
            f"config.data.workers: a loader process {reason}: free memory and /dev/shm, or use fewer of them"
        ) from error


@contextlib.contextmanager
def block_signals_in_children() -> Iterator[None]:
    """Processes started inside never see a signal that is sent to a whole group: the run answers it, and needs them.

    They end when this process tells them to, or is gone. The mask is inherited; a handler would come too late.
    """
    _end_children_at_exit()
    # The server that they are forked from imports what they need, once for all.
    multiprocessing.set_forkserver_preload(["__main__", "pcpvt.data.loader"])
    resource_tracker.ensure_running()  # which unblocks signals when it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT, signal.SIGHUP))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def init_worker(parent: int, worker: int) -> None:
    keep_freed_memory()
    _end_with(parent)


def _end_with(parent: int) -> None:
    """Ends this loader process soon after the training process, however that ends.

    PyTorch watches its parent, which is the forkserver; and that lives as long as any process that it has started.
    """

    def watch() -> None:
        while _runs(parent):
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def _runs(pid: int) -> bool:
    """Whether a process exists and is more than an entry that nobody has collected yet."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return not Path("/proc/self").exists()


@functools.cache
def _end_children_at_exit() -> None:
    """Arranges, once, that this process does not wait for loader processes that an error has left running.

    multiprocessing would send them a SIGTERM, to which they are deaf, and wait. They only read: nothing is lost.
    """

    def end() -> None:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would take it for a fault
        for child in multiprocessing.active_children():
            child.kill()

    atexit.register(end)  # after multiprocessing's own, and so called before it


def _why_worker_died(error: Exception) -> str:
    """What befell a loader process, from PyTorch's message; empty for an ordinary error raised inside one."""
    message = str(error)
    lines = message.strip().splitlines() or [type(error).__name__]
    if not isinstance(error, RuntimeError):  # the other end of the pipe is gone
        return f"died ({lines[0]})"
    if "exited unexpectedly" in message or "is killed by signal" in message:
        return f"died ({lines[0]})"
    if "shared memory" in message or "unable to resize file" in message or "No space left on device" in message:
        return f"has no shared memory left ({lines[-1]})"
    return ""
