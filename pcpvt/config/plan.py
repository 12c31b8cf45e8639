"""The plan of a run: all steps, batch sizes and learning rates, derived from the config and the number of images."""

import math
from collections.abc import Callable
from typing import NamedTuple

from ml_collections import ConfigDict

from pcpvt.config import sizes
from pcpvt.config.checks import parse_duration
from pcpvt.errors import UserError
from pcpvt.functional import schedules
from pcpvt.functional.sizes import Size, SizeSchedule

UNITS = ("epochs", "steps", "examples")
# Of a run that is not longer than its warm-up. The recipes' own shares are smaller (at most 2 of 15 epochs), and four
# fifths of the run are left for the higher rates.
WARMUP_SHARE = 1 / 5
# Steps below which a length in epochs is remarked on: AdamW moves a parameter by about the learning rate a step, so a
# hundred steps move it by at most a hundred times that.
FEW_STEPS = 100


class Plan(NamedTuple):
    """What a run will do, in steps and samples."""

    size: Size  # of evaluation, and the largest of training
    sizes: SizeSchedule  # of training
    num_classes: int
    examples: int  # training images per epoch
    steps: int
    batch: int  # global
    local_batch: int  # of one process
    grad_accum_steps: int  # micro-batches per step in one process
    lr: float
    schedule: schedules.Schedule
    eval_every: int  # steps; 0 never
    save_every: int
    log_every: int
    eval_batch: int  # of one process

    @property
    def epochs(self) -> float:
        return self.steps * self.batch / self.examples

    def epoch(self, step: int) -> int:
        """The epoch that the first sample of a step belongs to."""
        return step * self.batch // self.examples


def duration(config: ConfigDict, prefix: str) -> tuple[float, str] | None:
    """The amount and the unit of the training (prefix "") or of its warm-up ("warmup_"); None where no field is set.

    Raises:
        UserError: when two units are set.
    """
    given = [(config[prefix + unit], unit) for unit in UNITS if config.get(prefix + unit) is not None]
    if len(given) > 1:
        both = " and ".join(f"config.{prefix}{unit}={amount:g}" for amount, unit in given)
        raise UserError(f"{both}: two units for one duration: give one of them")
    return given[0] if given else None


def in_steps(amount: float, unit: str, batch: int, examples: int) -> int:
    """A duration in optimizer steps, rounded up so that what was asked for is done in full."""
    if unit == "steps":
        return math.ceil(amount)
    samples = amount * examples if unit == "epochs" else amount
    return math.ceil(round(samples / batch, 6))


