"""From a run to its mode, inside one process of it."""

from __future__ import annotations

import contextlib
import importlib

from pcpvt.checkpoints.atomic import remove_leftovers
from pcpvt.config.request import Run
from pcpvt.distributed import collectives, signals
from pcpvt.errors import UserError, show
from pcpvt.runtime import lock, records
from pcpvt.runtime import session as sessions
from pcpvt.runtime.console import Console

# Each module has `run(session) -> int`, the exit code; a mode's imports are paid by that mode alone.
MODULES = {
    "train": "train.run", "eval": "evaluate.run", "predict": "predict.run", "export": "export.run",
    "bench": "bench.run", "report": "report.run", "schedule": "report.schedule",
}  # fmt: skip


def run(request: Run) -> int:
    """Runs the mode in this process; returns the exit code."""
    workdir = records.open_workdir(request.workdir)
    world = collectives.from_environment()
    with contextlib.ExitStack() as stack:
        if request.mode == "train" and (world is None or world.is_main):
            left_behind = stack.enter_context(lock.held(workdir))
            if left_behind:
                Console().say(f"note: {left_behind}")
            remove_leftovers(workdir)
        stack.callback(collectives.leave)
        try:
            session = sessions.start(request.config, workdir)
            return importlib.import_module(f"pcpvt.{MODULES[request.mode]}").run(session)
        except UserError as error:
            if collectives.explains(error):  # else another process has said it
                signals.ignore_from_now()
                show(f"rank {world.rank}: {error}" if world else str(error))
            return error.exit_code
