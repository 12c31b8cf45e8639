"""Faults of many kinds at random steps of runs on several hosts: the commands end with the same samples and bits.

`pytest -m nightly tests/test_chaos.py` makes 52 faults, four in each run. CHAOS_SEED=N sets the first run's seed, by
which a failure is repeated; CHAOS_TABLE=FILE collects a line per fault.
"""

from __future__ import annotations

import collections
import contextlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import miniature
import nodes as machines
import pytest

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which("bash"), reason="the launch scripts need bash on Linux"
)
SEED = int(os.environ.get("CHAOS_SEED", "1000"))
STEPS, FAULTS, RUNS = 30, 4, 13
TIMEOUT = 10  # seconds that ranks wait for one another
RECIPE = {
    "steps": STEPS, "timeout": TIMEOUT, "grace": 2, "restarts": 50, "save_every": "1 step", "log_every": "1 step",
    "eval_every": "10 steps", "keep": 2,
}  # fmt: skip
# What a rank does, or what happens to its node for so many seconds ("network", "disk").
KINDS = {
    "rank killed": {"do": "SIGKILL"},
    "segfault": {"do": "SIGSEGV"},
    "aborted by a library": {"do": "SIGABRT"},
    "error in Python": {"do": "error:injected"},
    "deadlock in C": {"do": "hold:600"},
    "rank sleeps forever": {"do": "sleep:600"},
    "slow rank": {"do": "sleep:3"},
    "launcher killed": {"do": "SIGKILL", "to": "launcher"},
    "node killed": {"do": "SIGKILL", "to": "node"},
    "network lost for 3 s": {"do": "sleep:0.2", "outside": ("network", 3.0)},
    "network lost for 30 s": {"do": "sleep:0.2", "outside": ("network", 30.0)},
    "disk full for 2 s": {"do": "sleep:0.2", "outside": ("disk", 2.0)},
}
LAYOUTS = [(2, 1), (1, 3), (2, 2)]  # hosts, ranks on each


