"""Optimizers as pairs of functions, `(init, update)`, and gradient transforms that are chained before them.

Unlike optax's, an optimizer returns new parameters instead of their changes: the fused kernels, which write the
parameters in the same pass, are faster. Updates reuse the memory of the state and parameters that they are given. The
learning rate is a float computed on the host from the step.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pcpvt.functional.schedules import Schedule
from pcpvt.models.pcpvt import Params

Tree = dict[str, Any]


class Gradients(NamedTuple):
    """Gradients with a common divisor that is not applied yet: their value is `leaves / divisor`.

    Unscaling the loss and clipping then change two scalars only, and the fused update divides: one pass over the
    parameters instead of three.
    """

    leaves: Params
    divisor: Tensor  # float32 []
    norm: Tensor  # float32 [], Euclidean norm of leaves / divisor; inf or nan when any element is


Transform = Callable[[Gradients], Gradients]


class Optimizer(NamedTuple):
    """`update(gradients, state, params, step, skip) -> (params, state)`; a `skip` of 1 (float32 []) changes neither."""

    init: Callable[[Params], Tree]
    update: Callable[[Gradients, Tree, Params, int, Tensor], tuple[Params, Tree]]


class Group(NamedTuple):
    """Parameters that share their hyper-parameters."""

    names: tuple[str, ...]
    weight_decay: float
    lr_scale: float = 1.0


def gradients(leaves: Params, divisor: Tensor, params: Params) -> Gradients:
    """Gradients with their norm, in the memory layout of the parameters.

    The fused kernels ignore strides, and a sum over processes is returned contiguous.
    """
    leaves = {name: _with_layout_of(params[name], leaf) for name, leaf in leaves.items()}
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(leaves.values()))))
    return Gradients(leaves, divisor, norm / divisor)


def _with_layout_of(param: Tensor, leaf: Tensor) -> Tensor:
    return leaf if leaf.stride() == param.stride() else torch.empty_like(param, dtype=leaf.dtype).copy_(leaf)


def clip_by_global_norm(max_norm: float) -> Transform:
    """Scales all gradients by min(1, max_norm / (norm + 1e-6)), as `torch.nn.utils.clip_grad_norm_` does."""

    def clip(grads: Gradients) -> Gradients:
        excess = ((grads.norm + 1e-6) / max_norm).clamp(min=1.0)
        return Gradients(grads.leaves, grads.divisor * excess, grads.norm / excess)

    return clip


def no_decay(name: str, shape: torch.Size) -> bool:
    """Whether the reference exempts a parameter from weight decay: 1-d tensors, biases, all position encodings."""
    return len(shape) <= 1 or name.endswith(".bias") or name.startswith("pos_block.")


def groups(params: Params, weight_decay: float, lr_scale: Callable[[str], float] = lambda name: 1.0) -> list[Group]:
    """The parameters grouped by (weight decay, lr scale), in a stable order."""
    parts: dict[tuple[float, float], list[str]] = {}
    for name, value in params.items():
        decay = 0.0 if no_decay(name, value.shape) else weight_decay
        parts.setdefault((decay, lr_scale(name)), []).append(name)
    return [Group(tuple(names), decay, scale) for (decay, scale), names in parts.items()]


def adamw(
    schedule: Schedule, groups: list[Group], betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, *,
    honors_found_inf: bool = True,
) -> Optimizer:  # fmt: skip
    """AdamW (Loshchilov & Hutter 2019) with torch.optim.AdamW's arithmetic, one fused kernel call per group.

    State: `count` float32 [] (applied updates), `mu` and `nu` (first and second moments of the parameters in `groups`).

    Args:
        honors_found_inf: whether the device's fused kernel divides by grad_scale and skips on found_inf. If it ignores
            them, the host reads both numbers once per step and applies them, with bit-identical results.
    """

    def init(params: Params) -> Tree:
        trained = [name for group in groups for name in group.names]
        device = next(iter(params.values())).device
        return {
            "count": torch.zeros((), dtype=torch.float32, device=device),
            "mu": {name: torch.zeros_like(params[name]) for name in trained},
            "nu": {name: torch.zeros_like(params[name]) for name in trained},
        }

    def update(grads: Gradients, state: Tree, params: Params, step: int, skip: Tensor) -> tuple[Params, Tree]:
        lr, mu, nu, leaves = schedule(step), state["mu"], state["nu"], grads.leaves
        count = state["count"] + (1.0 - skip)
        grad_scale: Tensor | None = grads.divisor
        found_inf: Tensor | None = skip
        if not honors_found_inf:
            skipped, divisor = torch.stack([skip, grads.divisor.to(skip.dtype)]).tolist()
            if skipped:
                return params, state
            torch._foreach_div_(list(leaves.values()), divisor)
            grad_scale = found_inf = None
        elif grads.divisor.dtype == torch.float64:  # the kernel would divide by it in float32
            torch._foreach_div_(list(leaves.values()), [grads.divisor] * len(leaves))
            grad_scale = None
        for group in groups:
            names = group.names
            p, g, m, v = ([tensors[name] for name in names] for tensors in (params, leaves, mu, nu))
            torch._fused_adamw_(
                p, g, m, v, [], [count] * len(names),
                lr=lr * group.lr_scale, beta1=betas[0], beta2=betas[1], weight_decay=group.weight_decay, eps=eps,
                amsgrad=False, maximize=False, grad_scale=grad_scale, found_inf=found_inf,
            )  # fmt: skip
        return params, {"count": count, "mu": mu, "nu": nu}

    return Optimizer(init, update)


def chain(*links: Transform | Optimizer) -> Optimizer:
    """The optimizer, which comes last, with the transforms applied to its gradients in order."""
    transforms = [link for link in links if not isinstance(link, Optimizer)]
    (optimizer,) = (link for link in links if isinstance(link, Optimizer))
    assert optimizer is links[-1]

    def update(grads: Gradients, state: Tree, params: Params, step: int, skip: Tensor) -> tuple[Params, Tree]:
        for transform in transforms:
            grads = transform(grads)
        return optimizer.update(grads, state, params, step, skip)

    return Optimizer(optimizer.init, update)


def ema_update(ema: Params, params: Params, decay: float, skip: Tensor) -> Params:
    """ema <- decay * ema + (1 - decay) * params, in place; unchanged where `skip` is 1."""
    if ema:
        weight = (1.0 - decay) * (1.0 - skip)
        names = list(ema)
        weights = [weight.to(ema[n].dtype) for n in names]  # a list of tensors: `skip` is not copied to the host
        torch._foreach_lerp_([ema[n] for n in names], [params[n] for n in names], weights)
    return ema
