"""From a run to its mode, inside one process of it."""

from __future__ import annotations

import contextlib
import importlib

from pcpvt.config.request import Run
from pcpvt.devices import collectives
from pcpvt.errors import UserError, show
from pcpvt.modes import exits
from pcpvt.modes import session as sessions
from pcpvt.modes.console import Console
from pcpvt.store import lock, records
from pcpvt.store.durable import remove_leftovers

# Each module has `run(session) -> int`, the exit code; a mode's imports are paid by that mode alone.
MODULES = {
    "train": "train", "eval": "evaluate", "predict": "predict", "export": "export", "bench": "bench",
    "report": "report", "schedule": "schedule",
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
            return importlib.import_module(f"pcpvt.modes.{MODULES[request.mode]}").run(session)
        except UserError as error:
            if collectives.explains(error):  # else another process has said it
                exits.ignore()
                show(f"rank {world.rank}: {error}" if world else str(error))
            return error.exit_code
