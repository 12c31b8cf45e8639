"""Timings that can be trusted: interleaved rounds, medians with their spread, and disturbed rounds marked."""

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pcpvt.devices.base import Device, cores

OTHERS = 0.05  # a round is disturbed when other processes use more than this share of the host's cores


class Round(NamedTuple):
    """One measurement: seconds of a call, or the ratio of two such."""

    value: float
    disturbed: bool  # by another process


def once(device: Device, subject: Callable[[], object]) -> Round:
    """Times one call."""
    before = _ticks_of_others()
    device.synchronize()
    began = time.perf_counter()
    subject()
    device.synchronize()
    seconds = time.perf_counter() - began
    others = (_ticks_of_others() - before) / os.sysconf("SC_CLK_TCK") / max(seconds, 1e-9) / cores()
    return Round(seconds, seconds > 0.1 and others > OTHERS)  # a tick is 10 ms, too coarse for calls below 0.1 s


def interleave(device: Device, subjects: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[Round]]:
    """Times every subject once per round, in turn, after two untimed calls of each (which may compile)."""
    for subject in subjects.values():
        subject()
        subject()
    timings: dict[str, list[Round]] = {name: [] for name in subjects}
    for _ in range(rounds):
        for name, subject in subjects.items():
            timings[name].append(once(device, subject))
    return timings


def _clean_quartiles(rounds: Sequence[Round]) -> tuple[int, list[float]]:
    """Number and quartiles (three) of the undisturbed rounds; of all rounds if none was undisturbed."""
    clean = [value for value, disturbed in rounds if not disturbed] or [value for value, _ in rounds]
    return len(clean), np.percentile(clean, (25, 50, 75)).tolist()


def figures(rounds: Sequence[Round], images: int) -> dict[str, Any]:
    """Median and interquartile range of calls that process `images` each, in images/s and ms."""
    count, (low, median, high) = _clean_quartiles(rounds)
    return {
        "images_per_sec": round(images / median, 3), "ms": round(median * 1e3, 3),
        "ms_quartiles": [round(low * 1e3, 3), round(high * 1e3, 3)],
        "rounds": count, "disturbed_rounds": sum(disturbed for _, disturbed in rounds),
    }  # fmt: skip


def ratio(peer: Sequence[Round], ours: Sequence[Round]) -> dict[str, Any]:
    """Our speed over the peer's by pairs of rounds, which are undisturbed if both are: median, quartiles."""
    pairs = [Round(p.value / o.value, p.disturbed or o.disturbed) for p, o in zip(peer, ours, strict=True)]
    low, median, high = (round(value, 4) for value in _clean_quartiles(pairs)[1])
    return {"median": median, "quartiles": [low, high]}


def _ticks_of_others() -> int:
    """Busy ticks of all cores less those of this process and its living descendants; 0 where /proc is missing."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
        user, nice, system, _, _, irq, soft = map(int, fields[:7])
        return user + nice + system + irq + soft - _tree_ticks(os.getpid())
    except OSError:
        return 0


def _tree_ticks(pid: int) -> int:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        children = [c for t in Path(f"/proc/{pid}/task").iterdir() for c in (t / "children").read_text().split()]
    except OSError:
        return 0  # it has ended
    return sum(map(int, stat[11:15])) + sum(_tree_ticks(int(child)) for child in children)
