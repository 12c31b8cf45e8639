"""One training run per workdir: a lock that ends with its process, and a note of who holds it.

The lock is the kernel's (flock), so that of a run that was killed, or whose host went down, does not outlive it; the
file only says whose it is. A network file system without flock gets the weaker rule: the noted process counts as alive
unless it ran on this host and is gone.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from pcpvt.errors import UserError, printable

NAME = "lock"


@contextlib.contextmanager
def held(workdir: Path) -> Iterator[str]:
    """Holds the workdir's lock; gives a sentence about a run that left it behind, or an empty one.

    Raises:
        UserError: when another run holds it, naming that one's host and process.
    """
    path = workdir / NAME
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        holder = _holder(handle)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = True
        except BlockingIOError:
            free = False
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
            free = not holder or _is_gone(holder)
        if not free:
            who = _named(_holder(handle))  # read again: it may have noted itself just now
            raise UserError(f"--workdir: {workdir} is in use by {who}: stop it, or choose another folder")
        own = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        _note(handle, json.dumps(own))
        try:
            yield f"{_named(holder)} ended without finishing; its lock is taken over" if holder else ""
        finally:
            _note(handle, "")
    finally:
        os.close(handle)


def _note(handle: int, text: str) -> None:
    os.ftruncate(handle, 0)
    os.pwrite(handle, text.encode(), 0)


def _holder(handle: int) -> dict:
    """Who the file names; empty when nobody, or nothing that can be read."""
    try:
        holder = json.loads(os.pread(handle, 4096, 0) or b"{}")
        return holder if isinstance(holder, dict) and isinstance(holder.get("pid"), int) else {}
    except ValueError:
        return {}


def _named(holder: dict) -> str:
    if not holder:
        return "another process"
    return printable(f"process {holder['pid']} on {holder.get('host')} (since {holder.get('since')})")


def _is_gone(holder: dict) -> bool:
    if holder.get("host") != socket.gethostname():
        return False
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        pass  # somebody else's: it lives
    return False
