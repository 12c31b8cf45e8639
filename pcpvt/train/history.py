"""Training history: what a run has measured so far, as immutable data that checkpoints store."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from pcpvt.config.plan import Plan
from pcpvt.functional.metrics import score


class BadStep(NamedTuple):
    """A step whose loss or gradient was not finite."""

    step: int  # steps done, this one included
    loss: float
    grad_norm: float
    in_a_row: int  # consecutive steps without an update, this one included, also those before a resume


class Window(NamedTuple):
    """Sums over the steps since the last record."""

    loss: float = 0.0  # of the steps that were applied
    steps: int = 0  # applied
    skipped: int = 0  # not applied, because the loss or gradient was not finite
    grad_norm: float = 0.0  # of the last step


class Clock(NamedTuple):
    """Durations over all parts of a run."""

    steps: int = 0  # timed steps; the first step of each part is excluded, because it starts loaders and may compile
    seconds: float = 0.0  # of the timed steps
    elapsed: float = 0.0  # of the earlier parts, evaluations and checkpoints included


class History(NamedTuple):
    """Everything measured up to a step; the loop replaces it, a checkpoint stores it (`to_meta`, `from_meta`)."""

    metrics: dict[str, Any] | None = None  # evaluation of the current parameters, if there was one
    best: dict[str, Any] | None = None  # the best evaluation, with its step
    window: Window = Window()
    clock: Clock = Clock()
    records: int = 0  # lines of metrics.jsonl
    stale: int = 0  # evaluations since the last one that was better than all before it
    replaced: int = 0  # draws of unreadable training images that were replaced by the next image
    streak: tuple[BadStep, ...] = ()  # non-finite steps in a row up to now, in this part of the run; not stored

    def to_meta(self, elapsed: float) -> dict[str, Any]:
        """The JSON in a checkpoint; `elapsed`: seconds of the run so far."""
        clock = self.clock._replace(elapsed=elapsed)
        meta = self._asdict() | {"window": self.window._asdict(), "clock": clock._asdict()}
        del meta["streak"]
        return meta

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any]) -> History:
        """The history that a checkpoint stores (`resume.REQUIRED` checks its types)."""
        window = Window(*(meta["window"][name] for name in Window._fields))
        clock = Clock(*(meta["clock"][name] for name in Clock._fields))
        counts = (meta["records"], meta.get("stale", 0), meta.get("replaced", 0))
        return cls(meta.get("metrics"), meta.get("best"), window, clock, *counts)

    def images_per_sec(self, batch: int) -> float:
        return self.clock.steps * batch / self.clock.seconds if self.clock.seconds else 0.0

    def exhausted(self, patience: int) -> bool:
        """Whether `patience` evaluations in a row were no better than the best before them (`config.patience`)."""
        return 0 < patience <= self.stale

    def diverged(self, max_skipped: int) -> bool:
        """Whether `max_skipped` steps in a row were not finite (`config.max_skipped`)."""
        return bool(self.streak) and self.streak[-1].in_a_row >= max_skipped


def add_metrics(history: History, step: int, metrics: Mapping[str, Tensor]) -> History:
    """Read a step's metrics from the device and add them; a non-finite step becomes the last of the streak."""
    loss, grad_norm, skipped = (metrics[name].item() for name in ("loss", "grad_norm", "skipped"))
    window = history.window._replace(grad_norm=grad_norm)
    if skipped or not math.isfinite(loss):
        streak = (*history.streak, BadStep(step, loss, grad_norm, int(skipped)))
        return history._replace(window=window._replace(skipped=window.skipped + 1), streak=streak)
    return history._replace(window=window._replace(loss=window.loss + loss, steps=window.steps + 1), streak=())


