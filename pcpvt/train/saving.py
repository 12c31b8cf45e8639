"""Saving a training run: the state and the history as checkpoints, written in the background by the main process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from pcpvt.checkpoints.writer import Saver
from pcpvt.errors import UserError
from pcpvt.functional import state as states
from pcpvt.functional.state import TrainState
from pcpvt.train.history import History
from pcpvt.train.setup import TrainSetup, copy_to_host, elapsed
from pcpvt.train.writers import Writer


class RunSaver:
    """Writes the checkpoints of one run; on all processes but the main one it does nothing.

    Args:
        writers: synced before each checkpoint is written, because it counts their records.
        warn: called with one line when a checkpoint could not be written and training goes on.
    """

    def __init__(self, setup: TrainSetup, step: int, writers: Sequence[Writer], warn: Callable[[str], None]):
        def sync() -> None:
            for writer in writers:
                writer.sync()

        self._setup, self._warn = setup, warn
        self._writes = setup.session.world.is_main
        self._saver = Saver(setup.session.checkpoints, setup.session.config.keep, before=sync)
        self._saver.last_good = setup.resumed_from
        self._saved: int | None = step  # the step whose checkpoint is written or being written, or needs none

    @property
    def last_good(self) -> Path | None:
        """The newest whole checkpoint."""
        return self._saver.last_good

    def save(self, state: TrainState, history: History) -> None:
        """Hand the state to the background writer, unless it already has this step."""
        step = int(state.step)
        if not self._writes or self._saved == step:
            return
        meta = {"step": step, **self._setup.meta, **history.to_meta(elapsed(self._setup, history))}
        self._report(self._saver.save(copy_to_host(states.flatten(state)), meta))
        self._saved = step

    def add_evaluation(self, state: TrainState, history: History) -> None:
        """Record the evaluation of a checkpoint that may still be being written."""
        if not self._writes:
            return
        step = int(state.step)
        self._report(self._saver.wait())
        if self._saved == step:
            self._saver.note(step, metrics=history.metrics, best=history.best, records=history.records)
        else:  # it could not be written before the evaluation: try again
            self.save(state, history)

    def finish(self) -> None:
        """Wait for the background writer; a failure is a warning."""
        self._report(self._saver.wait())

    def finish_last(self, step: int) -> None:
        """Wait for the checkpoint after which no other follows.

        Raises:
            UserError: when it was not written.
        """
        if error := self._saver.wait():
            raise UserError(
                f"{self._setup.session.checkpoints}: the checkpoint of step {step} was not written "
                f"({_reason(error)}); the last good one is {self.last_good or 'none'}: free space, and start the same "
                "command again"
            )

    def _report(self, error: Exception | None) -> None:
        if error is not None:
            self._saved = None
            self._warn(f"checkpoint not written ({_reason(error)}); training goes on with the earlier ones")


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
