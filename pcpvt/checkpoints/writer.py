"""Writes checkpoints in a background thread, one job at a time, while training continues."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from pcpvt.checkpoints import checkpoint, manifest


class Saver:
    """`save` and `note` start a job; `wait` returns when it is done, with its error, if any.

    A job starts after the one before it has ended, so that at most two copies of the state exist.

    Args:
        folder: of the checkpoints.
        keep_checkpoints: newest checkpoints to keep beside the best one.
        before: called before each checkpoint or note is written; it makes durable what those refer to.
    """

    def __init__(self, folder: Path, keep_checkpoints: int, before: Callable[[], None] = lambda: None):
        self.folder, self.keep_checkpoints, self.before = folder, keep_checkpoints, before
        self.last_good: Path | None = None
        self._whole: dict[Path, bool] = {}  # results of verification: each file is verified once
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._job: Future[Exception | None] | None = None

    def save(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> Exception | None:
        """Starts writing host tensors, which must not change any more; returns the error of the job before, if any."""

        def write() -> None:
            self.last_good = checkpoint.save(self.folder, tensors, meta)
            self._whole[self.last_good] = True

        return self._start(meta["step"], write)

    def note(self, step: int, **notes: Any) -> Exception | None:
        """Adds later results to a step's checkpoint; returns the error of the job before, if any."""
        return self._start(step, lambda: manifest.put(self.folder, checkpoint.name_of(step), **notes))

    def wait(self) -> Exception | None:
        """Waits for the job in progress; returns its error once."""
        error = self._job.result() if self._job else None
        self._job = None
        return error

    def _start(self, step: int, write: Callable[[], None]) -> Exception | None:
        error = self.wait()
        self._job = self._thread.submit(self._run, step, write)
        return error

    def _run(self, step: int, write: Callable[[], None]) -> Exception | None:
        try:
            self.before()
            write()
            checkpoint.prune(self.folder, self.keep_checkpoints, step, self._is_whole)
        except Exception as error:  # returned by the next call: a full disk must not end a run that computes well
            return error
        return None

    def _is_whole(self, path: Path) -> bool:
        if path not in self._whole:
            self._whole[path] = checkpoint.is_whole(path)
        return self._whole[path]
