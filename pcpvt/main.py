"""The program: reads the command line, runs a mode in this process or in several, and reports errors in one line."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import logging
import os
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pcpvt.errors import SYSTEMS, UserError, log, log_to, printable, put, show

try:
    import fcntl  # noqa: F401 - not on Windows
except ImportError:
    show(SYSTEMS)
    sys.exit(2)

from pcpvt.distributed import hosts, signals

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
    from pcpvt.checkpoints.checkpoint import newest_whole
    from pcpvt.distributed import collectives, launch
    from pcpvt.runtime import records

    config, notes = read_config(command)
    trains = command.mode == "train"
    if (config.processes > 1 or (trains and config.restarts)) and collectives.from_environment() is None:
        newest = functools.partial(newest_whole, command.workdir / "checkpoints")
        debug = command.workdir / records.DEBUG
        return launch.launch(config, command.words(), newest if trains else None, debug)
    return run(config, command.workdir, command.mode, notes, command)


def read_config(command: Command) -> tuple[ConfigDict, list[str]]:
    """The config of a run, and notes for the log.

    Later modes take the config that the workdir was trained with. Training, a bench and a schedule take it where
    --workdir names a folder that holds one, training only if no --config is given.
    """
    from pcpvt.checkpoints.load import describe, described, member_names, origin, trained_config
    from pcpvt.config.resolve import resolve
    from pcpvt.distributed import collectives
    from pcpvt.runners import exported

    mode, workdir, get_config, arg, overrides = command[:5]
    if mode == "report" and not workdir.is_dir():
        raise UserError(f"--workdir: {workdir}: no such folder: train first, or name the run with --workdir=DIR")
    trained, where, said = None, "", {}
    may_go_on = mode in ("bench", "schedule") or (mode == "train" and not command.config)
    if mode in ("eval", "predict", "export"):
        members = member_names(overrides.get("eval.ensemble", ""))
        trained, where = trained_config(overrides.get("checkpoint", ""), members, workdir)
        if trained is not None:
            said = described(trained).fields()
        elif mode != "export" and exported.is_graph(where):
            said = exported.describe(where).fields()
        else:
            said = describe(where, overrides.get("weights", "auto")).fields()
    elif may_go_on and command.names_workdir and (workdir / "config.json").is_file():
        trained, where = trained_config("", [], workdir)
    elif mode == "train" and overrides.get("finetune"):
        where = origin(overrides["finetune"], workdir)
        said = describe(where, overrides.get("weights", "auto")).fields()
    if trained is not None and not command.config:
        get_config = functools.partial(_for_stored_device, get_config)
    world = collectives.from_environment()
    world_size = world.size if world else hosts.from_environment(os.environ).processes_in_all()
    return resolve(
        get_config, arg, overrides, mode=mode, world_size=world_size, trained=trained, where=where, said=said
    )


def _for_stored_device(get_config: Callable[[str], ConfigDict], arg: str) -> ConfigDict:
    """The config for ARG without a device; a stored one replaces it, so this host's devices are not looked for."""
    return get_config(arg if arg[:1].isalpha() else f"cpu{arg}")


def run(config: ConfigDict, workdir: Path, mode: str, notes: Sequence[str] = (), command: Command | None = None) -> int:
    """Runs a mode in this process, one of `config.processes`; returns the exit code."""
    from pcpvt.checkpoints.atomic import remove_leftovers
    from pcpvt.distributed import collectives, peers, stacks
    from pcpvt.runtime import lock, records, session
    from pcpvt.runtime.console import Console

    world = collectives.from_environment()
    is_main = world is None or world.is_main
    # Nothing but predictions goes to standard output.
    console = Console(is_main, sys.stderr if mode == "predict" else sys.stdout)
    with contextlib.ExitStack() as stack:
        stack.callback(stacks.uninstall)
        stack.callback(collectives.leave)
        try:
            records.open_workdir(workdir)
            stacks.install(workdir / records.DEBUG, world.rank if world else None)
            if world:
                log_to(workdir / "logs" / f"rank-{world.rank}.log")
            if mode == "train" and is_main:
                left_behind = stack.enter_context(lock.held(workdir))
                notes = [*notes, left_behind] if left_behind else notes
                remove_leftovers(workdir)
            for note in notes:
                console.say(f"note: {note}")
            if is_main and command and not (workdir / records.COMMAND).exists():
                records.write_command(workdir, command.line())
            return importlib.import_module(f"pcpvt.{MODES[mode]}").run(session.start(config, workdir, command))
        except (UserError, OSError, RuntimeError) as failure:
            error = peers.peer_error(failure) if isinstance(failure, RuntimeError) else _user_error(failure)
            if error is None:
                raise
            if collectives.explains(error):  # otherwise another process has reported it
                signals.ignore_from_now()
                show(f"rank {world.rank}: {error}" if world else str(error))
            return error.exit_code


def entry() -> None:
    """Runs the program. A user error is one line on standard error; exit codes are in `distributed.signals`."""
    try:
        _enter()
    except SystemExit as ended:
        if isinstance(ended.code, int):
            sys.exit(hosts.exit_code(os.environ, ended.code))
        raise
    except BaseException:
        if hosts.exit_code(os.environ, 1) != 1:  # the interpreter would end with 1
            traceback.print_exc()
            sys.exit(hosts.exit_code(os.environ, 1))
        raise


def _enter() -> None:
    try:
        signals.install()  # before anything slow is imported: a signal must find its handler
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a PeerError says in one line what c10d warns of in 30
        if os.environ.get("TORCHELASTIC_RUN_ID"):
            signals.follow_launcher()
            _bind_to_cores()
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # a path may hold bytes that are no text
        threading.excepthook = _report_thread_failure
        from absl import app

        from pcpvt.config import cli
        from pcpvt.devices import installed

        installed.check()
        app.run(main, flags_parser=functools.partial(cli.parse, modes=MODES))
    except (Exception, signals.Stopped) as error:
        # A module that was being imported may have replaced Stopped by an error of its own.
        if isinstance(error, signals.Stopped) or signals.stopped_before_saving():
            signals.ignore_from_now()
            if not hosts.is_rank(os.environ) or os.environ.get("RANK") == "0":
                put(signals.nothing_saved(), sys.stderr)
            sys.exit(signals.code_of_stop())
        if isinstance(error, UserError | OSError):
            error = _user_error(error)
            _fail(str(error), error.exit_code, not hosts.is_rank(os.environ) or _is_first(error))
        if isinstance(error, RuntimeError) and "backend extension" in str(error):
            # `import torch` fails like this where the NPU backend is installed and its libraries are missing.
            logging.disable()  # torch is half imported, and its exit hooks would log errors
            what = f"{str(error).splitlines()[0]} ({error.__cause__})"
            _fail(f"{what}: source CANN's set_env.sh first, or set TORCH_DEVICE_BACKEND_AUTOLOAD=0 to do without", 2)
        log(traceback.format_exc())
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


def _bind_to_cores() -> None:
    """Binds this rank to its share of the cores, before a library starts threads; `launch/cpu.sh` sets the shares."""
    if shares := os.environ.get("PCPVT_CORES", "").split():
        os.sched_setaffinity(0, map(int, shares[int(os.environ["LOCAL_RANK"])].split(",")))


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
