"""Which process the others wait for: by record, each one's time for computing, for reading and in collectives.

All processes take equally long for a step, because its sum waits for the last one. The slowest is therefore the one
that waits least in collectives; its own time is what it computes and reads. docs/stragglers.md says what is measured.
"""

import contextlib
import socket
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from pcpvt.distributed import collectives
from pcpvt.errors import warn
from pcpvt.runtime import records
from pcpvt.runtime.session import Session

SLOW = 1.2  # times the median of all processes' own times: a process whose own time is so long is slow;
LASTING = 300.0  # when it was so in all records over so many seconds, it is warned of, once

_Sum = Callable[[list[Tensor]], list[Tensor]]


class Times(NamedTuple):
    """Seconds of one process."""

    computing: float
    reading: float  # waiting for its next batch
    waiting: float  # in collectives, the transfer included

    @property
    def own(self) -> float:
        return self.computing + self.reading

    def shares(self) -> dict[str, float]:
        """The parts of the time, between 0 and 1."""
        total = max(sum(self), 1e-9)
        return {name: value / total for name, value in self._asdict().items()}


class Watch:
    """Names the slowest process in each record, and one that stays slow; `hosts` are the processes', by rank."""

    def __init__(self, hosts: list[str]):
        self._hosts = hosts
        self._sums = [Times(0.0, 0.0, 0.0)] * len(hosts)
        self._slow: dict[int, float] = {}  # seconds for which a process has been slow

    def add(self, times: list[Times]) -> tuple[dict[str, float], list[str]]:
        """Adds a record's times, by rank; returns the slowest process with its shares of the time, and warnings."""
        self._sums = [Times(*map(sum, zip(a, b, strict=True))) for a, b in zip(self._sums, times, strict=True)]
        usual = max(statistics.median_low([each.own for each in times]), 1e-9)  # of two processes the faster one's
        warnings = []
        for rank, each in enumerate(times):
            if each.own < SLOW * usual:
                self._slow.pop(rank, None)
                continue
            before = self._slow.get(rank, 0.0)
            self._slow[rank] = before + sum(each)
            if before < LASTING <= self._slow[rank]:
                warnings.append(self._said(rank, each, each.own / usual))
        slowest = max(range(len(times)), key=lambda rank: times[rank].own)
        shares = {f"slowest_{name}": round(share, 4) for name, share in times[slowest].shares().items()}
        return {"slowest_rank": slowest, **shares, "slowness": round(times[slowest].own / usual, 3)}, warnings

    def _said(self, rank: int, times: Times, factor: float) -> str:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in times.shares().items())
        return (
            f"rank {rank} ({self._hosts[rank]}) has been slower than the median for {self._slow[rank]:.0f} s, now "
            f"{factor:.2f} times: the others wait for it. Its time: {shares}"
        )

    def by_rank(self) -> dict[str, Any]:
        """The content of `records.RANKS`: seconds of each process so far."""
        ranks = [
            {"rank": rank, "host": host, **{name: round(value, 3) for name, value in times._asdict().items()}}
            for rank, (host, times) in enumerate(zip(self._hosts, self._sums, strict=True))
        ]
        return {"ranks": ranks}


class Stopwatch:
    """Measures this process's steps; nothing is read from the device before a record is due.

    With one process it does nothing.
    """

    def __init__(self, session: Session):
        self._device, self._active = session.device, session.world.size > 1
        self._watch = Watch(collectives.gather_texts(socket.gethostname()))
        self._file = session.workdir / records.RANKS if session.world.is_main else None
        self._total = self._reading = self._waiting = 0.0
        self._sums: list[tuple[Any, Any]] = []  # stamps before and after each sum
        self._since: float | None = None

    def psum(self, psum: _Sum) -> _Sum:
        """The sum over processes, measured in the device's own time."""
        if not self._active:
            return psum

        def measured(tensors: list[Tensor]) -> list[Tensor]:
            before = self._device.stamp()
            summed = psum(tensors)
            self._sums.append((before, self._device.stamp()))
            return summed

        return measured

    def meet(self, decide: Callable[[], bool]) -> bool:
        """A decision of all processes before a step. It counts as waiting, unless it comes after what is no step: an
        evaluation, or a save, whose files only one process writes.
        """
        began = time.perf_counter()
        decided = decide()
        now = time.perf_counter()
        if self._since is None:
            self._since = now
        else:
            self._waiting += now - began
        return decided

    def add(self, read: float, *, interrupted: bool) -> None:
        """Adds the step that has just been done.

        Args:
            read: seconds that it waited for its batch.
            interrupted: something other than a step follows, whose time does not count.
        """
        now = time.perf_counter()
        assert self._since is not None
        self._total, self._reading = self._total + now - self._since, self._reading + read
        self._since = None if interrupted else now

    def record(self) -> dict[str, float]:
        """What a record says about the time since the last one, for which all processes call this; see `Watch.add`.

        The metrics of the last step must have been read, so that the device has done all that was measured.
        """
        if not self._active:
            return {}
        waiting = self._waiting + sum(self._device.seconds_between(*pair) for pair in self._sums)
        began = time.perf_counter()
        rows = collectives.gather_numbers([self._total, self._reading, waiting])
        self._total, self._reading, self._sums = 0.0, 0.0, []
        self._waiting = 0.0 if self._since is None else time.perf_counter() - began  # it is part of the next record
        longest = max(total for total, _, _ in rows)  # all have done the same steps
        times = [Times(max(longest - read - waited, 0.0), read, waited) for _, read, waited in rows]
        entry, warnings = self._watch.add(times)
        if self._file is not None:
            for warning in warnings:
                warn(warning)
            with contextlib.suppress(OSError):  # a full disk; the records, which matter more, say so
                records.write_json(self._file, self._watch.by_rank())
        return entry
