"""Saves checkpoints and is killed at the n-th call that changes the disk, for every n, in one forked process per n.

`python crash.py FOLDER`: in FOLDER/n for n = 1, 2, ... a run that has saved step 10 saves step 20 and notes its
evaluation. Prints one line per n, the call at which it was killed, until a run completes.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import traceback
from pathlib import Path

import safetensors.torch
import torch

from pcpvt.checkpoints.writer import Saver
from pcpvt.functional.state import TrainState

METRICS = {"acc1": 10.0, "acc5": 50.0, "loss": 1.0, "seen": 4}


META = {"config": {}, "classes": ["a"], "metrics": None, "best": None, "records": 1, "stale": 0}


def save(folder: Path, step: int) -> None:
    def fail(message: str) -> None:
        raise OSError(message)

    state = TrainState(torch.tensor(step), {"w": torch.full((5000,), float(step))}, {}, {}, {}, torch.tensor(0))
    saver = Saver(folder, keep_checkpoints=1, warn=fail)
    saver.save(state, META)
    saver.add_evaluation(state, {**META, "metrics": {**METRICS, "acc1": float(step)}, "best": METRICS, "records": 2})
    saver.finish()


def kill_at(n: int) -> None:
    """Kills the process at the n-th of the calls that change the disk: before each, or halfway through the tensors."""
    count = itertools.count(1)

    def before(name, function):
        def call(*args, **kwargs):
            if next(count) == n:
                os.write(1, f"{n} {name}\n".encode())
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    def torn(tensors, path, metadata):
        save_file(tensors, path, metadata)
        whole = os.path.getsize(path)
        os.truncate(path, whole // 2)
        half(path)
        os.unlink(path)
        save_file(tensors, path, metadata)

    save_file = safetensors.torch.save_file
    half = before("write tensors, half", lambda path: None)
    safetensors.torch.save_file = before("write tensors", torn)
    for name in ("fsync", "replace", "unlink", "chmod"):
        setattr(os, name, before(name, getattr(os, name)))
    Path.write_text = before("write text", Path.write_text)


def main(root: Path) -> None:
    for n in itertools.count(1):
        pid = os.fork()
        if pid == 0:
            try:
                save(root / str(n), 10)
                kill_at(n)
                save(root / str(n), 20)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        status = os.waitpid(pid, 0)[1]
        if status != signal.SIGKILL:
            sys.exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
