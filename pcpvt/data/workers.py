"""Loader processes: their signals, the end of their lifetime, and error messages when one of them dies."""

import atexit
import contextlib
import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker

from pcpvt.devices.base import keep_freed_memory
from pcpvt.errors import UserError

# Parts of PyTorch's error messages.
_DIED = ("exited unexpectedly", "is killed by signal")
_NO_SHARED_MEMORY = ("shared memory", "unable to resize file", "No space left on device")


@contextlib.contextmanager
def worker_errors() -> Iterator[None]:
    """Raises UserError in place of PyTorch's errors about loader processes that died."""
    try:
        yield
    except (RuntimeError, ConnectionError, EOFError) as error:
        message = str(error)
        lines = message.strip().splitlines() or [type(error).__name__]
        if not isinstance(error, RuntimeError) or any(text in message for text in _DIED):  # or its pipe is closed
            reason = f"died ({lines[0]})"
        elif any(text in message for text in _NO_SHARED_MEMORY):
            reason = f"has no shared memory left ({lines[-1]})"
        else:
            raise
        raise UserError(
            f"config.data.workers: a loader process {reason}: free memory and /dev/shm, or use fewer of them"
        ) from error


@contextlib.contextmanager
def block_signals_in_children() -> Iterator[None]:
    """Processes started inside block SIGTERM, SIGINT and SIGHUP: sent to a whole group, they are the run's to handle.

    Loader processes end when this process tells them to, or when it ends. The signal mask is inherited; a handler would
    be installed too late.
    """
    _kill_children_at_exit()
    # The forkserver imports these modules once, for all loader processes.
    multiprocessing.set_forkserver_preload(["__main__", "pcpvt.data.loader"])
    resource_tracker.ensure_running()  # started inside the block below, it would unblock these signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT, signal.SIGHUP))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def init_worker(worker: int) -> None:
    """Prepares a loader process: allocator settings, and its end with the training process, however that ends.

    PyTorch watches the parent process, but that is the forkserver, which lives as long as any process it has started.
    """
    keep_freed_memory()
    training = multiprocessing.parent_process()
    assert training is not None

    def watch() -> None:
        training.join()
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


@functools.cache
def _kill_children_at_exit() -> None:
    """Registers, once, an exit handler that kills loader processes which an error has left running.

    multiprocessing would send SIGTERM, which they block, and then wait. They only read, so nothing is lost.
    """

    def kill() -> None:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would report the killed processes as failed
        for child in multiprocessing.active_children():
            child.kill()

    atexit.register(kill)  # after multiprocessing's own handler, so it runs before that
