"""Muon: momentum, orthogonalised by Newton-Schulz iterations, for the matrices of the blocks; AdamW has the rest.

Source: K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024). The factor of the learning
rate, with which AdamW's rate and weight decay can be kept, is from J. Liu et al., "Muon is scalable for LLM training"
(2025).
"""

import math

import torch
from torch import Tensor

from pcpvt.functional.flat import Flat, stack
from pcpvt.functional.optim import Gradients, Group, Optimizer, Tree
from pcpvt.functional.schedules import Schedule

# Of the polynomial a x + b x^3 + c x^5, which drives singular values from (0, 1] to about 1 in few iterations.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
MOMENTUM = 0.95
RMS = 0.2  # root mean square of an update's elements, which is about AdamW's


def is_matrix(name: str, shape: torch.Size) -> bool:
    """Whether a parameter is Muon's: the linear maps inside blocks, which do not include the head."""
    return name.startswith("blocks.") and len(shape) == 2


def muon(schedule: Schedule, groups: list[Group], dtype: torch.dtype = torch.bfloat16) -> Optimizer:
    """Muon with Nesterov momentum and torch.optim.Muon's arithmetic (`adjust_lr_fn="match_rms_adamw"`).

    Matrices of one shape are updated together, as one tensor of three dimensions.

    State: `momentum` (of the parameters in `groups`).

    Args:
        groups: of matrices (`Group.matrix`) that follow each other.
        dtype: of the iterations; torch's is always bfloat16.
    """
    names = [name for group in groups for name in group.names]

    def init(params: Flat) -> Tree:
        return {"momentum": params.zeros(names)}

    def update(grads: Gradients, state: Tree, params: Flat, step: int, skip: Tensor) -> tuple[Flat, Tree]:
        lr, momentum = schedule(step), state["momentum"]
        applies = 1.0 - skip.to(params.flat.dtype)
        for group in groups:
            part, shape = params.span(group.names), group.matrix
            value, mean = stack(params.flat[part], shape), stack(momentum.flat[momentum.span(group.names)], shape)
            grad = stack(grads.flat[part], shape) / grads.divisor
            grad = torch.where(skip > 0, mean, grad)  # which changes no mean, and is finite
            mean.lerp_(grad, 1 - MOMENTUM)
            direction = orthogonal(grad.lerp(mean, MOMENTUM), dtype).to(value.dtype)
            rate = lr * group.lr_scale * applies
            value.mul_(1.0 - rate * group.weight_decay)
            value.sub_(direction * (rate * RMS * math.sqrt(max(shape))))
        return params, {"momentum": momentum}

    return Optimizer(init, update)


def orthogonal(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """`[k, m, n]` with all singular values near 1 (0.7 to 1.2), and the same singular vectors."""
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.to(dtype)
    x = x.mT if tall else x
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
