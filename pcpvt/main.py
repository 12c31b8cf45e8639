"""Trains, fine-tunes, evaluates and exports Twins-PCPVT image classifiers on Ascend NPUs, CUDA GPUs and CPUs.

    python -m pcpvt.main --config=configs/pcpvt_s.py:cpu                        train on the embedded digits
    python -m pcpvt.main --config=configs/pcpvt_s.py:npu8 --config.data.path=DIR    train on an image folder
    python -m pcpvt.main --mode=eval                                            evaluate the best checkpoint

Fields of --config and their defaults (a recipe in the config's ARG may set others):
"""

from __future__ import annotations

import sys

from absl import app, flags

from pcpvt import cli
from pcpvt.errors import UserError

FLAGS = flags.FLAGS


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise UserError(f"{argv[1]!r}: not understood: fields are given as --config.NAME=VALUE")
    run = cli.read_run(FLAGS)
    if run.config.processes > 1 and not cli.inside_torchrun():
        from pcpvt import launcher

        return launcher.launch(run.config, sys.argv[1:])
    from pcpvt.modes import dispatch

    return dispatch.run(run)


def entry() -> None:
    """Runs the program; an error meant for the user is one line on standard error and exit code 2."""
    try:
        cli.define_flags()
        sys.modules["__main__"].__doc__ = f"{__doc__}\n{cli.field_help()}"
        app.run(main, flags_parser=cli.parse)
    except UserError as error:
        print(f"pcpvt: error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    entry()
