"""Errors for the user, each one line and an exit code; output to the standard streams."""

import contextlib
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

# Said where the module fcntl is missing, and with it flock, process groups and SIGHUP.
SYSTEMS = "this system is not supported: pcpvt runs on Linux (x86-64 and aarch64); on Windows use it inside WSL 2"


class UserError(Exception):
    """An error that the user can correct; the message names the field or file, the value, and the remedy."""

    exit_code = 2


class PeerError(UserError):
    """Another process of the run died or hangs, so this one must stop too; the other's own exit gives the reason."""

    exit_code = 76


class FaultError(UserError):
    """An audit has found that a process computed something wrong, and `config.audit_action` ends this attempt.

    Attributes:
        state_is_whole: it was found before the state has changed, which may be saved.
        passed: the newest step of which an audit has found nothing wrong, where another attempt shall go on from a
            checkpoint of that step or an earlier one; None: from any.
        evidence: the folder for later checkpoints.
    """

    exit_code = 77

    def __init__(self, message: str, *, state_is_whole: bool, passed: int | None, evidence: Path):
        super().__init__(message)
        self.state_is_whole, self.passed, self.evidence = state_is_whole, passed, evidence


def show(message: str) -> None:
    """Prints the error line of a run that ends."""
    put(f"pcpvt: error: {printable(message)}\n", sys.stderr)


def warn(text: str) -> None:
    """Prints one warning line on standard error."""
    put(f"pcpvt: warning: {printable(text)}\n", sys.stderr)


def put(text: str, stream: TextIO) -> None:
    """Writes to a standard stream in one call, since other threads write too, and to the log (see `log_to`).

    A stream that fails (a full disk, `| head`) is silenced, so that losing the output does not end a run.
    """
    log(text)
    try:
        stream.write(text)
        stream.flush()
    except OSError as error:
        silence(stream)
        if stream is not sys.stderr:
            warn(f"standard output is lost from here on ({error.strerror or error})")


class _Log:
    """The log file of this process."""

    file: TextIO | None = None


def log_to(path: Path) -> None:
    """From now on what this process prints is appended to a file too, whose folder is created."""
    path.parent.mkdir(exist_ok=True)
    _Log.file = open(path, "a", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115 - until the end


def log(text: str) -> None:
    """Appends to the log file, if there is one, below a line's time; live lines of a terminal are left out."""
    if _Log.file is not None and text.endswith("\n"):
        with contextlib.suppress(OSError, ValueError):  # a full disk must not end a run
            _Log.file.write(f"{time.strftime('%m-%d %H:%M:%S')} {text}")
            _Log.file.flush()


def silence(stream: TextIO) -> None:
    """Redirects a stream to /dev/null, with what its buffer holds: the flush at exit would fail again."""
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), stream.fileno())


def printable(text: str) -> str:
    """A message as one line for a terminal: names of files and classes in it may hold line breaks or escape codes."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))


def one_line(text: object) -> str:
    """The first line of an exception's text, or of a name from a file, printable and of at most 160 characters."""
    if isinstance(text, Exception):
        text = str(text) or type(text).__name__
    line = next(iter(str(text).strip().splitlines()), "")
    return printable(line if len(line) <= 160 else f"{line[:157]}...")


@contextlib.contextmanager
def suppress_logging() -> Iterator[None]:
    """Suppresses log lines up to WARNING and Python warnings; errors and exceptions pass."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
