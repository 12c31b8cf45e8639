"""Checkpoints written in the background, one at a time, while steps go on."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from torch import Tensor

from pcpvt.store import checkpoint


class Saver:
    """`submit` hands over host tensors; `wait` returns when they are on disk and gives the error, if any."""

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep
        self._thread: threading.Thread | None = None
        self._error: OSError | None = None

    def submit(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> OSError | None:
        """Starts writing, after the previous checkpoint is done; returns that one's error, if any."""
        error = self.wait()
        self._thread = threading.Thread(target=self._write, args=(tensors, meta), name="checkpoint")
        self._thread.start()
        return error

    def wait(self) -> OSError | None:
        """Waits for the checkpoint in progress; returns its error once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        return error

    def _write(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        try:
            checkpoint.save(self.folder, tensors, meta)
            checkpoint.prune(self.folder, self.keep)
        except OSError as error:  # reported by the next call: a full disk must not end a run that computes well
            self._error = error
