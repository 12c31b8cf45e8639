"""The exceptions that the program shows to its user, as a single line and a non-zero exit; how lines reach a user."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from typing import TextIO


class UserError(Exception):
    """Something the user can put right; the message names the field or file, the value, and the remedy."""

    exit_code = 2


class PeerError(UserError):
    """Another process of the run died or hangs, so this one cannot go on either; the other's own exit says why."""

    exit_code = 76


def show(message: str) -> None:
    """The line that an ending run leaves on standard error."""
    put(f"pcpvt: error: {printable(message)}\n", sys.stderr)


def warn(text: str) -> None:
    """One warning line on standard error."""
    put(f"pcpvt: warning: {printable(text)}\n", sys.stderr)


def put(text: str, stream: TextIO) -> None:
    """Writes to a standard stream, in one piece: other threads speak too.

    A stream that takes no more (a full disk, `| head`) is silenced: no run ends for want of a reader.
    """
    try:
        stream.write(text)
        stream.flush()
    except OSError as error:
        silence(stream)
        if stream is not sys.stderr:
            put(f"pcpvt: warning: standard output is lost from here on ({error.strerror or error})\n", sys.stderr)


def silence(stream: TextIO) -> None:
    """Leads a stream to nowhere, and what waits in its buffer too: the flush at exit would fail once more."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def printable(text: str) -> str:
    """A message as one line for a terminal: names of files and classes in it may hold line breaks or escape codes."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))


@contextlib.contextmanager
def suppress_logging() -> Iterator[None]:
    """Without log lines up to WARNING and without Python warnings; exceptions and errors come through."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
