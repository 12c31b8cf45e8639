"""Signal handling, grace period and exit codes.

SIGTERM, SIGINT and SIGHUP request a stop. Before `finish_step_first` is called there is nothing to save, and the
program ends at once; afterwards the request is recorded (`stop_requested`), and the training loop handles it at a step
boundary. A second signal, or the end of the grace period, ends the process and all its descendants without waiting for
the loop; a checkpoint that is being written has a limit of its own (`finish_save_first`). A thread does this, because
Python's own handlers do not run while the main thread is inside a collective or a compiler.

Exit codes beside 0 (done) and 2 (an error meant for the user): the three below, and 128 + n when signal n ended the run
before it had saved.
"""

import contextlib
import ctypes
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from pcpvt.distributed import flight, hosts, stacks

PREEMPTED = 75  # stopped by a signal after saving; the same command resumes (EX_TEMPFAIL of sysexits.h)
PEER_LOST = 76  # another process of the run died or hangs; its own exit code says why
FAULTY = 77  # an audit found that a device computed something wrong (`config.audit_action`)

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
ONE_SIGNAL = 1.0  # seconds: a scheduler signals the whole group and a launcher forwards it: both count as one signal
AT_ONCE = 5.0  # seconds that a stop may take while there is nothing to save
SAVE_LIMIT = 300.0  # seconds for a checkpoint that is being written; S takes 209 MB, which a slow disk writes in 20 s
FROM_LAUNCHER = signal.SIGUSR2  # sent to a rank just before a stop that nobody has asked for
LAUNCHER = "PCPVT_LAUNCHER"  # environment variable: the launcher's process id
NOTHING_NEW = "pcpvt: stopped by a signal with nothing new to save; the same command starts again\n"
STOPPING = "pcpvt: stopping after this step, which is saved; a second signal (Ctrl-C) ends the run at once, unsaved\n"
ENDED_BY_LAUNCHER = "pcpvt: stopping: the launcher ends all processes, to start them again or to end the run\n"


class Stopped(BaseException):
    """A signal arrived while there was nothing to save."""


class _Request:
    """State of the stop request; shared by the main thread's handler and the watching thread."""

    signal = 0  # number of the first signal that arrived
    finishes_step = False
    ignored = False
    from_launcher = False  # the stop is one of the launcher's own
    grace = AT_ONCE
    late = ""  # what is said when the grace period ends
    answer = ""  # what is said when a signal has arrived
    saving = False
    changed_at = 0.0  # of time.monotonic: when a save began or ended


_request = _Request()


def install() -> None:
    """Installs the signal handlers and starts the watching thread; called first in the program."""
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    for number in STOPS:
        # A SIGHUP that nohup has set to be ignored stays ignored.
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _handle)
    if LAUNCHER in os.environ:
        signal.signal(FROM_LAUNCHER, _note_launcher)
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)  # written to even while the main thread runs C code
    threading.Thread(target=_watch, args=(read_end,), name="signals", daemon=True).start()


def finish_step_first(
    grace: float, late: str = "no step ended within {:g} s of a signal (config.grace)", answer: str = STOPPING
) -> None:
    """From now on a signal is only recorded; the process is ended `grace` seconds later if it has not ended itself.

    Args:
        late: the reason that is printed then, with the seconds filled in.
        answer: what the first process prints as soon as a signal arrives.
    """
    _request.grace, _request.late, _request.answer = grace, late.format(grace), answer
    _request.finishes_step = True


@contextlib.contextmanager
def finish_save_first() -> Iterator[None]:
    """In this block a signal's limit is `SAVE_LIMIT` from the block's start; after it the grace period starts anew."""
    _request.saving, _request.changed_at = True, time.monotonic()
    try:
        yield
    finally:
        _request.saving, _request.changed_at = False, time.monotonic()


def ignore_from_now() -> None:
    """From now on signals have no effect until the process ends: everything is saved and the exit code is decided."""
    _request.ignored = True
    for number in (*STOPS, FROM_LAUNCHER):  # the interpreter removes Python handlers before it ends, but keeps SIG_IGN
        signal.signal(number, signal.SIG_IGN)


def stop_requested() -> bool:
    """Whether a signal has asked this process to stop."""
    return _request.signal != 0


def stopped_before_saving() -> bool:
    """Whether a signal has asked this process to stop while there was nothing to save (see `Stopped`)."""
    return _request.signal != 0 and not _request.finishes_step


def stopped_by_launcher() -> bool:
    """Whether the launcher stops this process for a reason of its own, and no user or scheduler has asked for it."""
    return _request.from_launcher


