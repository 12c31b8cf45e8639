"""The exceptions that the program shows to its user, as a single line and a non-zero exit."""

from __future__ import annotations

import sys


class UserError(Exception):
    """Something the user can put right; the message names the field or file, the value, and the remedy."""

    exit_code = 2


class PeerError(UserError):
    """Another process of the run died or hangs, so this one cannot go on either; the other's own exit says why."""

    exit_code = 76


def show(message: str) -> None:
    """The line that an ending run leaves on standard error."""
    print(f"pcpvt: error: {printable(message)}", file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """A message as one line for a terminal: names of files and classes in it may hold line breaks or escape codes."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
