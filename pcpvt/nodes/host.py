"""What one process finds out about its host before a run starts."""

import contextlib
import json
import os
import platform
import shutil
import time
from pathlib import Path
from typing import NamedTuple

PATIENCE = 10.0  # seconds until a new file must be visible on all hosts; a name never looked for is in no cache
CGROUPS = (  # folder of a container's memory, names of limit and usage in it, key of cached files, in versions 2 and 1
    ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


class Report(NamedTuple):
    """One process's findings; those of the host are its first process's."""

    rank: int
    host: str
    processes: int  # on this host
    clock: list[float]  # time.time() at moments that are the same for all processes, as well as can be
    workdir: str
    shared: bool  # whether the file that rank 0 wrote into its workdir is in this one
    source: str  # of the data
    data: list[int]  # training and validation images
    classes: str  # digest of their names
    cards: dict[str, str] | None = None  # see `cards.health`; None on CPUs, and in other processes than the first
    memory: int | None = None  # bytes available
    shm: int | None = None  # bytes free in /dev/shm; None where there is none
    disk: int | None = None  # bytes free in the workdir

    @property
    def place(self) -> str:
        return f"rank {self.rank} on {self.host}"

    def dump(self) -> str:
        """A text for `load`, by which processes tell one another what they found."""
        return json.dumps(self)


def load(text: str) -> Report:
    """The report that `dump` has written."""
    return Report(*json.loads(text))


def available_memory() -> int:
    """Bytes that processes may still allocate: of the host, or of the container where that is less (Linux)."""
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    found = int(lines["MemAvailable"].split()[0]) * 1024
    for folder, *names, cached in CGROUPS:
        with contextlib.suppress(OSError, ValueError):  # another version, or no limit (`max`)
            limit, usage = (int(Path(folder, name).read_text()) for name in names)
            rows = dict(line.split() for line in Path(folder, "memory.stat").read_text().splitlines())
            # Files that were read, such as images, count as used until the kernel needs their memory.
            found = min(found, limit - (usage - int(rows.get(cached, 0))))
    return max(found, 0)


def free_space(folder: str | os.PathLike[str]) -> int | None:
    """Bytes free in a folder; None where it cannot be told."""
    with contextlib.suppress(OSError):
        return shutil.disk_usage(folder).free
    return None


def sees(file: Path, text: str) -> bool:
    """Whether a file that another process has written is here, with its text."""
    deadline = time.monotonic() + PATIENCE
    while True:
        with contextlib.suppress(OSError):
            if file.read_text() == text:
                return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.2)


def name() -> str:
    """This host's name, for messages."""
    return platform.node() or "this host"
