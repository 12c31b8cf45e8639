"""When the processes of a run are started again after a failure, and why they were."""

import json
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pcpvt.distributed import flight, signals, stacks, suspect
from pcpvt.errors import show, warn

FINAL = frozenset({2, signals.PREEMPTED})  # exit codes after which nothing is started again
STOPPED = (signals.PREEMPTED, signals.PEER_LOST)  # exit codes of ranks that ended because of a signal or another rank
CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL)  # faulthandler's
RESTART = "PCPVT_RESTART"  # environment variable of ranks: a `Restart` as JSON


class Failure(NamedTuple):
    """A rank that has ended with an error; torchelastic's ProcessFailure has these attributes too."""

    exitcode: int  # -n when signal n has killed it
    timestamp: int  # seconds


Failures = Mapping[int, Any]  # by rank


class Restart(NamedTuple):
    """Why the processes of a run were started again."""

    number: int  # from 1
    reason: str


def restarted() -> Restart | None:
    """The restart that has started this process; None in a first attempt."""
    return Restart(*json.loads(os.environ[RESTART])) if RESTART in os.environ else None


class Rule:
    """When all ranks are started again: not after an error of the user or a signal, nor without progress.

    Args:
        debug: the folder of stacks and recorded collectives.
        found: the file in which ranks tell what an audit has found.
        ends_on_fault: nor when an audit has found a fault (`config.audit_action`).
        fewest, batch: see `suspect.choose`.

    Attributes:
        left: this host has left the run, which goes on without it.
    """

    def __init__(
        self, newest_checkpoint: Callable[[], Path | None], debug: Path, found: Path, *, ends_on_fault: bool = False,
        fewest: int = 0, batch: int = 0,
    ):  # fmt: skip
        self._newest, self._debug, self._done = newest_checkpoint, debug, 0
        self._final = FINAL | {signals.FAULTY} if ends_on_fault else FINAL
        self._found, self._fewest, self._batch = found, fewest, batch
        self._before: Path | None = None  # the newest checkpoint at the restart before
        self.left = False

    def __call__(self, failures: Failures, attempt: suspect.Attempt) -> str:
        """The reason to start all ranks again, which is printed; empty when they are not, or this host leaves."""
        codes = {failure.exitcode for failure in failures.values()}
        if signals.stop_requested() or codes & self._final:
            return ""
        found = suspect.take(self._found)
        if found is not None:
            return self._after_audit(found, attempt)
        if signals.FAULTY in codes:
            show("an audit found a fault, and this launcher cannot read which: not started again")
            return ""
        return self._again(what_failed(failures, self._debug))

    def _after_audit(self, found: suspect.Finding, attempt: suspect.Attempt) -> str:
        choice = suspect.choose(found, attempt, self._fewest, self._batch)
        if choice.leaves == attempt.host:
            self._leave(found)
            return ""
        if choice.ends:
            show(
                f"not started again: the error recurred when the work was repeated, and {found.who()} cannot be "
                f"left out: {choice.why}"
            )
            return ""
        what = f"an audit found a fault: {found.who()}"
        if choice.leaves is None:
            return self._again(what, f", the suspect included: {choice.why}")
        return self._again(f"{what}, whose host leaves the run", helps=True)

    def _again(self, what: str, remark: str = "", *, helps: bool = False) -> str:
        """The reason `what`, unless the last restart brought no newer checkpoint and nothing `helps` the next one."""
        newest = self._newest()
        if self._done and newest == self._before and not helps:
            warn(f"{what}; not started again: there is no newer checkpoint than after restart {self._done}")
            return ""
        self._done, self._before = self._done + 1, newest
        warn(f"{what}; restart {self._done}, from {newest.name if newest else 'step 0'}{remark}")
        return what

    def _leave(self, found: suspect.Finding) -> None:
        self.left = True
        noted = suspect.note_left(self._debug, found)
        show(
            f"this host leaves the run, which goes on without it: {found.who()} computed wrongly in step {found.step}; "
            f"evidence: {found.evidence}; until {noted} is removed this host does not join again"
        )


def first_failure(failures: Failures) -> tuple[int, int]:
    """The rank that failed first and its exit code, of torchelastic's failures by rank."""
    # Timestamps are whole seconds; among equal ones a rank with an error of its own comes first.
    rank, first = min(failures.items(), key=lambda item: (item[1].timestamp, item[1].exitcode in STOPPED))
    return rank, first.exitcode


def what_failed(failures: Failures, debug: Path) -> str:
    """What happened to the rank that failed first; `debug` is the folder in which it has written where it was."""
    rank, code = first_failure(failures)
    if code == signals.PEER_LOST:
        return f"rank {rank} has lost another"
    if code == signals.FAULTY:
        return "an audit found a fault"
    if code >= 0:
        return f"rank {rank} failed with exit code {code}"
    what = f"rank {rank} was killed by {signal.Signals(-code).name}"
    if code == -signal.SIGABRT:  # as libraries end a process, among them the watchdogs of NCCL and HCCL
        if flight.ended_by_watchdog(debug, rank, failures[rank].timestamp):
            what += (
                ", by the watchdog of its collectives: one has failed or was not over in time, because another rank "
                f"has ended or hangs ({debug.name}/{flight.watchdog_file(debug, rank).name} has the last ones)"
            )
        else:
            what += ", by a library (its own lines above say why)"
    if -code in CRASHES:
        what += f"; its stacks are in the workdir's {debug.name}/{stacks.file_of(debug, rank).name}"
    return what
