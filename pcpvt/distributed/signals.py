"""Signal handling, grace period and exit codes.

SIGTERM, SIGINT and SIGHUP request a stop. Before `finish_step_first` is called there is nothing to save, and the
program ends at once; afterwards the request is recorded (`stop_requested`), and the training loop handles it at a step
boundary. A second signal, or the end of the grace period, ends the process and all its descendants without waiting for
the loop. A thread does this, because Python's own handlers do not run while the main thread is inside a collective or
a compiler.

Exit codes beside 0 (done) and 2 (an error meant for the user): the two below, and 128 + n when signal n ended the run
before it had saved.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
import threading
import time
from pathlib import Path

PREEMPTED = 75  # a signal came; what there was to save is saved; the same command goes on from there (EX_TEMPFAIL)
PEER_LOST = 76  # another process of the run died or hangs; its own exit says why

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
ONE_SIGNAL = 1.0  # seconds: a scheduler signals the whole group, and a launcher passes it on: that counts as one signal
AT_ONCE = 5.0  # seconds that a stop may take while there is nothing to save


class Stopped(BaseException):
    """A signal came while there was nothing to save."""


class _Request:
    """The one request that this process may have got."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.deferred = False
        self.ignored = False
        self.grace = AT_ONCE


_request = _Request()


def install() -> None:
    """Takes over the signals; the first thing that the program does."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    for number in STOPS:
        # nohup's ignored SIGHUP stays ignored.
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _remember)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reading,), name="signals", daemon=True).start()


def finish_step_first(grace: float) -> None:
    """From now on a signal is only remembered, for `grace` seconds."""
    _request.deferred, _request.grace = True, grace


def ignore() -> None:
    """From now on signals do nothing, to the very end: everything is saved, and the exit code is decided."""
    _request.ignored = True
    for number in STOPS:  # the interpreter gives our handlers up before it ends, but keeps to this
        signal.signal(number, signal.SIG_IGN)


def stop_requested() -> bool:
    """Whether this process was asked to stop."""
    return _request.signal is not None


def _remember(number: int, frame: object) -> None:
    """The main thread's handler."""
    if _request.ignored:
        return
    _request.signal = _request.signal or number
    if not _request.deferred:
        raise Stopped


def _watch(pipe: int) -> None:
    """Reads the numbers of arriving signals, which the interpreter writes at once whatever the main thread does."""
    came: float | None = None
    while True:
        patience = None if came is None else max(0.0, came + _request.grace - time.monotonic())
        ready = select.select([pipe], [], [], patience)[0]
        numbers = [n for n in os.read(pipe, 64) if n in STOPS] if ready else []
        now = time.monotonic()
        if _request.ignored:
            came = None
        elif numbers and came is None:
            came, _request.signal = now, numbers[0]
        elif numbers and came is not None and now - came >= ONE_SIGNAL:
            _end("a second signal ended it", 128 + numbers[0])
        elif came is not None and now - came >= _request.grace:
            if _request.deferred:
                assert _request.signal is not None  # set with `came`
                _end(f"no step ended within {_request.grace:g} s of a signal (config.grace)", 128 + _request.signal)
            _end("", PREEMPTED)


def _end(why: str, code: int) -> None:
    """Ends this process and all below it, from any thread."""
    if why:
        line = f"pcpvt: error: {why}: what was not saved is lost; the same command goes on from the last checkpoint\n"
        with contextlib.suppress(OSError):  # the end must come, said or not
            os.write(sys.stderr.fileno(), line.encode())
    for pid in reversed(descendants()):
        kill(pid, signal.SIGKILL)
    os._exit(code)


def kill(pid: int, number: int) -> None:
    """Sends a signal to a process that may have ended meanwhile."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def children(pid: int | str = "self") -> list[int]:
    """Processes that a process, by default this one, has started and that live (Linux)."""
    found: list[int] = []
    with contextlib.suppress(OSError):  # it has just ended
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):  # this thread has
                found += map(int, (task / "children").read_text().split())
    return found


def descendants(pid: int | str = "self") -> list[int]:
    """Processes below a process (Linux), parents before their children; their process groups do not matter."""
    return [found for child in children(pid) for found in (child, *descendants(child))]


def follow_parent() -> None:
    """Asks the kernel (Linux) for a SIGTERM when the parent dies: a launcher that is killed leaves no orphans."""
    parent, parent_death = os.getppid(), 1  # PR_SET_PDEATHSIG
    ctypes.CDLL(None).prctl(parent_death, int(signal.SIGTERM))
    if os.getppid() != parent:  # it died meanwhile
        raise Stopped
