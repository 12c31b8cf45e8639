"""Loader processes: their signals, the end of their lifetime, and messages about limits of the system."""

import atexit
import contextlib
import functools
import multiprocessing
import multiprocessing.queues
import os
import resource
import signal
import sys
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker

from pcpvt.devices.base import keep_freed_memory
from pcpvt.errors import UserError

# Parts of error messages, and what to say of them. PyTorch's and multiprocessing's errors name the cause in words only.
_FILES = ("Too many open files", "items of ancdata")  # the latter: of descriptors that a process could not receive
_MEMORY = ("allocate memory", "Cannot allocate", "MemoryError")
_SHARED_MEMORY = ("shared memory", "unable to resize file", "No space left on device")
_PROCESSES = ("Resource temporarily unavailable", "start new thread")
_DIED = ("exited unexpectedly", "is killed by signal")
FEWER = "or use fewer loader processes"


def explain(error: Exception) -> str:
    """The line for the user about an error of reading data that the system's limits caused; empty for other errors."""
    message = f"{type(error).__name__}: {error}".strip()
    reason = message.splitlines()[-1].partition(". ")[0].strip()  # without PyTorch's advice

    def says(texts: tuple[str, ...]) -> bool:
        return any(text in message for text in texts)

    if says(_FILES):
        what, remedy = f"no more files can be opened ({reason})", f"raise the limit ({_files()}) {FEWER}"
    elif says(_SHARED_MEMORY):
        what, remedy = f"no shared memory left ({reason})", f"free or enlarge /dev/shm (docker: --shm-size) {FEWER}"
    elif says(_MEMORY):
        what, remedy = f"no memory left ({reason})", f"free some, lower config.batch_size, {FEWER}"
    elif says(_PROCESSES):
        what, remedy = f"no more processes can be started ({reason})", f"raise the limit (ulimit -u) {FEWER}"
    elif isinstance(error, ConnectionError | EOFError) or says(_DIED):  # or its pipe is closed
        what = f"a loader process died ({message.splitlines()[0]})"
        remedy = f"free memory and /dev/shm, raise the limit of open files ({_files()}), {FEWER}"
    elif isinstance(error, OSError):
        what, remedy = f"data cannot be read ({reason})", "check the disk, the permissions and the limits"
    else:
        return ""
    return f"config.data.workers: {what}: {remedy}"


def _files() -> str:
    return f"ulimit -n is {resource.getrlimit(resource.RLIMIT_NOFILE)[0]}"


@contextlib.contextmanager
def worker_errors() -> Iterator[None]:
    """Raises UserError in place of the system's, PyTorch's and multiprocessing's errors that `explain` knows."""
    try:
        yield
    except (RuntimeError, OSError, EOFError, MemoryError) as error:
        if not (line := explain(error)):
            raise
        sys.unraisablehook = lambda _: None  # the destructor of a half-made iterator would print that it failed
        raise UserError(line) from error


def end_on_errors() -> None:
    """Makes this process, which is no training process, end at an error in a thread of multiprocessing.

    It would print the error and go on, without the batch that the training process then waits for. The training process
    notices the end, and explains it in one line.
    """

    def end(*_: object) -> None:
        os._exit(1)

    sys.excepthook = end
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(end)  # type: ignore[attr-defined]


@contextlib.contextmanager
def block_signals_in_children() -> Iterator[None]:
    """Processes started inside block SIGTERM, SIGINT and SIGHUP: sent to a whole group, they are the run's to handle.

    Loader processes end when this process tells them to, or when it ends. The signal mask is inherited; a handler would
    be installed too late.
    """
    _kill_children_at_exit()
    # The forkserver imports these modules once, for all loader processes.
    multiprocessing.set_forkserver_preload(["__main__", "pcpvt.data.forkserver"])
    resource_tracker.ensure_running()  # started inside the block below, it would unblock these signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT, signal.SIGHUP))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def init_worker(worker: int) -> None:
    """Prepares a loader process: allocator settings, and its end at errors and with the training process.

    PyTorch watches the parent process, but that is the forkserver, which lives as long as any process it has started.
    """
    keep_freed_memory()
    end_on_errors()
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
