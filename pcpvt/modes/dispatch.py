"""From a run to its mode, inside one process of it."""

from __future__ import annotations

import importlib

from pcpvt.cli import Run
from pcpvt.devices import collectives
from pcpvt.modes import session as sessions
from pcpvt.store import records

# Each module has `run(session) -> int`, the exit code; a mode's imports are paid by that mode alone.
MODULES = {"train": "train", "eval": "evaluate"}


def run(request: Run) -> int:
    """Runs the mode in this process; returns the exit code."""
    workdir = records.open_workdir(request.workdir)
    session = sessions.start(request.config, workdir)
    try:
        return importlib.import_module(f"pcpvt.modes.{MODULES[request.mode]}").run(session)
    finally:
        collectives.leave()
