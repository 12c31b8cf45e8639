"""From a run to its mode, inside one process of it."""

from __future__ import annotations

from pcpvt.cli import Run
from pcpvt.devices import collectives
from pcpvt.modes import session as sessions
from pcpvt.store import records


def run(request: Run) -> int:
    """Runs the mode in this process; returns the exit code."""
    config = request.config
    workdir = records.open_workdir(request.workdir)
    session = sessions.start(config, workdir)
    try:
        if request.mode == "train":
            from pcpvt.modes import train

            return train.run(session)
        if request.mode == "eval":
            from pcpvt.modes import evaluate

            evaluate.run(session)
        return 0
    finally:
        collectives.leave()
