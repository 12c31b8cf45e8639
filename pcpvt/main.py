"""Trains, fine-tunes, evaluates and exports Twins-PCPVT image classifiers on Ascend NPUs, CUDA GPUs and CPUs.

    python -m pcpvt.main --config=configs/pcpvt_s.py:cpu                        train on the embedded digits
    python -m pcpvt.main --config=configs/pcpvt_s.py:npu8 --config.data.path=DIR    train on an image folder
    python -m pcpvt.main --mode=eval                                            evaluate the best checkpoint

Fields of --config and their defaults (a recipe in the config's ARG may set others):
"""

from __future__ import annotations

import io
import logging
import os
import sys
import threading

from pcpvt.distributed import signals
from pcpvt.errors import UserError, printable, put, show


def main(argv: list[str]) -> int:
    from absl import flags

    from pcpvt.config import cli

    if len(argv) > 1:
        raise UserError(f"{argv[1]!r}: not understood: fields are given as --config.NAME=VALUE")
    run = cli.read_run(flags.FLAGS)
    if run.config.processes > 1 and not cli.inside_torchrun():
        from pcpvt.distributed import launch

        return launch.launch(run.config, sys.argv[1:])
    from pcpvt import dispatch

    return dispatch.run(run)


def entry() -> None:
    """Runs the program. A user error is one line on standard error; exit codes are in `distributed.signals`."""
    try:
        signals.install()  # before anything slow is imported: a signal must find its handler
        if os.environ.get("TORCHELASTIC_RUN_ID"):
            signals.follow_parent()
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # a path may hold bytes that are no text
        threading.excepthook = _say_thread_failed
        from absl import app

        from pcpvt.config import cli

        cli.define_flags()
        sys.modules["__main__"].__doc__ = f"{__doc__}\n{cli.field_help()}"
        app.run(main, flags_parser=cli.parse)
    except SystemExit as ended:
        asked = {"--help", "-h", "--helpshort", "--helpfull"} & set(sys.argv)
        sys.exit(0 if asked and ended.code == 1 else ended.code)  # absl calls it a failure to have asked
    except UserError as error:  # of the command line: all processes of a host see it
        _fail(str(error), error.exit_code, os.environ.get("LOCAL_RANK", "0") == "0")
    except RuntimeError as error:
        if "backend extension" not in str(error):
            raise
        logging.disable()  # half of torch is there, and its exit hooks report
        # What `import torch` says when the NPU backend is installed and its libraries are not there.
        what = f"{str(error).splitlines()[0]} ({error.__cause__})"
        _fail(f"{what}: source CANN's set_env.sh first, or set TORCH_DEVICE_BACKEND_AUTOLOAD=0 to do without", 2)
    except signals.Stopped:
        signals.ignore_from_now()
        if os.environ.get("RANK", "0") == "0":
            put("pcpvt: stopped by a signal with nothing new to save; the same command starts again\n", sys.stderr)
        sys.exit(signals.PREEMPTED)
    except OSError as error:
        where = error.filename if error.filename is not None else type(error).__name__
        _fail(f"{where}: {error.strerror or error}: check the disk, the permissions and the limits", 2)


def _say_thread_failed(failure: threading.ExceptHookArgs) -> None:
    """One line for a thread of a library that the disk or a pipe has failed; the program goes on without it."""
    if not isinstance(failure.exc_value, OSError):
        threading.__excepthook__(failure)
        return
    name = failure.thread.name if failure.thread else "a thread"
    put(f"pcpvt: warning: {printable(f'{name} ended: {failure.exc_value}')}\n", sys.stderr)


def _fail(message: str, code: int, speaks: bool = True) -> None:
    signals.ignore_from_now()
    if speaks:
        show(message)
    sys.exit(code)


if __name__ == "__main__":
    entry()
