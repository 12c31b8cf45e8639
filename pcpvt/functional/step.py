"""The train step and the eval step as pure functions of state, parameters and batch.

`step(state, batch) -> (state, metrics)` depends on no device, rank, file or clock. What differs by device is passed in:
the kernels (inside `objective`), the sum over replicas, the gradient implementation and its compilation. The step
donates its input: it may reuse the memory of the state it is given.
"""

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from pcpvt.functional import metrics, optim, precision, schedules
from pcpvt.functional.metrics import Sums
from pcpvt.functional.objective import Batch
from pcpvt.functional.precision import FLOAT32, UNSCALED, DynamicScale, NoScale, Overflow, Policy
from pcpvt.functional.state import TrainState
from pcpvt.models.pcpvt import Params

Objective = Callable[[Params, Batch, Tensor], Tensor]  # (params, batch, factor) -> factor * sum of losses
# This replica's part of the sums over all: the flat gradient, the loss, and an overflow flag where there is one.
Addends = list[Tensor]
Inspect = Callable[[TrainState, Batch, Addends, Callable[[Batch], Addends]], None]


def autograd_value_and_grad(objective: Objective, trainable: Collection[str] | None = None):
    """Gradients by `torch.autograd.grad`: works on every device, and is the faster way in eager mode."""
    chosen = None if trainable is None else set(trainable)

    def value_and_grad(params: Params, *args) -> tuple[Tensor, Params]:
        leaves = {n: v.detach().requires_grad_() for n, v in params.items() if chosen is None or n in chosen}
        value = objective({**params, **leaves}, *args)
        # Parameters of a branch that drop path skips for every sample get no gradient: zeros take its place.
        grads = torch.autograd.grad(value, list(leaves.values()), materialize_grads=True)
        return value.detach(), dict(zip(leaves, grads, strict=True))

    return value_and_grad


def functional_value_and_grad(objective: Objective, trainable: Collection[str] | None = None):
    """Gradients by `torch.func.grad_and_value`: forward and backward as one traceable function."""
    chosen = None if trainable is None else set(trainable)

    def value_and_grad(params: Params, *args) -> tuple[Tensor, Params]:
        leaves = {n: v for n, v in params.items() if chosen is None or n in chosen}
        grads, value = torch.func.grad_and_value(lambda own: objective({**params, **own}, *args))(leaves)
        return value, grads

    return value_and_grad


def with_teacher(value_and_grad: Callable, teacher: Callable[[Batch], Tensor]) -> Callable:
    """A gradient implementation whose batches also hold the logits of a `teacher`, `[b, classes]`.

    They are computed once per micro-batch, outside of what is differentiated and compiled, so a teacher may be any
    function, also one that runs on the host.
    """

    def build(objective: Objective, trainable: Collection[str] | None = None) -> Callable:
        differentiate = value_and_grad(objective, trainable)

        def taught(params: Params, batch: Batch, factor: Tensor) -> tuple[Tensor, Params]:
            with torch.no_grad():
                logits = teacher(batch)
            return differentiate(params, {**batch, "teacher": logits}, factor)

        return taught

    return build


