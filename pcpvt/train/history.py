"""What the steps of a run have measured: sums until the next record, records to the metrics file and to the console.

Metrics stay on the device until they are needed, which keeps it busy; they are read in the order of their steps, so a
record's numbers do not depend on when. All that a record depends on is in `memory`, which a checkpoint keeps.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from pcpvt.config.plan import Plan
from pcpvt.evaluate import evaluator
from pcpvt.models.pcpvt import SPECS
from pcpvt.runtime import environment, records
from pcpvt.runtime.console import Console, Progress
from pcpvt.runtime.session import Session
from pcpvt.train import tensorboard, utilisation

PENDING = 100  # steps whose metrics may wait on the device


class BadStep(NamedTuple):
    """A step whose loss or gradient was not finite."""

    step: int  # the number of steps done, this one included
    loss: float
    grad_norm: float


class Diverged(Exception):
    """`config.max_skipped` steps in a row were not finite."""

    def __init__(self, steps: list[BadStep]):
        super().__init__(steps)
        self.steps = steps


class Recorder:
    """Measures steps, and writes records.

    Args:
        step: how many are done.
        memory: of the checkpoint that the run goes on from; None at its beginning.
    """

    def __init__(self, session: Session, plan: Plan, console: Console, step: int, memory: Mapping[str, Any] | None):
        self.plan, self.console, self.max_skipped = plan, console, session.config.max_skipped
        self.progress = Progress(console, steps=plan.steps, epochs=plan.epochs, batch=plan.batch)
        memory = memory or {"window": _window(), "clock": {"steps": 0, "seconds": 0.0, "elapsed": 0.0}, "records": 0}
        self.window: dict[str, float] = dict(memory["window"])  # since the last record
        self.clock: dict[str, float] = dict(memory["clock"])  # of the whole run, over all its parts
        self.replaced: int = memory.get("replaced", 0)  # draws of unreadable images, of the whole run
        self._records = memory["records"]
        self._path = session.workdir / "metrics.jsonl" if session.world.is_main else None
        self._file: records.MetricsFile | None = None
        self._pending: list[tuple[int, dict[str, Tensor]]] = []
        self._bad: list[BadStep] = []
        self._steps = 0  # of this part of the run
        self._began = time.perf_counter()
        self._session, self._start = session, step
        self._board: tensorboard.Board | None = None
        self._per_image = utilisation.multiply_adds(SPECS[session.config.model.name], plan.size, plan.num_classes)
        self._peak = utilisation.peak_flops(session.device.describe(), session.policy.compute)
        self._warned = False

    def open(self) -> None:
        """Opens the metrics file; its records of steps that will be done again are dropped."""
        if self._path is not None:
            self._file = records.MetricsFile(self._path, self._records)
            records.write_json(self._session.workdir / environment.FILE, environment.describe(self._session))
            if self._session.config.tensorboard:
                self._board = tensorboard.Board(self._session.workdir, self._start, self.console.warn)
                self._board.config(self._session.config.to_dict(), self._start)
                for entry in records.read_metrics(self._path):
                    if entry["step"] == self._start:  # events of this step are purged: perhaps it is evaluated again
                        self._board.record(entry)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()

    def images(self, batch: dict[str, Tensor]) -> None:
        """Shows the run's first batch."""
        if self._board is not None:
            self._board.images(batch, 0)

    def sync(self) -> None:
        """Makes the records durable; raises OSError when they are not."""
        if self._file is not None:
            self._file.sync()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to write the same records."""
        self.drain()
        clock = {**self.clock, "elapsed": self.elapsed}
        written = self._file.count if self._file else 0
        return {"window": dict(self.window), "clock": clock, "records": written, "replaced": self.replaced}

    @property
    def elapsed(self) -> float:
        """Seconds of the run so far, over all its parts."""
        return self.clock["elapsed"] + time.perf_counter() - self._began

    @property
    def images_per_sec(self) -> float:
        """Over all steps, without the first one of each part, which starts the loader and may compile."""
        return self.clock["steps"] * self.plan.batch / self.clock["seconds"] if self.clock["seconds"] else 0.0

    def step(self, step: int, metrics: dict[str, Tensor], began: float, waited: float, *, read: bool) -> float:
        """One step done.

        Args:
            step: how many are done.
            began: `time.perf_counter()` when it began, by waiting for its batch `waited` seconds.
            read: read the metrics now, for what is due after this step.

        Returns:
            its seconds.
        """
        self._pending.append((step, metrics))
        self._steps += 1
        if read or len(self._pending) >= PENDING or self._steps <= 2:  # the first two are timed for the preflight
            self.drain()
        seconds = time.perf_counter() - began
        if self._steps > 1 or self.plan.steps == 1:
            self.clock["steps"] += 1
            self.clock["seconds"] += seconds
        self.progress.tick(step, seconds, waited)
        return seconds

    def drain(self) -> None:
        """Reads the pending metrics.

        Raises:
            Diverged: when too many steps in a row were not finite.
        """
        pending, self._pending = self._pending, []
        for step, metrics in pending:
            loss, grad_norm, skipped = (metrics[name].item() for name in ("loss", "grad_norm", "skipped"))
            self.window["grad_norm"] = grad_norm
            if not skipped and math.isfinite(loss):
                self.window["loss"] += loss
                self.window["steps"] += 1
                self._bad.clear()
                continue
            self.window["skipped"] += 1
            self._bad.append(BadStep(step, loss, grad_norm))
            if self.console.speaks:  # all processes know
                self.console.warn(
                    f"step {step}: the loss or gradient is not finite; updates skipped in a row: {skipped}"
                )
            if skipped >= self.max_skipped:
                raise Diverged(self._bad)

    def record(self, step: int) -> None:
        """One record of the steps since the last."""
        self.drain()
        rate, n = self.progress.rate, self.window["steps"]
        entry: dict[str, Any] = {
            "kind": "train",
            "step": step,
            "epoch": self._epoch(step),
            "loss": self.window["loss"] / n if n else math.nan,
            "lr": self.plan.schedule(step - 1),
            "grad_norm": self.window["grad_norm"],
            "skipped": self.window["skipped"],
            "images_per_sec": round(rate.images_per_sec, 2),
            "waiting": round(rate.waiting, 4),
        }
        if self.replaced:
            entry["replaced"] = self.replaced
        share = utilisation.mfu(rate.images_per_sec, self._per_image, self._peak, self._session.world.size)
        if share is not None:
            entry["mfu"] = round(share, 4)
        self.window = _window()
        self._write(entry)
        self.progress.record(entry)

    def evaluation(self, step: int, summary: dict[str, float], seconds: float) -> None:
        """One record of an evaluation."""
        entry = {"kind": "eval", "step": step, "epoch": self._epoch(step), **summary, "seconds": round(seconds, 2)}
        self._write(entry)
        self.console.say(f"epoch {entry['epoch']:.2f}  {evaluator.report(summary)}")

    def _epoch(self, step: int) -> float:
        return round(step * self.plan.batch / self.plan.examples, 4)

    def _write(self, entry: dict[str, Any]) -> None:
        if self._board is not None:
            self._board.record(entry)
        error = self._file.write(entry) if self._file else None
        if error and not self._warned:
            self._warned = True
            self.console.warn(f"{self._path}: not written ({error.strerror}); its records wait until they can be")


def _window() -> dict[str, float]:
    return {"loss": 0.0, "steps": 0, "skipped": 0, "grad_norm": 0.0}
