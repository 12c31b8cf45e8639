"""Checks before the first step: cards, memory, clocks, workdir, data, and the time of one all-reduce.

What is certain to spoil the run ends it (UserError in all processes); what may do so is a warning. A run of one process
prints warnings only. `launch/checks.txt` says in words what is checked; the scripts' --dry_run prints it.
"""

import hashlib
import secrets
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from pcpvt.data.sources import Dataset
from pcpvt.devices import visible
from pcpvt.distributed import collectives
from pcpvt.errors import UserError
from pcpvt.nodes import cards, host
from pcpvt.nodes.host import Report
from pcpvt.runtime.console import warn_once
from pcpvt.runtime.session import Session

MEMORY = 2**30  # bytes for a process, its loader processes included
SHM = 2**27  # bytes of /dev/shm for a process whose loader processes pass batches through it
CLOCKS = 5.0  # seconds: more confuses the times of logs and files, and which of two files is newer
ROUNDS = 3  # measurements, of which the best counts: others wait for busy cores
REDUCED = 2**20  # float32 numbers, 4 MB
SLOW = {"cpu": 2.0, "cuda": 0.1, "npu": 0.1}  # seconds for them; a step of S reduces 24 million numbers
clock = time.time


class Finding(NamedTuple):
    """What a check says of all processes."""

    line: str
    doubts: list[str]  # warnings
    certain: list[str]  # errors


def before_start(session: Session, train: Dataset, val: Dataset, say: Callable[[str], None]) -> None:
    """Checks the nodes of a training run; called by all processes.

    Raises:
        UserError: when no card of a host is healthy, or the workdir or the data are not the same for all processes.
    """
    config, device = session.config, session.device.name
    reports = [host.load(text) for text in collectives.gather_texts(_report(session, train, val).dump())]
    loads = not train.in_memory and config.data.workers != 0
    findings = [
        *([] if device == "cpu" else [of_cards(reports, device)]), of_memory(reports, loads), of_clocks(reports),
        of_workdir(reports), of_data(reports),
    ]  # fmt: skip
    if certain := [text for finding in findings for text in finding.certain]:
        raise UserError("; ".join(certain))
    if session.world.size > 1:
        findings.append(of_reduction(collectives.reduction_time(session.device, REDUCED, ROUNDS), device))
        for finding in findings:
            say(f"check: {finding.line}")
    for doubt in [text for finding in findings for text in finding.doubts]:
        warn_once(doubt)


def _report(session: Session, train: Dataset, val: Dataset) -> Report:
    """What this process finds; all processes share the moments and the file."""
    world, device = session.world, session.device.name
    moments = []
    for _ in range(ROUNDS if world.size > 1 else 0):
        collectives.sum_numbers([0.0])  # ends in all processes at the same time
        moments.append(clock())
    found = Report(
        world.rank, host.name(), collectives.local_size(), moments, str(session.workdir), _sees_rank_0(session),
        session.config.data.path, [len(train), len(val)],
        hashlib.sha256("\0".join(train.classes).encode(errors="surrogateescape")).hexdigest(),
    )  # fmt: skip
    if world.local_rank:
        return found
    return found._replace(
        cards=None if device == "cpu" else cards.health(device), memory=host.available_memory(),
        shm=host.free_space("/dev/shm"), disk=host.free_space(session.workdir),
    )  # fmt: skip


def _sees_rank_0(session: Session) -> bool:
    """Whether this process's workdir is rank 0's: a file with random name and text, which rank 0 writes, is in it."""
    if session.world.size == 1:
        return True
    name, text = f".shared-{secrets.token_hex(8)}", secrets.token_hex(8)
    if session.world.is_main:
        (session.workdir / name).write_text(text)
    try:
        theirs, text = collectives.gather_texts(f"{name} {text}")[0].split()
        seen = host.sees(session.workdir / theirs, text)
        collectives.any_true(False)  # all have looked
    finally:
        if session.world.is_main:
            (session.workdir / name).unlink(missing_ok=True)
    return seen


def of_cards(reports: Sequence[Report], device: str) -> Finding:
    """A sick card is a doubt; a host without a healthy one is certain to fail."""
    tool, doubts, certain = visible.CHECKS[device], [], []
    known: list[str] = []
    unknown: list[str] = []
    for node in _nodes(reports):
        states = node.cards or {}
        sick = {card: state for card, state in states.items() if state != cards.HEALTHY}
        known += states.values()
        if not states:
            unknown.append(node.host)
        elif len(sick) == len(states):
            what = ", ".join(f"{card} {state}" for card, state in sick.items())
            certain.append(f"config.device: {device!r}: no card of {node.host} is healthy ({what}): use other nodes")
        doubts += [
            f"{node.host}: {tool} says {state} of card {card}: leave it out with {visible.VARIABLES[device]}, or use "
            "another node"
            for card, state in sick.items()
        ]
    line = f"cards: {known.count(cards.HEALTHY)} of {len(known)} healthy ({tool})"
    return Finding(f"{line}; not known on {_listed(unknown)}" if unknown else line, doubts, certain)


