"""Trains, fine-tunes, evaluates and exports Twins-PCPVT image classifiers on Ascend NPUs, CUDA GPUs and CPUs.

    python -m pcpvt.main --config=configs/pcpvt_s.py:cpu                        train on the embedded digits
    python -m pcpvt.main --config=configs/pcpvt_s.py:npu8 --config.data.path=DIR    train on an image folder
    python -m pcpvt.main --mode=eval                                            evaluate the best checkpoint

Fields of --config and their defaults (a recipe in the config's ARG may set others):
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import logging
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pcpvt.distributed import signals
from pcpvt.errors import UserError, printable, put, show

if TYPE_CHECKING:
    from ml_collections import ConfigDict

    from pcpvt.config.cli import Command

# Each module has `run(session) -> int`, the exit code; only the mode that runs imports its module.
MODES = {
    "train": "train.run", "eval": "evaluate.run", "predict": "predict.run", "export": "export.run",
    "bench": "bench.run", "report": "report.run", "schedule": "report.schedule",
}  # fmt: skip


def main(command: Command) -> int:
    """Runs a parsed command line, in this process or in several that it starts; returns the exit code."""
    from pcpvt.distributed import collectives, launch

    config, notes = read_config(command)
    if config.processes > 1 and collectives.from_environment() is None:
        return launch.launch(config, sys.argv[1:])
    return run(config, command.workdir, command.mode, notes)


def read_config(command: Command) -> tuple[ConfigDict, list[str]]:
    """The config of a run, and notes for the log; later modes take the config that the workdir was trained with."""
    from pcpvt.checkpoints.load import describe, described, member_names, origin, trained_config
    from pcpvt.config.resolve import resolve
    from pcpvt.distributed import collectives

    mode, workdir, get_config, arg, overrides = command
    if mode == "report" and not workdir.is_dir():
        raise UserError(f"--workdir: {workdir}: no such folder: train first, or name the run with --workdir=DIR")
    trained, where, said = None, "", {}
    if mode in ("eval", "predict", "export"):
        members = member_names(overrides.get("eval.ensemble", ""))
        trained, where = trained_config(overrides.get("checkpoint", ""), members, workdir)
        said = (describe(where, overrides.get("weights", "auto")) if trained is None else described(trained)).fields()
    elif mode == "train" and overrides.get("finetune"):
        where = origin(overrides["finetune"], workdir)
        said = describe(where, overrides.get("weights", "auto")).fields()
    world = collectives.from_environment()
    world_size = world.size if world else None
    return resolve(
        get_config, arg, overrides, mode=mode, world_size=world_size, trained=trained, where=where, said=said
    )


def run(config: ConfigDict, workdir: Path, mode: str, notes: Sequence[str] = ()) -> int:
    """Runs a mode in this process, one of `config.processes`; returns the exit code."""
    from pcpvt.checkpoints.atomic import remove_leftovers
    from pcpvt.distributed import collectives
    from pcpvt.runtime import lock, records, session
    from pcpvt.runtime.console import Console

    world = collectives.from_environment()
    is_main = world is None or world.is_main
    # Nothing but predictions goes to standard output.
    console = Console(is_main, sys.stderr if mode == "predict" else sys.stdout)
    with contextlib.ExitStack() as stack:
        stack.callback(collectives.leave)
        try:
            records.open_workdir(workdir)
            if mode == "train" and is_main:
                left_behind = stack.enter_context(lock.held(workdir))
                notes = [*notes, left_behind] if left_behind else notes
                remove_leftovers(workdir)
            for note in notes:
                console.say(f"note: {note}")
            return importlib.import_module(f"pcpvt.{MODES[mode]}").run(session.start(config, workdir))
        except (UserError, OSError, RuntimeError) as failure:
            error = collectives.peer_error(failure) if isinstance(failure, RuntimeError) else _user_error(failure)
            if error is None:
                raise
            if collectives.explains(error):  # otherwise another process has reported it
                signals.ignore_from_now()
                show(f"rank {world.rank}: {error}" if world else str(error))
            return error.exit_code


def entry() -> None:
    """Runs the program. A user error is one line on standard error; exit codes are in `distributed.signals`."""
    try:
        signals.install()  # before anything slow is imported: a signal must find its handler
        if os.environ.get("TORCHELASTIC_RUN_ID"):
            signals.follow_launcher()
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # a path may hold bytes that are no text
        threading.excepthook = _report_thread_failure
        from absl import app

        from pcpvt.config import cli, fields

        sys.modules["__main__"].__doc__ = f"{__doc__}\n{fields.describe()}"
        app.run(main, flags_parser=functools.partial(cli.parse, modes=MODES))
    except SystemExit as ended:
        help_flags = {"--help", "-h", "--helpshort", "--helpfull"} & set(sys.argv)
        sys.exit(0 if help_flags and ended.code == 1 else ended.code)  # absl exits with 1 after --help
    except (Exception, signals.Stopped) as error:
        # A module that was being imported may have replaced Stopped by an error of its own.
        if isinstance(error, signals.Stopped) or signals.stopped_before_saving():
            signals.ignore_from_now()
            if os.environ.get("RANK", "0") == "0":
                put(signals.NOTHING_NEW, sys.stderr)
            sys.exit(signals.PREEMPTED)
        if isinstance(error, UserError | OSError):
            error = _user_error(error)
            _fail(str(error), error.exit_code, "RANK" not in os.environ or _is_first(error))
        if isinstance(error, RuntimeError) and "backend extension" in str(error):
            # `import torch` fails like this where the NPU backend is installed and its libraries are missing.
            logging.disable()  # torch is half imported, and its exit hooks would log errors
            what = f"{str(error).splitlines()[0]} ({error.__cause__})"
            _fail(f"{what}: source CANN's set_env.sh first, or set TORCH_DEVICE_BACKEND_AUTOLOAD=0 to do without", 2)
        raise


def _user_error(error: UserError | OSError) -> UserError:
    """The error for the user; one of the system names its file where there is one."""
    if isinstance(error, UserError):
        return error
    where = error.filename if error.filename is not None else type(error).__name__
    return UserError(f"{where}: {error.strerror or error}: check the disk, the permissions and the limits")


def _is_first(error: UserError) -> bool:
    """Whether no other process of the run reports the error, which may be one of the command line that all have."""
    from pcpvt.distributed import collectives

    return collectives.explains(error)


def _report_thread_failure(failure: threading.ExceptHookArgs) -> None:
    """Reports in one line that a library's thread ended with an OSError; the program continues without it."""
    if not isinstance(failure.exc_value, OSError):
        threading.__excepthook__(failure)
        return
    name = failure.thread.name if failure.thread else "a thread"
    put(f"pcpvt: warning: {printable(f'{name} ended: {failure.exc_value}')}\n", sys.stderr)


def _fail(message: str, code: int, reports: bool = True) -> None:
    signals.ignore_from_now()
    if reports:
        show(message)
    sys.exit(code)


if __name__ == "__main__":
    entry()
