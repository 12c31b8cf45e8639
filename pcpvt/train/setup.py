"""Setup of a training run: data, model, plan, optimizer, step, and the state that the run starts from."""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pcpvt.config import stored
from pcpvt.config.plan import Plan, make_plan, short_run_notes
from pcpvt.data import augment, loader
from pcpvt.data.audited import AuditedBatches
from pcpvt.data.classes import labels_of
from pcpvt.data.sources import Dataset
from pcpvt.distributed import collectives
from pcpvt.errors import UserError
from pcpvt.evaluate import evaluator
from pcpvt.functional import mixing, muon, optim, precision, state, step
from pcpvt.functional.objective import Batch, make_objective
from pcpvt.models import pcpvt
from pcpvt.runtime import session as sessions
from pcpvt.runtime.console import Console, warn_once
from pcpvt.runtime.session import Session
from pcpvt.train import (
    audit,
    class_weights,
    distillation,
    parameters,
    preparation,
    resume,
    stragglers,
    utilisation,
)
from pcpvt.train.history import History

Step = Callable[[state.TrainState, Batch], tuple[state.TrainState, dict[str, Tensor]]]


class TrainSetup(NamedTuple):
    """What a training run uses from start to end; only the state and the history change."""

    session: Session
    console: Console
    split: evaluator.Split  # validation
    model: pcpvt.PCPVT
    plan: Plan
    batches: loader.TrainBatches
    train_loader: loader.Loader  # of the batches, from the first step on
    step: Step
    eval_step: Callable[[pcpvt.Params, Batch], evaluator.Scored]
    audit: audit.Audit
    stopwatch: stragglers.Stopwatch
    peak_flops: float | None  # of one device, where its data sheet is known
    meta: dict[str, Any]  # the same JSON in every checkpoint of the run
    resumed_from: Path | None
    notes: list[str]  # for the log
    began: float  # time.perf_counter()

    def mfu(self, images_per_sec: float, step: int) -> float | None:
        """Model FLOPs utilisation at a step's size, of all devices, from 0 to 1; None where the peak is not known."""
        if self.peak_flops is None:
            return None
        flops = utilisation.forward_flops(self.model, self.plan.sizes.at(step))
        return utilisation.mfu(images_per_sec, flops, self.peak_flops, self.session.world.size)


def prepare(session: Session) -> tuple[TrainSetup, state.TrainState, History]:
    """Open the data, build the model and the step, and create, load or resume the state.

    Raises:
        UserError: when the data, the config and the workdir's checkpoints do not fit each other.
    """
    config, console, began = session.config, Console(session.world.is_main), time.perf_counter()
    train_data, val_data = sessions.open_training_data(session)
    model = sessions.build_model(config, sessions.count_classes(config, train_data))
    plan = plan_run(session, model, len(train_data))
    classes = list(train_data.classes)

    short = short_run_notes(config, plan)
    resumed = resume.newest(session, console)
    notes = resume.check_compatible(session, resumed.meta, classes, plan.examples) if resumed else []
    first_step = resumed.meta["step"] if resumed else 0
    weights, said, warnings = class_weights.of_run(config.class_weights, train_data, model.num_classes)
    if resumed and "class_weights" in resumed.meta:  # earlier versions did not store them
        class_weights.check_same(config.class_weights, session.workdir, resumed.meta["class_weights"], weights)
    teacher = distillation.of_run(session, model, train_data)
    if resumed:
        distillation.check_same(session, resumed.meta, teacher)
    batches = dataclasses.replace(train_batches(session, model, train_data), sizes=plan.sizes)
    train_workers, eval_workers = sessions.training_workers(session, train_data, val_data)
    turns = audit.turns(session)
    audited = AuditedBatches(batches, turns)
    reader = sessions.open_loader(session, audited, range(first_step, plan.steps), train_workers)
    if first_step < plan.steps:
        reader.start()  # loader processes take seconds to start: they do so while the state is created

    if resumed is None:
        params, notes = parameters.init_params(session, model, classes)
    else:  # memory that `restore` fills
        params = {n: torch.empty(shape, dtype=session.policy.params) for n, shape in pcpvt.shapes(model).items()}
    groups = parameters.param_groups(session, params)
    opt = optimizer(session, plan, groups)
    start = init_state(session, params, groups, opt)
    if resumed is not None:
        start = resume.restore(resumed, start)
    resume.check_agreement(int(start.step))

    meta = {
        "config": stored.flat(config) | resume.origin(resumed),
        "model": config.model.name, "pad": config.model.pad, "classes": classes,
        "image_size": list(session.size), "examples": plan.examples, "class_weights": weights,
        **distillation.stored(teacher),
    }  # fmt: skip
    split = evaluator.open_split(session, val_data, plan.eval_batch, eval_workers)
    notes = [*notes, *said, *(teacher.notes if teacher else [])]
    for warning in warnings:
        warn_once(warning)
    auditor = audit.Audit(session, turns, batches)
    stopwatch = stragglers.Stopwatch(session)
    inspects = [preparation.of_sizes(session, plan.sizes, first_step)] if plan.sizes.following(first_step) else []
    inspects += [auditor.inspect] if turns.every else []
    hooks = {"inspect": preparation.together(inspects), "psum": stopwatch.psum(collectives.psum)}
    train = auditor.around(train_step(session, model, plan, opt, weights, teacher, **hooks))
    score = step.make_eval_step(session.predictor(model), session.task.sums)
    notes += [auditor.note()] if turns.every else []
    peak = utilisation.peak_flops(session.device.describe(), session.policy.compute)
    setup = TrainSetup(
        session, console, split, model, plan, batches, reader, train, score, auditor, stopwatch, peak, meta,
        resumed.path if resumed else None, [*short, *notes], began,
    )  # fmt: skip
    return setup, start, History.from_meta(resumed.meta) if resumed else History()


