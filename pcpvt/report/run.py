"""`--mode=report`, and the end of a training: the files of a workdir to its `report.html`, readable offline."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from pcpvt.checkpoints.atomic import write_atomically
from pcpvt.report import data as report_data
from pcpvt.report import page
from pcpvt.runtime.console import Console
from pcpvt.runtime.session import Session

FILE = "report.html"


def write(workdir: Path, others: Sequence[Path] = ()) -> Path:
    """Writes the report of a workdir, with other workdirs' runs beside its own.

    Raises:
        UserError: for a folder that holds no run.
        OSError: when the file cannot be written.
    """
    folders = list(dict.fromkeys(folder.resolve() for folder in (workdir, *others)))
    asked = ["--workdir", *["config.report.compare"] * (len(folders) - 1)]
    text = page.render_report(list(map(report_data.load, folders, names(folders), asked)))
    path = workdir / FILE
    # A file name of the user's may hold bytes that are no text.
    write_atomically(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8", errors="replace"))
    return path


def names(folders: Sequence[Path]) -> list[str]:
    """As much of the ends of different paths as tells them apart."""
    parts = 1
    while len(set(found := [str(Path(*folder.parts[-parts:])) for folder in folders])) < len(folders):
        parts += 1
    return found


def at_end(session: Session, console: Console) -> None:
    """The report of a training that has just ended, by the main process; a failure is a warning, never an error."""
    if not session.world.is_main:
        return
    try:
        console.say(f"report: {write(session.workdir)}")
    except Exception as error:  # whatever it is, the training has succeeded
        console.warn(f"{session.workdir / FILE} is not written ({type(error).__name__}: {error})")


def run(session: Session) -> int:
    """Writes the report from what the workdirs hold; no device, data or checkpoint is touched."""
    if not session.world.is_main:
        return 0
    named = [word.strip() for word in session.config.report.compare.split(",")]
    others = [Path(os.path.expanduser(name)) for name in named if name]
    path = write(session.workdir, others)
    Console().say(f"written: {path} ({path.stat().st_size / 1024:.0f} kB)")
    return 0
