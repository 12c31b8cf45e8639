"""Timings that can be believed: interleaved rounds, medians with their spread, and a witness for disturbances."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from pcpvt.devices.base import Device, cores

OTHERS = 0.05  # share of this host's cores in other processes' use above which a round is disturbed


class Measured(NamedTuple):
    """Seconds of one subject by round, and whether another process disturbed that round."""

    seconds: list[float]
    disturbed: list[bool]

    @property
    def clean(self) -> list[float]:
        """The undisturbed rounds, or all when none was."""
        kept = [s for s, bad in zip(self.seconds, self.disturbed, strict=True) if not bad]
        return kept or self.seconds

    def figures(self, images: int) -> dict[str, Any]:
        """Median and interquartile range as images/s and milliseconds."""
        low, middle, high = quartiles(self.clean)
        return {
            "images_per_sec": round(images / middle, 3),
            "ms": round(middle * 1e3, 3),
            "ms_quartiles": [round(low * 1e3, 3), round(high * 1e3, 3)],
            "rounds": len(self.clean),
            "disturbed_rounds": sum(self.disturbed),
        }


def quartiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def interleave(device: Device, subjects: dict[str, Callable[[], object]], rounds: int) -> dict[str, Measured]:
    """Runs every subject once per round, in turn, after one unmeasured call of each (which may compile)."""
    for subject in subjects.values():
        subject()
        subject()
    taken: dict[str, Measured] = {name: Measured([], []) for name in subjects}
    for _ in range(rounds):
        for name, subject in subjects.items():
            seconds, disturbed = once(device, subject)
            taken[name].seconds.append(seconds)
            taken[name].disturbed.append(disturbed)
    return taken


def once(device: Device, subject: Callable[[], object]) -> tuple[float, bool]:
    """Seconds of one call, and whether other processes took more than OTHERS of the cores meanwhile."""
    busy, own = _ticks()
    device.synchronize()
    began = time.perf_counter()
    subject()
    device.synchronize()
    seconds = time.perf_counter() - began
    busy, own = _ticks()[0] - busy, _ticks()[1] - own
    others = (busy - own) / os.sysconf("SC_CLK_TCK") / max(seconds, 1e-9) / cores()
    return seconds, seconds > 0.1 and others > OTHERS  # below 0.1 s a tick of 10 ms says too little


def ratio(peer: Measured, ours: Measured) -> dict[str, Any]:
    """Ours over the peer's speed, by rounds that were clean on both sides: median and quartiles."""
    pairs = [
        p / o
        for p, o, a, b in zip(peer.seconds, ours.seconds, peer.disturbed, ours.disturbed, strict=True)
        if not (a or b)
    ] or [p / o for p, o in zip(peer.seconds, ours.seconds, strict=True)]
    low, middle, high = quartiles(pairs)
    return {"median": round(middle, 4), "quartiles": [round(low, 4), round(high, 4)]}


def _ticks() -> tuple[int, int]:
    """(busy ticks of all cores, ticks of this process and its living descendants); zeros where /proc is missing."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
        user, nice, system, _, _, irq, soft = map(int, fields[:7])
        return user + nice + system + irq + soft, _tree_ticks(os.getpid())
    except OSError:
        return 0, 0


def _tree_ticks(pid: int) -> int:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        children = [c for t in Path(f"/proc/{pid}/task").iterdir() for c in (t / "children").read_text().split()]
    except OSError:
        return 0  # it has ended
    return sum(map(int, stat[11:15])) + sum(_tree_ticks(int(child)) for child in children)