class Outside:
    """Makes what happens to a node or the disk from outside, once the marker of such a fault appears."""

    def __init__(self, faults: Sequence[dict], hosts: Sequence[machines.Node], disk: Path):
        self._faults = [fault for fault in faults if "outside" in fault]
        self._hosts, self._ballast, self._until = hosts, disk / "ballast", {}

    def __call__(self) -> None:
        for fault in self._faults:
            kind, seconds = fault["outside"]
            name = fault["once"]
            if name not in self._until and os.path.exists(name):
                self._until[name] = time.monotonic() + seconds
                self._set(kind, fault, True)
            elif name in self._until and 0 < self._until[name] < time.monotonic():
                self._until[name] = 0.0
                self._set(kind, fault, False)

    def _set(self, kind: str, fault: dict, on: bool) -> None:
        if kind == "network":
            self._hosts[fault["rank"] * len(self._hosts) // fault["ranks"]].cut(on)
        elif on:
            with contextlib.suppress(OSError), open(self._ballast, "wb", buffering=0) as file:
                while file.write(bytes(1 << 16)):
                    pass
        else:
            self._ballast.unlink()


@contextlib.contextmanager
def disk(at: Path) -> Iterator[bool]:
    """A small file system, where one may be mounted."""
    at.mkdir()
    small = not subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", at], capture_output=True).returncode
    try:
        yield small
    finally:
        if small:
            subprocess.run(["umount", "-l", at], check=True)


def draw_faults(seed: int, folder: Path, hosts: int, each: int, may_fill: bool) -> list[dict]:
    """Four faults of different kinds at steps apart, the same for the same seed."""
    draw = random.Random(seed)
    kinds = [kind for kind, what in KINDS.items() if hosts > 1 or what.get("outside", "")[:1] != ("network",)]
    kinds = [kind for kind in kinds if may_fill or what_outside(kind) != "disk"]
    steps = sorted(draw.sample(range(2, STEPS - 4, 3), FAULTS))
    return [
        {"at": "at step", "n": step, "kind": kind, "rank": draw.randrange(hosts * each), "ranks": hosts * each,
         "once": str(folder / f"{step}"), **KINDS[kind]}
        for step, kind in zip(steps, draw.sample(kinds, FAULTS), strict=True)
    ]  # fmt: skip


def what_outside(kind: str) -> str:
    return KINDS[kind].get("outside", ("",))[0]


def seen(folder: Path) -> list[list]:
    """What the ranks have written down: time, launcher, attempt, rank, steps done, ids."""
    lines = [line for path in folder.glob("*.jsonl") for line in path.read_text().splitlines()]
    return sorted(json.loads(line) for line in lines)


def samples(folder: Path, ranks: int | None = None) -> dict[int, set[tuple[int, ...]]]:
    """By step, the ids of its samples in the order of the ranks, of every attempt that has done it with all ranks."""
    parts: dict[tuple[str, int], dict[int, list[int]]] = collections.defaultdict(dict)
    for _, _, attempt, rank, step, ids in seen(folder):
        parts[attempt, step][rank] = ids
    found = collections.defaultdict(set)
    for (_, step), by_rank in parts.items():
        ids = tuple(i for rank in sorted(by_rank) for i in by_rank[rank])
        if len(ids) == miniature.RECIPE["batch_size"]:  # otherwise a rank had ended
            found[step].add(tuple(sorted(ids)))
    return found


def healing(fault: dict, folder: Path, hosts: Sequence[machines.Node]) -> dict | None:
    """The line of the table for a fault that has happened."""
    marker = Path(fault["once"])
    if not marker.exists():
        return None
    began, entries = marker.stat().st_mtime, seen(folder)
    attempt = next(entry[2] for entry in reversed(entries) if entry[0] <= began)
    after = [entry for entry in entries if entry[0] > began and entry[4] > fault["n"]]
    healed = after[0]
    outcome = "went on" if healed[2] == attempt else "ranks started again"
    known = {entry[1] for entry in entries if entry[0] <= began}
    later = {entry[1] for entry in entries if began < entry[0] <= healed[0] + 1}
    if later - known:
        outcome = "command started again"
    return {"kind": fault["kind"], "outcome": outcome, "seconds": round(healed[0] - began, 1), "step": fault["n"]}


@pytest.fixture(scope="module")
def wholes(tmp_path_factory):
    """The workdirs of runs without faults, by the number of ranks, with the samples that they saw."""
    made: dict[int, Path] = {}

    def of(ranks: int) -> Path:
        if ranks not in made:
            made[ranks] = tmp_path_factory.mktemp(f"whole-{ranks}")
            (made[ranks] / "samples").mkdir()
            log = {"at": "samples", "folder": str(made[ranks] / "samples")}
            words = miniature.words(made[ranks] / "run", f"cpu{ranks}", **RECIPE)
            ended = miniature.end(miniature.start(words, log), timeout=540)
            assert ended.code == 0, ended.err
        return made[ranks]

    return of


def survive(seed: int, folder: Path, wholes) -> None:
    """A run with faults ends as one without."""
    hosts, each = LAYOUTS[seed % len(LAYOUTS)]
    ranks = hosts * each
    whole = wholes(ranks)
    (folder / "samples").mkdir()
    (folder / "faults").mkdir()
    with disk(folder / "disk") as small, machines.hosts(hosts, folder / "out") as nodes:
        faults = draw_faults(seed, folder / "faults", hosts, each, small)
        print(f"CHAOS_SEED={seed}: {hosts} hosts of {each}: ", [(f["kind"], f["n"], f["rank"]) for f in faults])
        workdir = folder / "disk" / "run"
        log = {"at": "samples", "folder": str(folder / "samples")}
        words = miniature.words(workdir, f"cpu{ranks}", **RECIPE)
        machines.schedule(nodes, words, [log, *faults], 540, Outside(faults, nodes, folder / "disk"))
        lines = [line for fault in faults if (line := healing(fault, folder / "samples", nodes))]
        assert len(lines) == len(faults), lines
        if table := os.environ.get("CHAOS_TABLE"):
            with open(table, "a") as file:
                file.writelines(json.dumps(line | {"seed": seed}) + "\n" for line in lines)
        ours, theirs = samples(folder / "samples"), samples(whole / "samples")
        assert ours == theirs
        miniature.assert_same_run(workdir, whole / "run")


def run_hosts(folder: Path, faults: Sequence[dict], away: dict[int, float], **fields: object) -> Path:
    """A run on two hosts of one rank each, in which one stays away after it was killed; returns the workdir."""
    (folder / "samples").mkdir()
    log = {"at": "samples", "folder": str(folder / "samples")}
    words = miniature.words(folder / "run", "cpu2", **{**RECIPE, **fields})
    with machines.hosts(2, folder / "out") as nodes:
        machines.schedule(nodes, words, [log, *faults], 300, away=away)
    return folder / "run"


def lost(folder: Path) -> dict:
    """The second host is gone after step 6."""
    return {"at": "at step", "n": 6, "do": "SIGKILL", "to": "node", "rank": 1, "once": str(folder / "gone")}


def sizes(folder: Path) -> list[int]:
    """The number of ranks of each attempt."""
    ranks: dict[str, set[int]] = collections.defaultdict(set)
    for _, _, attempt, rank, _, _ in seen(folder):
        ranks[attempt].add(rank)
    return [len(found) for found in ranks.values()]


def assert_equal_within_rounding(workdir: Path, whole: Path) -> None:
    """Sums in another order; other samples would differ in the first digits."""
    ours, theirs = miniature.records(workdir), miniature.records(whole)
    assert [(r["kind"], r["step"]) for r in ours] == [(r["kind"], r["step"]) for r in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=2e-5)  # as in test_resume.py


@pytest.mark.slow
def test_a_host_that_takes_the_place_of_another_joins_the_run(tmp_path, wholes):
    run = run_hosts(tmp_path, [lost(tmp_path)], {})
    miniature.assert_same_run(run, wholes(2) / "run")
    assert sizes(tmp_path / "samples") == [2, 2]


@pytest.mark.slow
def test_a_run_goes_on_without_a_host_that_does_not_come_back_with_the_same_samples(tmp_path, wholes):
    run = run_hosts(tmp_path, [lost(tmp_path)], {1: math.inf}, elastic=1)
    assert samples(tmp_path / "samples") == samples(wholes(2) / "samples")
    assert_equal_within_rounding(run, wholes(2) / "run")
    assert sizes(tmp_path / "samples") == [2, 1] and len(miniature.restarts(run)) == 1


@pytest.mark.nightly
def test_a_host_that_comes_back_late_joins_the_run_again(tmp_path, wholes):
    slow = {"at": "inside step", "n": 1, "again": True, "do": "sleep:2", "rank": 0, "restarted": True}
    run = run_hosts(tmp_path, [lost(tmp_path), slow], {1: 60.0}, elastic=1)
    assert samples(tmp_path / "samples") == samples(wholes(2) / "samples")
    assert_equal_within_rounding(run, wholes(2) / "run")
    assert sizes(tmp_path / "samples") == [2, 1, 2]
    assert miniature.restarts(run)[-1]["reason"] == "a host has joined or left the run"


@pytest.mark.nightly
@pytest.mark.parametrize("node", [0, 1])
def test_a_host_that_stands_still_for_longer_than_the_limit_joins_again(node, tmp_path, wholes):
    pause = {"at": "at step", "n": 6, "do": "sleep:0.2", "rank": node, "once": str(tmp_path / "paused")}
    (tmp_path / "samples").mkdir()
    log = {"at": "samples", "folder": str(tmp_path / "samples")}
    words, until = miniature.words(tmp_path / "run", "cpu2", **RECIPE), math.inf

    def watch() -> None:
        nonlocal until
        if until == math.inf and os.path.exists(pause["once"]):
            until = time.monotonic() + 3 * TIMEOUT
            nodes[node].signal(signal.SIGSTOP)
        elif 0 < until < time.monotonic():
            until = 0.0
            nodes[node].signal(signal.SIGCONT)

    with machines.hosts(2, tmp_path / "out") as nodes:
        machines.schedule(nodes, words, [log, pause], 300, watch)
    assert until == 0.0 and samples(tmp_path / "samples") == samples(wholes(2) / "samples")
    miniature.assert_same_run(tmp_path / "run", wholes(2) / "run")


@pytest.mark.nightly
@pytest.mark.parametrize("run", range(RUNS))
def test_random_faults_change_no_sample_and_no_bit(run, tmp_path, wholes):
    survive(SEED + run, tmp_path, wholes)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [4, 67, 69])  # together they have each kind once
def test_faults_of_fixed_seeds_change_no_sample_and_no_bit(seed, tmp_path, wholes):
    survive(seed, tmp_path, wholes)
