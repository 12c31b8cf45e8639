"""The output files of a run: `command.txt`, `config.json`, `metrics.jsonl`, `result.json`, and their workdir."""

import contextlib
import errno
import json
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from pcpvt.checkpoints.atomic import write_atomically
from pcpvt.errors import UserError

COMMAND = "command.txt"  # the command line that made the workdir, with its date and folder
DETAILS, EVAL_DETAILS = "details.json", "details-eval.json"  # of a training's best evaluation, and of --mode=eval
RANKS = "ranks.json"  # seconds of each process in the last part of a training with several (see `train.stragglers`)
DEBUG = "debug"  # folder: where ranks were when they hung or crashed, and their last collectives
NONFINITE = "nonfinite.json"  # the non-finite steps in a row after which a run has ended


def open_workdir(path: Path) -> None:
    """Creates the workdir; raises UserError when files cannot be written there."""
    try:
        (path / "checkpoints").mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise UserError(
            f"--workdir: {path} cannot be written ({error.strerror}): choose another with --workdir=DIR"
        ) from None


def write_command(workdir: Path, line: str) -> None:
    """Writes the command line that makes a workdir, below a comment with its date and its folder."""
    when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    text = f"# {when}, in {os.getcwd()}\n{line}\n"
    # A path may hold bytes that are no text.
    write_atomically(workdir / COMMAND, lambda temporary: temporary.write_bytes(os.fsencode(text)))


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes one JSON object atomically."""
    text = json.dumps(_finite(value), indent=2) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text))


def _finite(value: Any) -> Any:
    """A JSON value with None for numbers that are not finite, which JSON cannot express."""
    return json.loads(json.dumps(value), parse_constant=lambda name: None)


class MetricsFile:
    """`metrics.jsonl`: one JSON object per record, appended as a whole line or not at all.

    A full disk loses no record: lines wait in memory and are written with the next one that succeeds.

    Args:
        keep_records: of those in the file, how many to keep: later ones belong to steps that will be repeated.
    """

    def __init__(self, path: Path, keep_records: int):
        lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
        kept = lines[:-1][:keep_records]  # what follows the last line break is an incomplete line
        if lines != [*kept, b""] or path.is_symlink():
            write_atomically(path, lambda temporary: temporary.write_bytes(b"".join(line + b"\n" for line in kept)))
        self.count = len(kept)
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._waiting = b""
        self._lock = threading.Lock()  # `sync` is called by the thread that writes checkpoints

    def write(self, record: dict[str, Any]) -> OSError | None:
        """Appends a record, non-finite numbers as null; returns the error because of which it waits, if any."""
        with self._lock:
            self._waiting += json.dumps(_finite(record)).encode() + b"\n"
            self.count += 1
            return self._flush()

    def sync(self) -> None:
        """Makes all records durable; raises OSError when one could not be written."""
        with self._lock:
            if error := self._flush():
                raise error
            os.fsync(self._file)

    def close(self) -> None:
        with self._lock:
            self._flush()
            os.close(self._file)

    def _flush(self) -> OSError | None:
        size = os.fstat(self._file).st_size
        try:
            if os.write(self._file, self._waiting) < len(self._waiting):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            os.ftruncate(self._file, size)
            return error
        self._waiting = b""
        return None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All records of a run, in order; lines that are incomplete or damaged are left out."""
    records = []
    if path.exists():
        for line in path.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError, RecursionError):
                records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict) and "step" in record]