def of_memory(reports: Sequence[Report], loads: bool) -> Finding:
    """Doubts where a host has less memory than its processes need; `loads`: whether loader processes read the data."""
    nodes, doubts = _nodes(reports), []
    for node in nodes:
        for what, free, needed, remedy in (
            ("memory", node.memory, MEMORY, "end other programs, or lower config.batch_size or config.data.workers"),
            ("/dev/shm", node.shm if loads else None, SHM, "docker: --shm-size; a pod: an emptyDir of medium Memory"),
        ):
            if free is not None and free < needed * node.processes:
                doubts.append(f"{node.host}: {_gb(free)} of {what} free for {node.processes} processes: {remedy}")
    amounts = [(what, [n for n in free if n is not None]) for what, free in (
        ("memory", [node.memory for node in nodes]), ("/dev/shm", [node.shm for node in nodes]),
        ("the workdir's disk", [node.disk for node in nodes]),
    )]  # fmt: skip
    least = ", ".join(f"{_gb(min(sizes))} of {what}" for what, sizes in amounts if sizes)
    return Finding(f"memory: on each node at least {least} free", doubts, [])


def of_clocks(reports: Sequence[Report]) -> Finding:
    """A doubt where the clocks of two processes are more than CLOCKS seconds apart."""
    first, doubts = reports[0], []
    # A process that has waited for a core tells a later time: the least difference counts.
    ahead = [min((a - b for a, b in zip(r.clock, first.clock, strict=True)), key=abs, default=0.0) for r in reports]
    skew, report = max(zip(ahead, reports, strict=True), key=lambda pair: abs(pair[0]))
    if abs(skew) > CLOCKS:
        doubts = [
            f"the clock of {report.place} differs by {skew:+.1f} s from that of {first.place}: set both by NTP; the "
            "times of logs and files are wrong"
        ]
    return Finding(f"clocks: at most {abs(skew):.2g} s apart", doubts, [])


def of_workdir(reports: Sequence[Report]) -> Finding:
    """Certain to fail where a process does not see what rank 0 has written."""
    first, certain = reports[0], []
    if apart := [report.place for report in reports if not report.shared]:
        certain = [
            f"--workdir: {first.workdir}: {_listed(apart)} does not see what {first.place} writes there: give a folder "
            "on a file system that all hosts share"
        ]
    return Finding(f"workdir: one folder for all {len(reports)} processes", [], certain)


def of_data(reports: Sequence[Report]) -> Finding:
    """Certain to fail where processes find other numbers of images, or other classes."""
    first, certain = reports[0], []
    if other := [report for report in reports if (report.data, report.classes) != (first.data, first.classes)]:
        theirs = "other classes" if other[0].data == first.data else "{} and {}".format(*other[0].data)
        certain = [
            f"config.data.path: {first.source}: {first.place} finds {first.data[0]} training and {first.data[1]} "
            f"validation images, {_listed([report.place for report in other])} {theirs}: give all hosts the same files"
        ]
    return Finding("data: {} training and {} validation images in each process".format(*first.data), [], certain)


def of_reduction(seconds: float, device: str) -> Finding:
    """A doubt where the all-reduce of REDUCED numbers, which took `seconds`, is slower than SLOW."""
    line = f"all-reduce: 4.2 MB in {seconds * 1000:.3g} ms"
    variables = "GLOO_SOCKET_IFNAME" if device != "npu" else "GLOO_SOCKET_IFNAME and HCCL_SOCKET_IFNAME"
    doubt = f"{line}, which is slow: check the network between the nodes, and the interface in {variables}"
    return Finding(line, [doubt] if seconds > SLOW[device] else [], [])


def _nodes(reports: Sequence[Report]) -> list[Report]:
    """The reports of the first process of each host."""
    return [report for report in reports if report.memory is not None]


def _gb(size: int) -> str:
    return f"{size / 1e9:.3g} GB"


def _listed(places: list[str]) -> str:
    return places[0] if len(places) == 1 else f"{places[0]} (and {len(places) - 1} more)"
