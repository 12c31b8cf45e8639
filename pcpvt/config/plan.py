"""Config and data set to a Plan: every number that follows from them, checked, with one-line errors."""

from __future__ import annotations

import difflib
import math
import re
from typing import NamedTuple

from ml_collections import ConfigDict

from pcpvt.config.fields import FIELDS
from pcpvt.errors import UserError
from pcpvt.functional import precision, schedules
from pcpvt.models.pcpvt import SPECS, STRIDE

LARGEST = 1e9  # of most numbers in a config, so that nothing that is computed from them overflows
# Stricter than timm, which skips sections that it does not know.
RANDAUGMENT = re.compile(r"rand(-(m|n|mmax|inc)\d{1,3}|-(p|mstd)\d{1,3}(\.\d+)?|-t(weights|3a|3aw))*")
WEIGHTED = {"weights": 15, "3aw": 14}  # timm's operations that are drawn by weight, each once
UNITS = ("epochs", "steps", "examples")
UNSET = ("warmup_epochs", *(name for name, (default, _) in FIELDS.items() if isinstance(default, type)))  # may be None


class Plan(NamedTuple):
    """What a run will do, in steps and samples."""

    size: tuple[int, int]  # height, width
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


def check_choice(field: str, value: str, choices) -> None:
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(choices)}"
        raise UserError(f"config.{field}: {value!r} is not known: {hint}")


def _within(config: ConfigDict, field: str, low: float, high: float = LARGEST, *, open_end: bool = False) -> None:
    node = config
    for part in field.split("."):
        node = node[part]
    if node is None:
        return
    if not (low <= node < high if open_end else low <= node <= high):
        upper = "" if node < low and high >= LARGEST else f" and {'below' if open_end else 'at most'} {high:g}"
        raise UserError(f"config.{field}: {node} is out of range: give at least {low:g}{upper}")


def check(config: ConfigDict) -> None:
    """What can be said wrong about a config without looking at devices or data.

    Raises:
        UserError: naming the field, the value and the remedy.
    """
    for field in FIELDS:
        room, _, leaf = field.rpartition(".")
        if (config[room] if room else config)[leaf] is None and field not in UNSET:
            raise UserError(f"config.{field}: None is no value for it: leave the field out, or give one")
    check_choice("model.name", config.model.name, list(SPECS))
    check_choice("model.pad", config.model.pad, ["pad", "error"])
    check_choice("device", config.device, ["cpu", "cuda", "npu"])
    check_choice("compile", config.compile, ["auto", "inductor", "npugraphs", "none"])
    check_choice("kernels", config.kernels, ["auto", "plain"])
    check_choice("schedule", config.schedule, ["cosine", "reference", "constant"])
    check_choice("mix_mode", config.mix_mode, ["batch", "pair", "elem"])
    check_choice("data.on_error", config.data.on_error, ["error", "skip"])
    check_choice("export.format", config.export.format, ["timm", "onnx", "pt2"])
    check_choice("weights", config.weights, ["auto", "params", "ema"])
    check_choice("predict.format", config.predict.format, ["table", "jsonl", "csv"])
    check_choice("bench.against", config.bench.against, ["", "timm", "timm-compiled"])
    if config.bench.scaling and config.bench.against:
        raise UserError(
            f"config.bench.against: {config.bench.against!r}: config.bench.scaling measures ours alone: leave it empty"
        )
    for field in ("batch_size", "processes", "image_size", "image_width", "num_classes", "augment.repeats", "keep"):
        _within(config, field, 1)
    for field in ("bench.steps", "max_skipped", "timeout", "grace"):
        _within(config, field, 1)
    for field in (
        "accumulate",
        "weight_decay",
        "clip_norm",
        "mixup",
        "cutmix",
        "lr",
        "base_lr",
        "min_lr",
        "warmup_lr",
        "eps",
    ):
        _within(config, field, 0)
    for field in (
        "warmup_epochs",
        "warmup_steps",
        "augment.crop_pad",
        "augment.color_jitter",
        "eval.batch_size",
        "epochs",
        "steps",
    ):
        _within(config, field, 0)
    for field in ("seed", "examples"):
        _within(config, field, 0, 2**53)
    for field in ("model.drop_path", "ema", "label_smoothing", "beta1", "beta2"):
        _within(config, field, 0, 1, open_end=True)
    for field in ("mix_prob", "mix_switch", "augment.hflip", "augment.erase"):
        _within(config, field, 0, 1)
    _within(config, "layer_decay", 1e-3, 1)
    _within(config, "eval.crop", 0.05, 1)
    _within(config, "data.workers", -1)
    for field in ("scale", "ratio"):
        value = config.augment[field]
        numbers = len(value) == 2 and all(isinstance(n, int | float) for n in value)
        if not numbers or not 1 / LARGEST <= value[0] <= value[1] <= LARGEST:
            limits = f"{1 / LARGEST:g} <= low <= high <= {LARGEST:g}"
            raise UserError(f"config.augment.{field}: {value} is no range: give (low, high) with {limits}")
    if config.augment.scale[1] > 1:
        raise UserError(f"config.augment.scale: {config.augment.scale} exceeds the image: give (low, high) up to 1")
    _check_randaugment(config.augment.randaugment)
    for field in ("frozen", "fresh"):
        try:
            re.compile(config[field])
        except re.error as error:
            raise UserError(
                f"config.{field}: {config[field]!r} is no regular expression ({error}): correct it"
            ) from None
    if config.fresh and not config.finetune:
        raise UserError(
            f"config.fresh: {config.fresh!r} but nothing is fine-tuned: set config.finetune, or leave it out"
        )
    if config.precision != "auto":
        try:
            precision.parse(config.precision)
        except ValueError as error:
            raise UserError(f"config.precision: {error}") from None
    height, width = config.image_size, config.image_width or config.image_size
    if config.model.pad == "error" and (height % STRIDE or width % STRIDE):
        raise UserError(
            f"config.image_size: {height}x{width} is not divisible by {STRIDE}: use one that is or config.model.pad=pad"
        )
    if config.compile == "npugraphs" and config.device != "npu":
        raise UserError(f"config.compile: 'npugraphs' needs an NPU and config.device is {config.device!r}: use auto")
    for field in ("eval_every", "save_every", "log_every"):
        _duration(config, field, 1, 1)
    _one_unit(config, "", UNITS, required=True)
    _one_unit(config, "warmup_", ("epochs", "steps"), required=False)


