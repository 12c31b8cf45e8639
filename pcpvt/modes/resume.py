"""Where a run starts: at the newest checkpoint that is whole, if its config agrees; otherwise at step 0."""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from pcpvt.errors import UserError
from pcpvt.functional import state
from pcpvt.modes.console import Console
from pcpvt.modes.session import Session
from pcpvt.store import checkpoint

# Fields that may change between the parts of a run: where and how it computes, how long, and what is written down.
# A longer or shorter run changes the learning rates still to come, which is what asking for it means.
HARMLESS = (
    "device", "processes", "compile", "precision", "accumulate", "checkpoint", "finetune", "weights", "epochs", "steps",
    "examples", "eval_every", "save_every", "log_every", "keep", "max_skipped", "data.path", "data.workers",
    "data.on_error",
)  # fmt: skip
HARMLESS_ROOMS = ("eval.", "bench.", "predict.", "export.")


def newest(session: Session, console: Console) -> checkpoint.Checkpoint | None:
    """The newest whole checkpoint of the workdir; damaged ones are named and passed over."""
    for path in reversed(checkpoint.steps(session.checkpoints).values()):
        try:
            return checkpoint.read(path)
        except checkpoint.CheckpointError as error:
            console.warn(f"{error}; falling back to an earlier one")
    return None


def check_compatible(session: Session, meta: dict[str, Any], classes: list[str]) -> list[str]:
    """What has changed since the checkpoint, for the log.

    Raises:
        UserError: for a field that may not change, with both values, or for other classes.
    """
    notes = []
    now, then = flat(session.config), meta["config"]
    for name in sorted(now.keys() | then.keys()):
        before, after = then.get(name), now.get(name)
        if before == after:
            continue
        if name in HARMLESS or name.startswith(HARMLESS_ROOMS):
            notes.append(f"config.{name}: {before} -> {after}")
        else:
            raise UserError(
                f"config.{name}: {after!r} but {session.workdir} was trained with {before!r}: "
                "restore it, or start anew with --workdir=DIR"
            )
    if list(meta["classes"]) != classes:
        raise UserError(
            f"config.data.path: the classes are not those that {session.workdir} was trained on: use another --workdir"
        )
    return notes


def flat(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Field name to value, as JSON gives it back (tuples become lists)."""
    out: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            out.update(flat(value, f"{prefix}{name}."))
        else:
            out[prefix + name] = list(value) if isinstance(value, tuple) else value
    return out


def restore(loaded: checkpoint.Checkpoint, template: state.TrainState) -> state.TrainState:
    """The TrainState of a checkpoint on the template's devices.

    Raises:
        CheckpointError: when its tensors are not those of this run.
    """
    expected = state.flatten(template)
    wrong = sorted(
        name
        for name in expected.keys() | loaded.tensors.keys()
        if name not in expected
        or name not in loaded.tensors
        or expected[name].shape != loaded.tensors[name].shape
        or expected[name].dtype != loaded.tensors[name].dtype
    )
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise checkpoint.CheckpointError(
            f"{loaded.path}: holds another run's state ({', '.join(wrong[:3])}{more} differ): use another --workdir"
        )
    return state.unflatten(template, {n: loaded.tensors[n].to(expected[n].device) for n in expected})
