"""Checkpoints written in the background, one job at a time, while steps go on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from pcpvt.checkpoints import checkpoint, manifest


class Saver:
    """`save` and `note` hand over a job; `wait` returns when it is done and gives its error, if any.

    A job waits for the one before it, so that no more than two copies of the state exist.

    Args:
        folder: of the checkpoints.
        keep: newest checkpoints to keep beside the best one.
        before: called before each checkpoint or note is written; what that refers to is made durable there.
    """

    def __init__(self, folder: Path, keep: int, before: Callable[[], None] = lambda: None):
        self.folder, self.keep, self.before = folder, keep, before
        self.last_good: Path | None = None
        self._whole: dict[Path, bool] = {}  # what is known about the files: each is verified once
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def save(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> Exception | None:
        """Starts writing host tensors that nobody changes any more; returns the error of the job before, if any."""
        return self._start(self._save, tensors, meta)

    def note(self, step: int, **notes: Any) -> Exception | None:
        """Enters what became known about a step's checkpoint; returns the error of the job before, if any."""
        return self._start(self._note, step, notes)

    def wait(self) -> Exception | None:
        """Waits for the job in progress; returns its error once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        return error

    def _start(self, job: Callable[..., None], *args: Any) -> Exception | None:
        error = self.wait()
        self._thread = threading.Thread(target=self._run, args=(job, *args), name="checkpoint")
        self._thread.start()
        return error

    def _run(self, job: Callable[..., None], *args: Any) -> None:
        try:
            job(*args)
        except Exception as error:  # reported by the next call: a full disk must not end a run that computes well
            self._error = error

    def _save(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        self.before()
        self.last_good = checkpoint.save(self.folder, tensors, meta)
        self._whole[self.last_good] = True
        checkpoint.prune(self.folder, self.keep, meta["step"], self._is_whole)

    def _note(self, step: int, notes: dict[str, Any]) -> None:
        self.before()
        manifest.put(self.folder, checkpoint.name_of(step), **notes)
        checkpoint.prune(self.folder, self.keep, step, self._is_whole)

    def _is_whole(self, path: Path) -> bool:
        if path not in self._whole:
            self._whole[path] = checkpoint.is_whole(path)
        return self._whole[path]