def code_of_stop() -> int:
    """The exit code of a process that a signal has stopped before its work was done."""
    return PEER_LOST if _request.from_launcher else PREEMPTED


def nothing_saved() -> str:
    """The line of a process that a signal has ended while there was nothing to save."""
    return ENDED_BY_LAUNCHER if _request.from_launcher else NOTHING_NEW


def _note_launcher(number: int, frame: object) -> None:
    """Signal handler; the main thread may need the answer before `_watch` has read the signal."""
    if not _request.signal:
        _request.from_launcher = True


def _handle(number: int, frame: object) -> None:
    """Signal handler; Python runs it in the main thread between two bytecode instructions."""
    if _request.ignored:
        return
    _request.signal = _request.signal or number
    if not _request.finishes_step:
        raise Stopped


def _watch(pipe: int) -> None:
    """Thread that reads signal numbers from `pipe`; ends the process after a second signal or the grace period."""
    requested_at: float | None = None  # of time.monotonic
    while True:
        # The limit may change meanwhile: a save may begin or end.
        timeout = None if requested_at is None else min(1.0, max(0.0, _limit(requested_at) - time.monotonic()))
        ready = select.select([pipe], [], [], timeout)[0]
        arrived = os.read(pipe, 64) if ready else b""
        if signal.SIGUSR1 in arrived:
            flight.write()
        if FROM_LAUNCHER in arrived and requested_at is None:
            _request.from_launcher = True
        numbers = [n for n in arrived if n in STOPS]
        now = time.monotonic()
        if _request.ignored:
            requested_at = None
        elif requested_at is None:
            if numbers:
                requested_at, _request.signal = now, numbers[0]
                if _request.finishes_step and os.environ.get("RANK", "0") == "0":
                    _print(ENDED_BY_LAUNCHER if _request.from_launcher else _request.answer)
        elif numbers and now - requested_at >= ONE_SIGNAL:
            _end("a second signal ended it", 128 + numbers[0])
        elif now >= _limit(requested_at):
            if _request.saving:
                _end(f"the checkpoint was not written within {SAVE_LIMIT:g} s", 128 + _request.signal)
            if _request.finishes_step:
                _end(_request.late, 128 + _request.signal)
            _end("", code_of_stop())


def _limit(requested_at: float) -> float:
    """When a stop that was requested at a time must be over."""
    if _request.saving:
        return _request.changed_at + SAVE_LIMIT
    return max(requested_at, _request.changed_at) + _request.grace


def _end(reason: str, code: int) -> None:
    """Ends this process and all its descendants at once, from any thread; with no reason, nothing is lost."""
    lost = "what was not saved is lost; the same command goes on from the last checkpoint"
    line = f"pcpvt: error: {reason}: {lost}\n" if reason else nothing_saved()
    _print(line)
    if reason:
        stacks.write()
        flight.write()
    kill_descendants()
    os._exit(hosts.exit_code(os.environ, code))


def _print(line: str) -> None:
    """Writes to standard error from any thread."""
    with contextlib.suppress(OSError, ValueError):  # it may be closed
        os.write(sys.stderr.fileno(), line.encode())


def kill(pid: int, number: int) -> None:
    """Sends a signal to a process that may have ended meanwhile."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def kill_descendants() -> None:
    """Kills all processes below this one, children before their parents."""
    for pid in reversed(descendants()):
        kill(pid, signal.SIGKILL)


def children(pid: int | str = "self") -> list[int]:
    """Live child processes of a process, by default of this one (Linux)."""
    pids: list[int] = []
    with contextlib.suppress(OSError):  # the process has just ended
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):  # the thread has just ended
                pids += map(int, (thread / "children").read_text().split())
    return pids


def descendants(pid: int | str = "self") -> list[int]:
    """All processes below a process (Linux), in any process group; parents before their children."""
    return [below for child in children(pid) for below in (child, *descendants(child))]


def follow_launcher() -> None:
    """Asks the kernel (Linux) for a SIGTERM when the launcher dies, so that a killed launcher leaves no orphans.

    Our launcher hands down its process id, because one that dies before this call is no longer the parent.
    """
    # Removed, since programs that this one starts have another parent.
    launcher = int(os.environ.pop(LAUNCHER, os.getppid()))
    ctypes.CDLL(None).prctl(1, int(signal.SIGTERM))  # PR_SET_PDEATHSIG
    if os.getppid() != launcher:
        _request.signal = signal.SIGTERM
        raise Stopped