def _check_randaugment(policy: str) -> None:
    if policy and not RANDAUGMENT.fullmatch(policy):
        raise UserError(f"config.augment.randaugment: {policy!r} is not timm's notation: try rand-m9-mstd0.5-inc1")
    layers, chosen = re.findall(r"-n(\d+)", policy), re.findall(r"-t(\w+)", policy)
    most = WEIGHTED.get(chosen[0], LARGEST) if chosen else LARGEST
    if layers and int(layers[-1]) > most:
        raise UserError(
            f"config.augment.randaugment: {policy!r} draws {layers[-1]} of {most} operations without replacement: "
            f"give at most n{most}"
        )


def _one_unit(config: ConfigDict, prefix: str, units, *, required: bool) -> tuple[str, float] | None:
    given = [(unit, config[prefix + unit]) for unit in units if config[prefix + unit] is not None]
    names = ", ".join(f"config.{prefix}{unit}" for unit in units)
    if len(given) > 1:
        both = " and ".join(f"config.{prefix}{unit}={value:g}" for unit, value in given)
        raise UserError(f"{both}: two units for one duration: give one of them")
    if not given and required:
        raise UserError(f"{names}: none is set: give one of them")
    if given and required and not given[0][1] > 0:
        raise UserError(f"config.{prefix}{given[0][0]}: {given[0][1]} is no duration: give more than 0")
    return given[0] if given else None


def in_steps(amount: float, unit: str, batch: int, examples: int) -> int:
    """A duration in optimizer steps, rounded up so that what was asked for is done in full."""
    if unit == "steps":
        return math.ceil(amount)
    samples = amount * examples if unit == "epochs" else amount
    return math.ceil(round(samples / batch, 6))


def _duration(config: ConfigDict, field: str, batch: int, examples: int) -> int:
    text = config[field].strip()
    if text == "0":
        return 0
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(epoch|step|example)s?", text)
    if not match or not 0 < float(match[1]) <= LARGEST:
        raise UserError(f"config.{field}: {config[field]!r} is no duration: write like '1 epoch', '500 steps' or '0'")
    return max(1, in_steps(float(match[1]), match[2] + "s", batch, examples))


def make_plan(config: ConfigDict, *, examples: int, num_classes: int, micro_batch: int) -> Plan:
    """Derives the plan of a checked config.

    Args:
        examples: training images per epoch.
        num_classes: as counted from the data.
        micro_batch: samples that one device takes at once (see `devices`).
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
    length = _one_unit(config, "", UNITS, required=True)
    assert length is not None  # required
    unit, amount = length
    steps = max(1, in_steps(amount, unit, batch, examples))
    lr = config.lr if config.lr is not None else config.base_lr * batch / 512
    made = Plan(
        size=(config.image_size, config.image_width or config.image_size),
        num_classes=num_classes,
        examples=examples,
        steps=steps,
        batch=batch,
        local_batch=local,
        grad_accum_steps=grad_accum_steps,
        lr=lr,
        schedule=schedules.constant(lr),
        eval_every=_duration(config, "eval_every", batch, examples),
        save_every=_duration(config, "save_every", batch, examples),
        log_every=_duration(config, "log_every", batch, examples),
        eval_batch=eval_batch(config),
    )
    return made._replace(schedule=_schedule(config, made))


def eval_batch(config: ConfigDict) -> int:
    """Evaluation samples per process and batch."""
    wanted = config.eval.batch_size or min(config.batch_size, 64 * config.processes)
    return math.ceil(wanted / config.processes)


def _schedule(config: ConfigDict, made: Plan) -> schedules.Schedule:
    warm = _one_unit(config, "warmup_", ("epochs", "steps"), required=False) or ("steps", 0)
    if config.schedule == "constant":
        return schedules.constant(made.lr)
    if config.schedule == "reference":
        warm_epochs = warm[1] if warm[0] == "epochs" else warm[1] * made.batch / made.examples
        # Of steps rounded up to hold the last epoch in full, made.epochs is more than was asked for.
        epochs = config.epochs or made.epochs
        return schedules.reference(made.lr, epochs, warm_epochs, made.epoch, config.warmup_lr, config.min_lr)
    warm_steps = min(in_steps(warm[1], warm[0], made.batch, made.examples), made.steps)
    return schedules.warmup_cosine(made.lr, made.steps, warm_steps, config.warmup_lr, config.min_lr)


def _pieces(local: int, micro_batch: int, unit: int) -> int:
    """The fewest equal pieces of at most `micro_batch` samples, each a multiple of `unit`."""
    for pieces in range(1, local + 1):
        if local % pieces == 0 and local // pieces <= max(micro_batch, unit) and local // pieces % unit == 0:
            return pieces
    return local // unit
