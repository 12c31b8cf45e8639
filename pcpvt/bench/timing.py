"""Timings that can be trusted: interleaved rounds, medians with their spread, and disturbed rounds marked."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pcpvt.devices.base import Device, cores

QUARTILES = (25, 50, 75)  # percentiles
OTHERS = 0.05  # a round is disturbed when other processes use more than this share of the host's cores


class Timings(NamedTuple):
    """Seconds of one subject by round, and whether another process disturbed that round."""

    seconds: list[float]
    disturbed: list[bool]

    def add(self, seconds: float, disturbed: bool) -> float:
        """Appends a round; returns its seconds."""
        self.seconds.append(seconds)
        self.disturbed.append(disturbed)
        return seconds

    def figures(self, images: int) -> dict[str, Any]:
        """Median and interquartile range of the undisturbed rounds (of all, if none was), in images/s and ms."""
        clean = _clean(self.seconds, self.disturbed)
        low, median, high = np.percentile(clean, QUARTILES).tolist()
        return {
            "images_per_sec": round(images / median, 3),
            "ms": round(median * 1e3, 3),
            "ms_quartiles": [round(low * 1e3, 3), round(high * 1e3, 3)],
            "rounds": len(clean),
            "disturbed_rounds": sum(self.disturbed),
        }


def _clean(values: list[float], disturbed: list[bool]) -> list[float]:
    """The values of the undisturbed rounds, or of all rounds if none was undisturbed."""
    return [value for value, bad in zip(values, disturbed, strict=True) if not bad] or values


def interleave(device: Device, subjects: dict[str, Callable[[], object]], rounds: int) -> dict[str, Timings]:
    """Times every subject once per round, in turn, after two untimed calls of each (which may compile)."""
    for subject in subjects.values():
        subject()
        subject()
    timings = {name: Timings([], []) for name in subjects}
    for _ in range(rounds):
        for name, subject in subjects.items():
            timings[name].add(*once(device, subject))
    return timings


def once(device: Device, subject: Callable[[], object]) -> tuple[float, bool]:
    """Seconds of one call, and whether other processes used more than OTHERS of the cores during it."""
    busy, own = _ticks()
    device.synchronize()
    began = time.perf_counter()
    subject()
    device.synchronize()
    seconds = time.perf_counter() - began
    busy, own = _ticks()[0] - busy, _ticks()[1] - own
    others = (busy - own) / os.sysconf("SC_CLK_TCK") / max(seconds, 1e-9) / cores()
    return seconds, seconds > 0.1 and others > OTHERS  # a tick is 10 ms, too coarse for calls below 0.1 s


def ratio(peer: Timings, ours: Timings) -> dict[str, Any]:
    """Our speed over the peer's, by rounds undisturbed on both sides (by all, if there is none): median, quartiles."""
    pairs = [p / o for p, o in zip(peer.seconds, ours.seconds, strict=True)]
    disturbed = [a or b for a, b in zip(peer.disturbed, ours.disturbed, strict=True)]
    low, median, high = np.percentile(_clean(pairs, disturbed), QUARTILES).tolist()
    return {"median": round(median, 4), "quartiles": [round(low, 4), round(high, 4)]}


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
