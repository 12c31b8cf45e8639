"""Writes the checkpoints of a training run in a background thread, one at a time, while training continues."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pcpvt.checkpoints import checkpoint
from pcpvt.distributed import signals
from pcpvt.errors import UserError
from pcpvt.functional import state as states
from pcpvt.functional.state import TrainState


@dataclass
class Saver:
    """Writes the checkpoints of one run. A failure is a warning, and the same step may be saved again."""

    folder: Path
    keep_checkpoints: int  # the newest ones, beside the best one
    warn: Callable[[str], None]  # called with one line when a checkpoint was not written and training goes on
    before: Sequence[Callable[[], None]] = ()  # called before each write, to make durable the records that it counts
    saved: int | None = None  # step whose checkpoint is written or being written; at first the step of the start
    writes: bool = True  # False on all processes but the main one: nothing is done there
    # The newest step up to a step that must stay reachable: its checkpoint, or the newest earlier one, is kept.
    passed: Callable[[int], int] = lambda step: step
    _tensors: dict[str, Tensor] = field(default_factory=dict, init=False)  # of step `saved`, until they are written
    _verified: dict[Path, bool] = field(default_factory=dict, init=False)  # see `checkpoint.prune`
    _thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "checkpoint"), init=False)
    _job: Future[None] | None = field(default=None, init=False)  # the last one; jobs run in order

    def save(self, state: TrainState, meta: dict[str, Any]) -> None:
        """Starts to write the state with its JSON, unless it already has this step; waits for the job before."""
        step = int(state.step)
        if not self.writes or self.saved == step:
            return
        self.finish()
        self._tensors = copy_to_host(states.flatten(state))
        self._start(step, lambda: self._write(step, meta))
        self.saved = step

    def add_evaluation(self, state: TrainState, meta: dict[str, Any]) -> None:
        """Adds an evaluation's results to the checkpoint of this step once it is written, without waiting for that.

        A checkpoint that could not be written is tried again.
        """
        step = int(state.step)
        if not self.writes:
            return
        if self.saved != step:
            self.save(state, meta)
            return
        notes = {name: meta[name] for name in checkpoint.NOTES}

        def write() -> None:
            if self._tensors:  # the job before failed
                self._write(step, meta)
            else:
                checkpoint.note(self.folder, checkpoint.name_of(step), **notes)

        self._start(step, write)

    def _write(self, step: int, meta: dict[str, Any]) -> None:
        path = checkpoint.save(self.folder, self._tensors, {"step": step, **meta})
        self._tensors = {}
        self._verified[path] = True

    def finish(self) -> None:
        """Waits for the jobs in progress; a failure is a warning."""
        if reason := self._wait():
            self.saved, self._tensors = None, {}
            self.warn(f"checkpoint not written ({reason}); training goes on with the earlier ones")

    def withdraw(self, passed: int, folder: Path) -> None:
        """Moves the checkpoints of later steps than `passed` to a folder, so that no run goes on from them.

        The oldest stays if it would be the only one left to go on from in a run that has passed an audit.
        """
        if not self.writes:
            return
        self.finish()
        try:
            moved, stays = checkpoint.withdraw(self.folder, passed, folder)
        except OSError as error:
            self.warn(f"{self.folder}: checkpoints after step {passed} could not be moved away ({error})")
            return
        if moved:
            self.warn(f"checkpoints after step {passed} may hold errors and were moved to {folder}: {', '.join(moved)}")
        if stays:
            self.warn(f"{stays} may hold errors too, but none is as old as the last good audit, of step {passed}")

    def finish_last(self, step: int) -> None:
        """Waits for the checkpoint after which no other follows; raises UserError when it was not written."""
        if reason := self._wait():
            raise UserError(
                f"{self.folder}: the checkpoint of step {step} was not written ({reason}); the last good one is "
                f"{self.last_good() or 'none'}: free space, and start the same command again"
            )

    def last_good(self) -> Path | None:
        """The newest whole checkpoint that is in the folder now, from which the next run will go on."""
        return checkpoint.newest_whole(self.folder)

    def _start(self, step: int, write: Callable[[], None]) -> None:
        def job() -> None:
            for action in self.before:
                action()
            write()
            checkpoint.prune(self.folder, self.keep_checkpoints, step, self._verified, self.passed(step))

        self._job = self._thread.submit(job)

    def _wait(self) -> str:
        """Waits for the last job, after which none is left; returns the reason of its failure once, or ""."""
        job, self._job = self._job, None
        if job is None:
            return ""
        with signals.finish_save_first():
            error = job.exception()
        return str(getattr(error, "strerror", None) or error or repr(error)) if error else ""


def copy_to_host(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies on the host that later steps do not touch."""
    return {name: torch.empty(t.shape, dtype=t.dtype).copy_(t) for name, t in tensors.items()}