def elapsed(setup: TrainSetup, history: History) -> float:
    """Seconds of the run so far, over all its parts."""
    return history.clock.elapsed + time.perf_counter() - setup.began


def checkpoint_meta(setup: TrainSetup, history: History) -> dict[str, Any]:
    """The JSON of a checkpoint, without the step."""
    return {**setup.meta, **history.to_meta(elapsed(setup, history))}


def plan_run(session: Session, model: pcpvt.PCPVT, examples: int) -> Plan:
    """The plan of a run on this session's device, whose memory bounds the micro-batch."""
    micro_batch = session.device.micro_batch(session.size, session.policy.compute, model.branches // 2)
    return make_plan(
        session.config, examples=examples, num_classes=model.num_classes, micro_batch=micro_batch,
        operations=functools.partial(utilisation.forward_flops, model),
    )  # fmt: skip


def train_batches(session: Session, model: pcpvt.PCPVT, dataset: Dataset) -> loader.TrainBatches:
    """This process's training batches, by step; UserError for augmentations that the images' channels do not allow."""
    config, world, a = session.config, session.world, session.config.augment
    channels = config.model.in_chans
    for name in ("randaugment", "color_jitter") if channels not in (1, 3) else ():
        if a[name]:
            raise UserError(
                f"config.augment.{name}: {a[name]!r} is for grey or RGB and config.model.in_chans is {channels}: "
                f"use --config.augment.{name}={'' if name == 'randaugment' else 0}"
            )
    spec = augment.AugmentSpec(
        size=session.size, scale=tuple(a.scale), ratio=tuple(a.ratio), hflip=a.hflip, randaugment=a.randaugment,
        color_jitter=a.color_jitter, erase_prob=a.erase, crop_padding=a.crop_pad,
        by_size=a.by_size,
    )  # fmt: skip
    mix = None
    if (config.mixup or config.cutmix) and config.mix_prob:
        mix = mixing.MixSpec(config.mixup, config.cutmix, config.mix_prob, config.mix_switch, config.mix_mode)
    return loader.TrainBatches(
        dataset, spec, mix, pcpvt.drop_rates(model.spec, config.model.drop_path), seed=config.seed,
        batch=config.batch_size, rank=world.rank, world=world.size, repeats=a.repeats, on_error=config.data.on_error,
        reading=session.reading,
        labels=np.array(labels_of(dataset), np.int32) if config.data.sampler == "balanced" else None,
    )  # fmt: skip


def optimizer(session: Session, plan: Plan, groups: list[optim.Group]) -> optim.Optimizer:
    """Clipping and AdamW, or Muon and AdamW, as the config says."""
    config = session.config
    betas, skips = (config.beta1, config.beta2), session.device.fused_adamw_honors_found_inf
    others, matrices = [g for g in groups if not g.matrix], [g for g in groups if g.matrix]
    found = optim.adamw(plan.schedule, others, betas, config.eps, honors_found_inf=skips)
    if matrices:
        # float16 is too narrow for the iterations.
        dtype = torch.bfloat16 if session.policy.compute == torch.bfloat16 else torch.float32
        found = optim.together(muon.muon(plan.schedule, matrices, dtype), found)
    return optim.chain(optim.clip_by_global_norm(config.clip_norm), found) if config.clip_norm else optim.chain(found)


def train_step(
    session: Session, model: pcpvt.PCPVT, plan: Plan, opt: optim.Optimizer, weights: Sequence[float] | None = None,
    teacher: distillation.Teacher | None = None, **hooks: Any,
) -> Step:  # fmt: skip
    """The pure step with this device's kernels, compilation and sums put in.

    Args:
        weights: of the classes.
        hooks: further arguments of `make_step`.
    """
    config, policy = session.config, session.policy
    per_class = None if weights is None else torch.tensor(weights, dtype=policy.output).to(session.device.torch)
    objective = make_objective(
        model, smoothing=config.label_smoothing, class_weights=per_class, policy=policy, kernels=session.kernels,
        distill=teacher.how if teacher else None,
    )  # fmt: skip
    value_and_grad = session.value_and_grad()
    if teacher:
        value_and_grad = step.with_teacher(value_and_grad, teacher.logits)
    names = list(pcpvt.shapes(model))
    frozen = parameters.matched(config, "frozen", names)
    trained = [name for name in names if name not in frozen] if frozen else None  # None: all
    return step.make_step(
        objective, opt, global_batch=plan.batch, grad_accum_steps=plan.grad_accum_steps, policy=policy,
        scaler=precision.loss_scale(policy), ema_decay=config.ema, trainable=trained,
        value_and_grad=value_and_grad, overflow=session.device.overflow(policy.compute),
        fp32_norms=session.device.fp32_norms, **{"psum": collectives.psum, **hooks},
    )  # fmt: skip


def init_state(
    session: Session, params: pcpvt.Params, groups: list[optim.Group], opt: optim.Optimizer
) -> state.TrainState:
    """The state before the first step, on the device."""
    device = session.device.torch
    laid_out = optim.lay_out(params, groups).to(device)
    scale = precision.loss_scale(session.policy).init(device)
    return state.create(laid_out, opt.init(laid_out), scale, ema=session.config.ema > 0, device=device)
