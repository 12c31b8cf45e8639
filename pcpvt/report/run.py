"""`--mode=report`, and the end of a training: `report.html` from the files of a workdir, readable offline."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from pcpvt.checkpoints.atomic import write_atomically
from pcpvt.report import data, page
from pcpvt.runtime.console import Console
from pcpvt.runtime.session import Session

FILE = "report.html"


def run(session: Session) -> int:
    """Writes the report from the files of the workdirs; uses no device, data or checkpoint."""
    if session.world.is_main:
        names = [name.strip() for name in session.config.report.compare.split(",")]
        path = write(session.workdir, [Path(os.path.expanduser(name)) for name in names if name])
        Console().say(f"written: {path} ({path.stat().st_size / 1024:.0f} kB)")
    return 0


def at_end(session: Session, console: Console) -> None:
    """Writes the report of a training that has just ended, in the main process; a failure is only a warning."""
    if not session.world.is_main:
        return
    try:
        console.say(f"report: {write(session.workdir)}")
    except Exception as error:  # of any kind: the training has succeeded
        console.warn(f"{session.workdir / FILE} is not written ({type(error).__name__}: {error})")


def write(workdir: Path, compared: Sequence[Path] = ()) -> Path:
    """Writes the report of a workdir, with the runs of other workdirs beside its own.

    Raises:
        UserError: for a folder that holds no run.
        OSError: when the file cannot be written.
    """
    folders = list(dict.fromkeys(folder.resolve() for folder in (workdir, *compared)))
    fields = ["--workdir", *["config.report.compare"] * (len(folders) - 1)]
    text = page.render_report(list(map(data.load, folders, distinct_names(folders), fields)))
    path = workdir / FILE
    # A file name may hold bytes that are not valid text.
    write_atomically(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8", errors="replace"))
    return path


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of different paths, equally long, that tell them apart."""
    parts = 1
    while len(set(names := [str(Path(*folder.parts[-parts:])) for folder in folders])) < len(folders):
        parts += 1
    return names
