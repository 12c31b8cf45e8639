"""Resuming: the newest valid checkpoint of a workdir, its compatibility with the config, and its state."""

import contextlib
import itertools
import json
from pathlib import Path
from typing import Any

from pcpvt.checkpoints import checkpoint
from pcpvt.config import fields, stored
from pcpvt.distributed import collectives
from pcpvt.errors import UserError
from pcpvt.functional import state
from pcpvt.runtime import environment, records
from pcpvt.runtime.console import Console
from pcpvt.runtime.session import Session
from pcpvt.train.history import Clock, Window

_SCORES = ("loss", "seen")
_TASK = {False: ("acc1", "acc5"), True: ("map", "macro_f1", "micro_f1")}  # by whether there are several labels
# The objects that a run continues from, with their numbers; `checkpoints.checkpoint` checks the types of other parts.
REQUIRED: dict[str, tuple[str, ...]] = {
    "window": Window._fields, "clock": Clock._fields, "metrics": _SCORES, "best": (*_SCORES, "step"),
}  # fmt: skip


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
        missing = [name for name in ("config", "classes", "examples", "records") if name not in found.meta]
        missing += [name for name in REQUIRED if not _has_numbers(name, found.meta.get(name))]
        if missing:
            raise checkpoint.CheckpointError(f"{path}: no run goes on from it ({missing[0]} is missing): remove it")
        return found
    return None


def _has_numbers(name: str, value: Any) -> bool:
    """Whether a value has the numbers that REQUIRED lists; an evaluation that did not take place is null."""
    if value is None:
        return name in ("metrics", "best")
    if not isinstance(value, dict):
        return False
    numbers = REQUIRED[name] if name in ("window", "clock") else (*REQUIRED[name], *_TASK["map" in value])
    return all(isinstance(value.get(number), int | float) for number in numbers)


def check_compatible(session: Session, meta: dict[str, Any], classes: list[str], examples: int) -> list[str]:
    """What has changed since the checkpoint, for the log; a run that has diverged after it may change more fields.

    Raises:
        UserError: for a field that may not change, with both values, or for other data.
    """
    notes, refused = [], {}
    allowed = fields.FREE | fields.DIVERGED if _diverged_at(session.workdir) > meta["step"] else fields.FREE
    default = stored.flat(fields.base())
    now, then = stored.flat(session.config), meta["config"]
    for name in sorted(now.keys() | then.keys()):
        # A field that another version added had its default.
        before, after = then.get(name, default.get(name)), now.get(name, default.get(name))
        rule = fields.rule(name)
        if before == after or (fields.START in rule and after == default.get(name)):
            continue
        if rule & allowed:
            notes.append(f"config.{name}: {before} -> {after}")
        else:
            refused[name] = (before, after)
    command = session.command
    anew = f"start anew with: {command.line(free(session.workdir))}" if command else "start anew with --workdir=DIR"
    unset = [name for name in refused if command and name not in command.overrides]
    if unset or (refused and meta["classes"] != classes):
        # Nobody asked for these values, so it is not the values that are wrong.
        listed = [f"config.{name} {before!r} there, {after!r} here" for name, (before, after) in refused.items()]
        more = f" and {len(listed) - 3} fields more" if len(listed) > 3 else ""
        raise UserError(
            f"--workdir: {session.workdir} holds another run, {describe(session.workdir, meta)} "
            f"({'; '.join(listed[:3])}{more}): go on with it by --workdir={session.workdir} alone, or {anew}"
        )
    for name, (before, after) in refused.items():
        raise UserError(
            f"config.{name}: {after!r} but {session.workdir} was trained with {before!r}: restore it, or {anew}"
        )
    if meta["classes"] != classes:
        raise UserError(
            f"config.data.path: the classes are not those that {session.workdir} was trained on "
            f"({describe(session.workdir, meta)}): restore them, or {anew}"
        )
    if meta["examples"] != examples:
        raise UserError(
            f"config.data.path: {examples} training images but {session.workdir} was trained on {meta['examples']}: "
            f"restore them, or {anew}"
        )
    return notes


def describe(workdir: Path, meta: dict[str, Any]) -> str:
    """The run of a checkpoint in a few words: model, data, date."""
    config, classes = meta["config"], meta["classes"]
    data = " ".join(str(config[name]) for name in ("data.name", "data.path") if config.get(name)) or "its data"
    text = f"{config.get('model.name', 'a model')} on {data} ({meta['examples']} images of {len(classes)} classes)"
    with contextlib.suppress(UserError):
        started = str(stored.read_config(workdir / environment.FILE).get("started", ""))
        text += f", last started {started[:16].replace('T', ' ')} UTC" if started else ""
    return text


def free(workdir: Path) -> Path:
    """The first of DIR-2, DIR-3, ... that does not exist."""
    name = workdir.name or "run"
    return next(path for i in itertools.count(2) if not (path := workdir.with_name(f"{name}-{i}")).exists())


def _diverged_at(workdir: Path) -> int:
    """The step at which the workdir's run last ended because it had diverged; -1 when none did."""
    try:
        return int(json.loads((workdir / records.NONFINITE).read_text())["steps"][-1]["step"])
    except (OSError, ValueError, LookupError, TypeError):
        return -1


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


def restore(loaded: checkpoint.Checkpoint, template: state.TrainState) -> state.TrainState:
    """The TrainState of a checkpoint, copied into the template's memory, whose alignment selects the same kernels.

    The loss scale depends on the precision, which may change: if the checkpoint has none, the template's is used.

    Raises:
        CheckpointError: when its tensors are not those of this run.
    """
    expected, found = state.flatten(template), loaded.tensors
    scale = {name: value for name, value in expected.items() if name.startswith("scale/")}
    if not scale.keys() & found.keys():
        found = {name: value for name, value in found.items() if not name.startswith("scale/")} | scale
    ours, theirs = ({(n, v.shape, v.dtype) for n, v in tensors.items()} for tensors in (expected, found))
    if wrong := sorted({name for name, _, _ in ours ^ theirs}):
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise checkpoint.CheckpointError(
            f"{loaded.path}: holds another run's state ({', '.join(wrong[:3])}{more} differ): use another --workdir"
        )
    for name, value in expected.items():
        value.copy_(found[name])
    return template
