"""Optimizers as pairs of functions, `(init, update)`, and gradient transforms that are chained before them.

Unlike optax's, an optimizer returns new parameters instead of their changes: the fused kernels, which write the
parameters in the same pass, are faster. Updates reuse the memory of the state and parameters that they are given. The
learning rate is a float computed on the host from the step.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pcpvt.functional.flat import Flat, norm, pack
from pcpvt.functional.precision import is_norm
from pcpvt.functional.schedules import Schedule
from pcpvt.models.pcpvt import Params

Tree = dict[str, Any]


class Gradients(NamedTuple):
    """Gradients with a common divisor that is not applied yet: their value is `flat / divisor`.

    Unscaling the loss and clipping then change two scalars only, and the fused update divides: one pass over the
    parameters instead of three.
    """

    flat: Tensor  # [n], in the order of the parameters that are trained
    divisor: Tensor  # float32 []
    norm: Tensor  # float32 [], Euclidean norm of flat / divisor; inf or nan when any element is


Transform = Callable[[Gradients], Gradients]


class Optimizer(NamedTuple):
    """`update(gradients, state, params, step, skip) -> (params, state)`; a `skip` of 1 (float32 []) changes neither."""

    init: Callable[[Flat], Tree]
    update: Callable[[Gradients, Tree, Flat, int, Tensor], tuple[Flat, Tree]]


class Group(NamedTuple):
    """Parameters that share their hyper-parameters."""

    names: tuple[str, ...]
    weight_decay: float
    lr_scale: float = 1.0
    matrix: tuple[int, ...] = ()  # their common shape, of matrices that are not AdamW's (see `muon`)


def gradients(flat: Tensor, divisor: Tensor) -> Gradients:
    """Gradients with their norm."""
    return Gradients(flat, divisor, norm(flat) / divisor)


def clip_by_global_norm(max_norm: float) -> Transform:
    """Scales all gradients by min(1, max_norm / (norm + 1e-6)), as `torch.nn.utils.clip_grad_norm_` does."""

    def clip(grads: Gradients) -> Gradients:
        excess = ((grads.norm + 1e-6) / max_norm).clamp(min=1.0)
        return Gradients(grads.flat, grads.divisor * excess, grads.norm / excess)

    return clip


def no_decay(name: str, shape: torch.Size) -> bool:
    """Whether the reference exempts a parameter from weight decay: 1-d tensors, biases, all position encodings."""
    return len(shape) <= 1 or name.endswith(".bias") or name.startswith("pos_block.")


def groups(
    params: Params, weight_decay: float, lr_scale: Callable[[str], float] = lambda name: 1.0,
    is_matrix: Callable[[str, torch.Size], bool] = lambda name, shape: False,
) -> list[Group]:  # fmt: skip
    """The parameters grouped by (shape of matrices, weight decay, lr scale), in a stable order.

    First matrices that are not AdamW's, then what decays, last norms, because they may have a compute dtype of their
    own (`precision.cast`).
    """
    parts: dict[tuple[tuple[int, ...], bool, bool, float], list[str]] = {}
    for name, value in params.items():
        matrix = tuple(value.shape) if is_matrix(name, value.shape) else ()
        parts.setdefault((matrix, is_norm(name), no_decay(name, value.shape), lr_scale(name)), []).append(name)
    ordered = sorted(parts.items(), key=lambda part: (not part[0][0], *part[0][1:3]))
    return [
        Group(tuple(names), 0.0 if bare else weight_decay, scale, matrix) for (matrix, _, bare, scale), names in ordered
    ]


def lay_out(params: Params, groups: Sequence[Group]) -> Flat:
    """The parameters in one flat tensor, group by group, and then those in no group, which are not trained."""
    return pack(params, [name for group in groups for name in group.names])


def adamw(
    schedule: Schedule, groups: list[Group], betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, *,
    honors_found_inf: bool = True,
) -> Optimizer:  # fmt: skip
    """AdamW (Loshchilov & Hutter 2019) with torch.optim.AdamW's arithmetic, one fused kernel call per group.

    State: `count` float32 [] (applied updates), `mu` and `nu` (first and second moments of the parameters in `groups`).

    Args:
        groups: of parameters that follow each other.
        honors_found_inf: whether the device's fused kernel divides by grad_scale and skips on found_inf. If it ignores
            them, the host reads both numbers once per step and applies them, with bit-identical results.
    """

    def init(params: Flat) -> Tree:
        trained = [name for group in groups for name in group.names]
        count = torch.zeros((), dtype=torch.float32, device=params.flat.device)
        return {"count": count, "mu": params.zeros(trained), "nu": params.zeros(trained)}

    def update(grads: Gradients, state: Tree, params: Flat, step: int, skip: Tensor) -> tuple[Flat, Tree]:
        lr, mu, nu = schedule(step), state["mu"], state["nu"]
        count = state["count"] + (1.0 - skip)
        grad_scale: Tensor | None = grads.divisor
        found_inf: Tensor | None = skip
        if not honors_found_inf:
            skipped, divisor = torch.stack([skip, grads.divisor.to(skip.dtype)]).tolist()
            if skipped:
                return params, state
            grads.flat.div_(divisor)
            grad_scale = found_inf = None
        elif grads.divisor.dtype == torch.float64:  # the kernel would divide by it in float32
            grads.flat.div_(grads.divisor)
            grad_scale = None
        for group in groups:
            part, own = params.span(group.names), mu.span(group.names)
            torch._fused_adamw_(
                [params.flat[part]], [grads.flat[part]], [mu.flat[own]], [nu.flat[own]], [], [count],
                lr=lr * group.lr_scale, beta1=betas[0], beta2=betas[1], weight_decay=group.weight_decay, eps=eps,
                amsgrad=False, maximize=False, grad_scale=grad_scale, found_inf=found_inf,
            )  # fmt: skip
        return params, {"count": count, "mu": mu, "nu": nu}

    return Optimizer(init, update)


def together(*optimizers: Optimizer) -> Optimizer:
    """Optimizers of different parameters, one after the other; their states have different keys.

    The last one may change the gradients that it is given.
    """

    def init(params: Flat) -> Tree:
        return {key: value for optimizer in optimizers for key, value in optimizer.init(params).items()}

    def update(grads: Gradients, state: Tree, params: Flat, step: int, skip: Tensor) -> tuple[Flat, Tree]:
        for optimizer in optimizers:
            params, own = optimizer.update(grads, state, params, step, skip)
            state = state | own
        return params, state

    return Optimizer(init, update)


def chain(*links: Transform | Optimizer) -> Optimizer:
    """The optimizer, which comes last, with the transforms applied to its gradients in order."""
    transforms = [link for link in links if not isinstance(link, Optimizer)]
    (optimizer,) = (link for link in links if isinstance(link, Optimizer))
    assert optimizer is links[-1]

    def update(grads: Gradients, state: Tree, params: Flat, step: int, skip: Tensor) -> tuple[Flat, Tree]:
        for transform in transforms:
            grads = transform(grads)
        return optimizer.update(grads, state, params, step, skip)

    return Optimizer(optimizer.init, update)


def ema_update(ema: Flat, params: Flat, decay: float, skip: Tensor) -> None:
    """ema <- decay * ema + (1 - decay) * params, in place; unchanged where `skip` is 1."""
    weight = (1.0 - decay) * (1.0 - skip)  # a tensor: `skip` is not copied to the host
    ema.flat.lerp_(params.flat, weight.to(ema.flat.dtype))
