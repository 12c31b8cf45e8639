"""One training run per workdir: a file lock that names its holder.

The lock is the kernel's (flock), so it ends with its process, even when that is killed or its host fails; the file's
content only says who holds it. On a network file system without flock a weaker rule holds: the recorded process counts
as alive unless it ran on this host and no longer exists. The filelock package records no holder beside flock, and
handles the lack of flock for ENOSYS only.
"""

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
    """Holds the workdir's lock; yields a sentence about a run that ended without releasing it, or an empty string.

    Raises:
        UserError: when another run holds it, naming its host and process.
    """
    handle = os.open(workdir / NAME, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    with os.fdopen(handle, "r+b", buffering=0):
        holder = _holder(handle)
        if not _acquire(handle, holder):
            who = _named(_holder(handle))  # read again: the holder may have recorded itself only now
            raise UserError(f"--workdir: {workdir} is in use by {who}: stop it, or choose another folder")
        own = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(own).encode(), 0)
        try:
            yield f"{_named(holder)} ended without finishing; its lock is taken over" if holder else ""
        finally:
            os.ftruncate(handle, 0)


def _acquire(handle: int, holder: dict) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise
        return not holder or _is_gone(holder)
    return True


def _holder(handle: int) -> dict:
    """The process that the file names; empty when it names none or cannot be parsed."""
    with contextlib.suppress(ValueError, RecursionError):
        holder = json.loads(os.pread(handle, 4096, 0))
        if isinstance(holder, dict) and isinstance(holder.get("pid"), int):
            return holder
    return {}


def _named(holder: dict) -> str:
    if not holder:
        return "another process"
    return printable(f"process {holder['pid']} on {holder.get('host')} (since {holder.get('since')})")


def _is_gone(holder: dict) -> bool:
    """Whether the process ran on this host and no longer exists."""
    try:
        os.kill(holder["pid"], 0)
    except (OSError, OverflowError) as error:  # PermissionError: another user's process
        return isinstance(error, ProcessLookupError) and holder.get("host") == socket.gethostname()
    return False