def make_plan(
    config: ConfigDict, *, examples: int, num_classes: int, micro_batch: int,
    operations: Callable[[Size], float] = math.prod,
) -> Plan:  # fmt: skip
    """Derives the plan of a checked config.

    Args:
        examples: training images per epoch.
        num_classes: as counted from the data.
        micro_batch: samples that one device takes at once (see `devices`).
        operations: of an image of a size; only ratios count.
    """
    batch, processes = config.batch_size, config.processes
    mixes = bool(config.mixup or config.cutmix)
    if batch % processes:
        raise UserError(
            f"config.batch_size: {batch} cannot be cut evenly over {processes} processes: "
            f"use {round(batch / processes) * processes or processes}"
        )
    local = batch // processes
    if mixes and local % 2:
        raise UserError(
            f"config.batch_size: {batch} leaves {local} per process, and mixing pairs samples: make it even"
        )
    grad_accum_steps = config.accumulate or _pieces(local, micro_batch, 2 if mixes else 1)
    if local % grad_accum_steps or (mixes and local // grad_accum_steps % 2):
        raise UserError(
            f"config.accumulate: {grad_accum_steps} does not cut a batch of {local} per process evenly"
            f"{' into pairs' if mixes else ''}: choose a divisor"
        )
    length = duration(config, "")
    assert length is not None  # `resolve.check` has refused it
    lr = config.lr if config.lr is not None else config.base_lr * batch / 512
    size, steps = (
        (config.image_size, config.image_width or config.image_size),
        max(1, in_steps(*length, batch, examples)),
    )

    def start(amount: float, unit: str) -> int:
        return in_steps(amount, unit, batch, examples)

    plan = Plan(
        size=size, sizes=sizes.make(config.size_schedule, size, steps, start, operations),
        num_classes=num_classes, examples=examples, steps=steps,
        batch=batch, local_batch=local, grad_accum_steps=grad_accum_steps, lr=lr, schedule=schedules.constant(lr),
        eval_every=_interval(config.eval_every, batch, examples),
        save_every=_interval(config.save_every, batch, examples),
        log_every=_interval(config.log_every, batch, examples),
        eval_batch=eval_batch(config),
    )  # fmt: skip
    return plan._replace(schedule=_schedule(config, plan))


def eval_batch(config: ConfigDict) -> int:
    """Evaluation samples per process and batch."""
    wanted = config.eval.batch_size or min(config.batch_size, 64 * config.processes)
    return math.ceil(wanted / config.processes)


def _schedule(config: ConfigDict, plan: Plan) -> schedules.Schedule:
    amount, unit, asked = _warmup(config, plan)
    cut = asked >= plan.steps
    if config.schedule == "constant":
        return schedules.constant(plan.lr)
    if config.schedule == "reference":
        # plan.epochs is more than config.epochs when the last step ends after the last epoch.
        epochs = config.epochs or plan.epochs
        warmup_epochs = amount if unit == "epochs" else amount * plan.batch / plan.examples
        warmup_epochs = WARMUP_SHARE * epochs if cut else warmup_epochs
        return schedules.reference(plan.lr, epochs, warmup_epochs, plan.epoch, config.warmup_lr, config.min_lr)
    warmup_steps = int(WARMUP_SHARE * plan.steps) if cut else asked
    return schedules.warmup_cosine(plan.lr, plan.steps, warmup_steps, config.warmup_lr, config.min_lr)


def _warmup(config: ConfigDict, plan: Plan) -> tuple[float, str, int]:
    """The warm-up that is asked for: amount, unit, steps."""
    amount, unit = duration(config, "warmup_") or (0, "steps")
    return amount, unit, in_steps(amount, unit, plan.batch, plan.examples)


def short_run_notes(config: ConfigDict, plan: Plan) -> list[str]:
    """What is different, or should be, because the run is short for its config."""
    notes = []
    amount, unit, asked = _warmup(config, plan)
    warmup = f"config.warmup_{unit}: {amount:g} ({asked} steps)"
    if asked and config.schedule != "constant":
        if asked >= plan.steps:
            notes.append(f"{warmup} is as long as the run of {plan.steps} steps or longer: a fifth of the run is used")
        elif 2 * asked > plan.steps:
            notes.append(f"{warmup} is most of the run of {plan.steps} steps: set it lower if that is not meant")
    amount, unit = duration(config, "") or (0, "steps")
    if unit == "epochs" and plan.steps < FEW_STEPS:
        batch = 2 ** max(3, int(math.log2(max(1, amount * plan.examples / FEW_STEPS))))
        if batch < plan.batch:
            notes.append(
                f"config.batch_size: {plan.batch} of {plan.examples} training images make {plan.steps} steps in "
                f"{amount:g} epochs, which are few: consider --config.batch_size={batch} --config.lr={plan.lr:g}"
            )
    window = 1 / (1 - config.ema)
    if config.ema and window > plan.steps:
        last = schedules.ema_decay(config.ema, plan.steps - 1)
        notes.append(
            f"config.ema: {config.ema:g} averages over about {window:,.0f} steps and the run has {plan.steps}: the "
            f"decay rises with the step, here to {last:.4g}, which is about {1 / (1 - last):.0f} steps"
        )
    return notes


def _interval(text: str, batch: int, examples: int) -> int:
    """The steps between two evaluations, checkpoints or records; 0: never."""
    interval = parse_duration(text)
    assert interval is not None, text  # `resolve.check` has refused it
    return max(1, in_steps(*interval, batch, examples)) if interval[0] else 0


def _pieces(local: int, micro_batch: int, unit: int) -> int:
    """The fewest equal pieces of at most `micro_batch` samples, each a multiple of `unit`."""
    for pieces in range(1, local + 1):
        if local % pieces == 0 and local // pieces <= max(micro_batch, unit) and local // pieces % unit == 0:
            return pieces
    return local // unit
