"""Preflight of a training run: what it will be, whether its checkpoints fit the disk, and how long it will take.

A trial checkpoint of the real size is written, synced, read back and removed. No trial step is needed: the run's own
second step, which neither compiles nor starts loader processes, gives the expected duration.
"""

import math
import shutil
import textwrap
import time
from collections.abc import Callable

from pcpvt.checkpoints import checkpoint
from pcpvt.checkpoints.writer import copy_to_host
from pcpvt.config import fields, stored
from pcpvt.config.plan import Plan
from pcpvt.errors import UserError
from pcpvt.functional import state as states
from pcpvt.functional.state import TrainState
from pcpvt.models import pcpvt
from pcpvt.runtime.console import duration
from pcpvt.runtime.session import Session

Say = Callable[[str], None]

EVALUATION = 1 / 3  # of a training step's time per image: no backward pass (an estimate)
WIDTH = 118


def announce_run(session: Session, plan: Plan, model: pcpvt.PCPVT, validation_images: int, say: Say) -> None:
    """Print what the run will be."""
    config, device, processes, pieces = session.config, session.device, session.world.size, plan.grad_accum_steps
    say(
        f"model: {config.model.name}, {pcpvt.n_parameters(model):,} parameters, {plan.num_classes} classes, "
        f"{plan.size[0]}x{plan.size[1]} px, {session.policy}"
    )
    if len(plan.sizes.sizes) > 1:
        say(_sizes(plan))
    say(f"device: {processes} x {device.name} ({device.describe()}), compile {config.compile}")
    say(
        f"data: {config.data.name or 'folder'} {config.data.path}: {plan.examples} training, "
        f"{validation_images} validation images"
    )
    say(
        f"batch: {plan.batch} = {processes} processes x {plan.local_batch} ({pieces} x {plan.local_batch // pieces}); "
        f"{plan.steps} steps = {plan.epochs:.4g} epochs; peak lr {plan.lr:.3g}"
    )
    default = stored.flat(fields.base())
    changed = " ".join(f"{name}={value}" for name, value in stored.flat(config).items() if value != default[name])
    for line in textwrap.wrap(f"config: {changed or 'all defaults'}", WIDTH, subsequent_indent="    "):
        say(line)


def _sizes(plan: Plan) -> str:
    """The log's line about a schedule of image sizes."""
    starts = [f"{h}x{w} from step {start}" for start, (h, w) in zip(plan.sizes.starts, plan.sizes.sizes, strict=True)]
    saving = plan.steps / plan.sizes.cost(0, plan.steps)
    return f"sizes: {', '.join(starts)}: {saving:.3g}x fewer operations than all steps at the last"


def check_disk(session: Session, plan: Plan, state: TrainState, say: Say) -> None:
    """Check on the main process that the disk holds the run's checkpoints, by space and by a trial checkpoint.

    Raises:
        UserError: when the disk cannot hold the checkpoints, or the trial cannot be written.
    """
    if not session.world.is_main:
        return
    folder, tensors = session.checkpoints, copy_to_host(states.flatten(state))
    size = sum(tensor.nbytes for tensor in tensors.values())
    # The kept ones, the best, that of the last audit (`Audit.passed`), and the one being written, which takes its place
    # before another is removed.
    due = sum(plan.steps // every for every in (plan.save_every, plan.eval_every) if every)
    files = min(session.config.keep + 2 + (session.config.audit_action == "restart"), 2 + due)
    free = shutil.disk_usage(folder).free + sum(path.stat().st_size for path in checkpoint.steps(folder).values())
    if free < files * size:
        raise UserError(
            f"--workdir: {session.workdir}: {files} checkpoints of {amount(size)} need {amount(files * size)} and "
            f"{amount(free)} are free: make room, lower config.keep, or choose another --workdir"
        )
    trial, began = folder / "trial.tmp", time.perf_counter()
    try:
        checkpoint.write_tensors(trial, tensors, {"step": 0})
        seconds = time.perf_counter() - began
    except OSError as error:
        raise UserError(
            f"--workdir: {folder}: a trial checkpoint could not be written ({error.strerror or error}): free space, or "
            "choose another --workdir"
        ) from None
    finally:
        trial.unlink(missing_ok=True)
    say(
        f"disk: {files} checkpoints of {amount(size)} need {amount(files * size)} of {amount(free)} free; "
        f"trial save {seconds:.2f} s"
    )


def amount(size: float) -> str:
    """Bytes for a reader: `385 MB`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def expectation(
    plan: Plan, step: int, validation_images: int, first: float, second: float, memory: tuple[int, int]
) -> str:
    """The log's line about the expected duration and memory.

    Args:
        step: steps done.
        first, second: seconds of the first two steps of this part of the run.
        memory: (peak bytes, bytes of the device); see `Device.memory_stats`.
    """
    steps, full = plan.steps - step, second / plan.sizes.cost(step - 1, step)  # of a step at the largest size
    evaluated = steps // plan.eval_every * validation_images if plan.eval_every else 0  # images
    left = plan.sizes.cost(step, plan.steps) * full + evaluated * EVALUATION * full / plan.batch
    until = time.strftime("%a %H:%M", time.localtime(time.time() + left))
    return (
        f"first step {first:.2f} s, second {second:.3g} s; memory {amount(memory[0])} of {amount(memory[1])}; "
        f"expected duration: {duration(left)}, until {until}"
    )


def feeding(reading: float, computing: float, workers: int) -> str:
    """The log's line about loader processes.

    Args:
        reading: seconds that one process takes to read a batch.
        computing: seconds of a step without waiting for its batch.
        workers: loader processes there are.
    """
    needed = math.ceil(reading / max(computing, 1e-6))
    if workers == 0:
        share = reading / (reading + computing)
        advice = f"{share:.0%} of the time, in this process; config.data.workers={needed} would hide it"
    elif workers >= needed:
        advice = f"config.data.workers={workers} keeps it fed ({needed} would)"
    else:
        advice = f"config.data.workers={needed} would keep it fed where there are cores for them; it is {workers}"
    return f"reading: {reading:.3g} s a batch, a step computes {computing:.3g} s: {advice}"
