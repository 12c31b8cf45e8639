"""The commands that a finished training proposes, ready to copy."""

import importlib.util
from pathlib import Path

from pcpvt.config.cli import PROGRAM, quoted
from pcpvt.runtime.session import Session

SPLITS = ("test", "val", "valid", "validation")  # folders of images, the first that there is


def next_commands(session: Session) -> list[str]:
    """Commands to predict with the run's best checkpoint, to export it, and to see its curves in TensorBoard."""
    config, workdir = session.config, f"--workdir={session.workdir}"
    root = Path(config.data.path).expanduser()
    images = next((root / split for split in SPLITS if config.data.path and (root / split).is_dir()), "PHOTOS")
    commands = [
        [*PROGRAM, "--mode=predict", workdir, f"--config.predict.images={images}"],
        [*PROGRAM, "--mode=export", workdir, "--config.export.format=timm"],
    ]
    if config.tensorboard and importlib.util.find_spec("tensorboard"):
        commands.append(["tensorboard", f"--logdir={session.workdir / 'tensorboard'}"])
    return [" ".join(map(quoted, words)) for words in commands]
