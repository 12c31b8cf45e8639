"""Resuming: the newest valid checkpoint of a workdir, its compatibility with the config, and its state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pcpvt.checkpoints import checkpoint
from pcpvt.config import fields, stored
from pcpvt.distributed import collectives
from pcpvt.errors import UserError
from pcpvt.functional import state
from pcpvt.models import pcpvt
from pcpvt.runtime.console import Console
from pcpvt.runtime.session import Session


def newest(session: Session, console: Console) -> checkpoint.Checkpoint | None:
    """The newest valid checkpoint of the workdir; damaged ones are reported and skipped.

    Raises:
        CheckpointError: when a valid checkpoint lacks what a run needs to continue.
    """
    for path in reversed(checkpoint.steps(session.checkpoints).values()):
        try:
            found = checkpoint.read(path)
        except checkpoint.CheckpointError as error:
            if console.speaks:  # all processes read the same files
                console.warn(f"{error}; falling back to an earlier one")
            continue
        missing = [name for name, fits in REQUIRED.items() if not fits(found.meta.get(name))]
        if missing:
            raise checkpoint.CheckpointError(f"{path}: no run goes on from it ({missing[0]} is missing): remove it")
        return found
    return None


def _numbers(*names: str, unset: bool = False) -> Callable[[Any], bool]:
    """A check that a value is a JSON object with numbers under these names (or null, if `unset`)."""
    return lambda value: (
        (unset and value is None)
        or (isinstance(value, dict) and all(isinstance(value.get(name), int | float) for name in names))
    )


# What a training checkpoint must hold in addition to what `checkpoints.checkpoint` requires of every checkpoint.
REQUIRED: dict[str, Callable[[Any], bool]] = {
    "config": lambda value: isinstance(value, dict),
    "classes": lambda value: isinstance(value, list),
    "examples": lambda value: isinstance(value, int),
    "records": lambda value: isinstance(value, int),
    "window": _numbers("loss", "steps", "skipped", "grad_norm"),
    "clock": _numbers("steps", "seconds", "elapsed"),
    "metrics": _numbers("acc1", "acc5", "loss", "seen", unset=True),
    "best": _numbers("acc1", "acc5", "loss", "seen", "step", unset=True),
}


def check_compatible(session: Session, meta: dict[str, Any], classes: list[str], examples: int) -> list[str]:
    """What has changed since the checkpoint, for the log.

    Raises:
        UserError: for a field that may not change, with both values, or for other data.
    """
    notes = []
    default = stored.flat(fields.base())
    now, then = stored.flat(session.config), meta["config"]
    for name in sorted(now.keys() | then.keys()):
        # A field that another version added had its default.
        before, after = then.get(name, default.get(name)), now.get(name, default.get(name))
        rule = fields.rule(name)
        if before == after or (fields.START in rule and after == default.get(name)):
            continue
        if fields.FREE in rule:
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
    if meta["examples"] != examples:
        raise UserError(
            f"config.data.path: {examples} training images but {session.workdir} was trained on {meta['examples']}: "
            "restore them, or start anew with --workdir=DIR"
        )
    return notes


def origin(resumed: checkpoint.Checkpoint | None) -> dict[str, Any]:
    """What a run began with, for its next checkpoint: this part of it may not have named it again."""
    began = resumed.meta["config"] if resumed else {}
    return {name: value for name, value in began.items() if fields.START in fields.rule(name)}


def check_agreement(step: int) -> None:
    """Raise UserError unless all processes start from the same step, which needs a shared workdir."""
    steps, count = collectives.sum_numbers([float(step), 1.0])
    if collectives.any_true(steps != step * count):
        raise UserError(
            f"--workdir: the processes found different checkpoints (this one step {step}): "
            "put it on a file system that all hosts share"
        )


def params_of(loaded: checkpoint.Checkpoint, model: pcpvt.PCPVT) -> pcpvt.Params:
    """The parameters of a checkpoint, in the model's order, as in a new run.

    Raises:
        CheckpointError: when they are not the model's.
    """
    shapes = pcpvt.shapes(model)
    found = {n.removeprefix("params/"): v for n, v in loaded.tensors.items() if n.startswith("params/")}
    if {n: v.shape for n, v in found.items()} != shapes:
        raise checkpoint.CheckpointError(f"{loaded.path}: holds another model's parameters: use another --workdir")
    return {name: found[name] for name in shapes}


def restore(loaded: checkpoint.Checkpoint, template: state.TrainState) -> state.TrainState:
    """The TrainState of a checkpoint, copied into the template's memory, whose alignment selects the same kernels.

    The loss scale depends on the precision, which may change: if the checkpoint has none, the template's is used.

    Raises:
        UserError: when its tensors are not those of this run.
    """
    expected = state.flatten(template)
    found = dict(loaded.tensors)
    if not any(name in found for name in expected if name.startswith("scale/")):
        found = {n: v for n, v in found.items() if not n.startswith("scale/")}
        found |= {name: value for name, value in expected.items() if name.startswith("scale/")}
    wrong = sorted(
        name for name in expected.keys() | found.keys() if name not in expected or name not in found
        or expected[name].shape != found[name].shape or expected[name].dtype != found[name].dtype
    )  # fmt: skip
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise checkpoint.CheckpointError(
            f"{loaded.path}: holds another run's state ({', '.join(wrong[:3])}{more} differ): use another --workdir"
        )
    return state.unflatten(template, {name: expected[name].copy_(found[name]) for name in expected})
