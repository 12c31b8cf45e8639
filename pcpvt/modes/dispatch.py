"""From a run to its mode, inside one process of it."""

from __future__ import annotations

import importlib

from pcpvt.cli import Run
from pcpvt.devices import collectives
from pcpvt.errors import UserError
from pcpvt.modes import session as sessions
from pcpvt.store import records

# Each module has `run(session) -> int`, the exit code; a mode's imports are paid by that mode alone.
MODULES = {"train": "train", "eval": "evaluate", "bench": "bench"}


def run(request: Run) -> int:
    """Runs the mode in this process; returns the exit code.

    Raises:
        UserError: when this is the process that has to show it; the others only return its exit code.
    """
    try:
        workdir = records.open_workdir(request.workdir)
        session = sessions.start(request.config, workdir)
        code = importlib.import_module(f"pcpvt.modes.{MODULES[request.mode]}").run(session)
    except UserError as error:
        if not collectives.explains(error):
            return error.exit_code
        if world := collectives.from_environment():
            error.args = (f"rank {world.rank}: {error}",)
        raise
    collectives.leave()
    return code