def make_step(
    objective: Objective,
    optimizer: optim.Optimizer,
    *,
    global_batch: int,
    grad_accum_steps: int = 1,
    policy: Policy = FLOAT32,
    scaler: DynamicScale | NoScale = UNSCALED,
    ema_decay: float = 0.0,
    trainable: Collection[str] | None = None,
    value_and_grad: Callable = autograd_value_and_grad,
    psum: Callable[[list[Tensor]], list[Tensor]] = lambda tensors: tensors,
    overflow: Overflow | None = None,
    fp32_norms: bool = False,
    inspect: Inspect | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Tensor]]]:
    """Builds the train step.

    Args:
        objective: `(params, batch, factor) -> factor * sum of per-sample losses`.
        optimizer: see `optim.chain`.
        global_batch: samples over all replicas; the loss is their mean, so results do not depend on the replicas.
        grad_accum_steps: micro-batches per step; exact, because no layer mixes samples. Must divide the batch.
        ema_decay: of the averaged weights, once enough steps are done (see `schedules.ema_decay`).
        trainable: names to differentiate, the first of the parameters (`optim.lay_out`); None means all.
        value_and_grad: the gradient implementation, compiled or not; called once, here.
        psum: sum over replicas of a list of tensors. Skipping is decided after it, so all replicas agree.
        fp32_norms: norms compute in float32, for devices whose kernel does not sum their gradients in float32.
        overflow: the overflow flag of devices that saturate; an overflow on any replica skips the step as a nan would.
        inspect: called as `inspect(state, batch, addends, work)` before the sum, when nothing of the state has changed;
            `work(batch)` gives the addends of any batch. It must not change its arguments, and may raise.

    Returns:
        The step. Its metrics are 0-d tensors on the device: `loss`, `grad_norm` (before clipping), `skipped`
        (consecutive skipped updates), all equal on every replica. A non-finite loss or gradient leaves
        parameters, moments and averages unchanged to the bit.
    """
    differentiate = value_and_grad(objective, trainable)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Tensor]]:
        scale = state.scale.get("factor")
        device = state.skipped.device
        one = torch.ones((), dtype=torch.promote_types(policy.params, torch.float32), device=device)
        divisor = one if scale is None else scale
        factor = divisor / global_batch
        compute = precision.cast(state.params, policy, fp32_norms)

        def gradient(part: Batch) -> tuple[Tensor, Tensor]:
            value, leaves = differentiate(compute, part, factor)
            return value, state.params.gather(leaves, policy.params)

        def work(batch: Batch) -> Addends:
            if overflow is not None:
                overflow.clear()
            first, *others = split(batch, grad_accum_steps)
            loss, total = gradient(first)
            for part in others:
                value, addend = gradient(part)
                loss, total = loss + value, total.add_(addend)
            return [total, loss, *([] if overflow is None else [overflow.seen()])]

        addends = work(batch)
        if inspect is not None:
            inspect(state, batch, addends, work)
        total, loss, *overflowed = psum(addends)
        grads = optim.gradients(total, divisor)
        good = torch.isfinite(grads.norm) & torch.isfinite(loss)
        for flag in overflowed:
            good = good & (flag == 0)
        skip = 1.0 - good.to(torch.float32)
        params, opt = optimizer.update(grads, state.opt, state.params, int(state.step), skip)
        if state.ema:
            optim.ema_update(state.ema, params, schedules.ema_decay(ema_decay, int(state.step)), skip)
        flag = skip.to(torch.int32)
        skipped = (state.skipped + flag) * flag
        new_state = TrainState(state.step + 1, params, state.ema, opt, scaler.update(state.scale, skip), skipped)
        return new_state, {"loss": loss / divisor, "grad_norm": grads.norm, "skipped": skipped}

    return step


def make_eval_step(
    predict: Callable[[Params, Tensor], Tensor], sums: Callable[[Tensor, Tensor, Tensor], Sums] = metrics.sums
) -> Callable[[Params, Batch], tuple[Tensor, Sums]]:
    """Build the eval step: `(params, batch) -> (logits [b, classes], sums)`; see `metrics.sums` for the sums.

    Args:
        predict: `(params, uint8 images [b, h, w, 3]) -> logits`, e.g. of `objective.make_predict`.
        sums: of the model's task (see `tasks`).
    """

    def eval_step(params: Params, batch: Batch) -> tuple[Tensor, Sums]:
        logits = predict(params, batch["image"])
        return logits, sums(logits, batch["label"], batch["valid"])

    return eval_step


def split(batch: Batch, parts: int) -> list[Batch]:
    """A batch cut into `parts` equal micro-batches, in order."""
    if parts == 1:
        return [batch]
    pieces = {name: value.chunk(parts) for name, value in batch.items()}
    return [{name: value[i] for name, value in pieces.items()} for i in range(parts)]