def add_evaluation(history: History, step: int, metrics: Mapping[str, float], by: str) -> History:
    """Add an evaluation of the current parameters; it is the best if none was better in `by` (`config.best`)."""
    history = history._replace(metrics=dict(metrics), records=history.records + 1)
    before = None if history.best is None else score(history.best, by)
    now = score(metrics, by)
    if before is None or now >= before:  # of equal ones the later
        history = history._replace(best={**metrics, "step": step})
    return history._replace(stale=0 if before is None or now > before else history.stale + 1)


def add_step(history: History, seconds: float, *, timed: bool) -> History:
    """Add the duration of one step, unless it is excluded from the clock."""
    if not timed:
        return history
    clock = history.clock
    return history._replace(clock=clock._replace(steps=clock.steps + 1, seconds=clock.seconds + seconds))


def train_record(history: History, plan: Plan, step: int, rate: Rate, mfu: float | None) -> dict[str, Any]:
    """The record of the steps since the last one, as a line of `metrics.jsonl`."""
    window = history.window
    entry: dict[str, Any] = {
        "kind": "train", "step": step, "epoch": _epoch(plan, step),
        "loss": window.loss / window.steps if window.steps else math.nan,
        "lr": plan.schedule(step - 1), "grad_norm": window.grad_norm, "skipped": window.skipped,
        "images_per_sec": round(rate.images_per_sec, 2), "waiting": round(rate.waiting, 4),
    }  # fmt: skip
    if len(plan.sizes.sizes) > 1:
        entry["image_size"] = plan.sizes.at(step - 1)[0]
    if history.replaced:
        entry["replaced"] = history.replaced
    if mfu is not None:
        entry["mfu"] = round(mfu, 4)
    return entry


def eval_record(plan: Plan, step: int, metrics: Mapping[str, float], seconds: float) -> dict[str, Any]:
    """The record of one evaluation."""
    return {"kind": "eval", "step": step, "epoch": _epoch(plan, step), **metrics, "seconds": round(seconds, 2)}


def restart_record(plan: Plan, step: int, number: int, reason: str) -> dict[str, Any]:
    """The record of a restart of all processes, the `number`-th of this launcher."""
    return {"kind": "restart", "step": step, "epoch": _epoch(plan, step), "restart": number, "reason": reason}


def _epoch(plan: Plan, step: int) -> float:
    return round(step * plan.batch / plan.examples, 4)


class Rate:
    """Speed over a sliding window of recent steps.

    The caller measures the durations, so evaluations and checkpoints between two steps do not count. The first step is
    excluded, because it may compile.

    Attributes:
        window: seconds of steps to average over; at least two steps are.
        images_per_sec: 0 until it is known.
        slowest: seconds of the slowest step so far; 0 until there is one.
        waiting: share of the time spent waiting for data, between 0 and 1.
    """

    def __init__(self, window: float = 30.0):
        self.window, self.images_per_sec, self.slowest, self.waiting = window, 0.0, 0.0, 0.0
        self._totals: deque[tuple[int, float, float]] = deque()  # after each step: images, seconds, seconds waited

    def restart(self) -> None:
        """Leave the steps so far out of the average, because the next ones have another size.

        The device must have done them, or the time that they still take would be counted as that of the next ones.
        """
        while len(self._totals) > 1:
            self._totals.popleft()

    def add(self, images: int, seconds: float, waited: float = 0.0) -> None:
        """Add one step: images over all processes, its seconds, and the seconds of those spent waiting for data."""
        if not self._totals:
            self._totals.append((0, 0.0, 0.0))
            return
        self.slowest = max(self.slowest, seconds)
        before = self._totals[-1]
        self._totals.append((before[0] + images, before[1] + seconds, before[2] + waited))
        while len(self._totals) > 3 and self._totals[-1][1] - self._totals[1][1] >= self.window:
            self._totals.popleft()
        total = [end - begin for begin, end in zip(self._totals[0], self._totals[-1], strict=True)]
        if total[1] > 0:
            self.images_per_sec, self.waiting = total[0] / total[1], min(1.0, max(0.0, total[2] / total[1]))
