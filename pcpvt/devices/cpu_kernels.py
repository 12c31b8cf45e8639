"""Linear maps on the CPU whose bias, and GELU, are added inside oneDNN's matrix product.

`F.linear` first writes the bias into the whole output and then adds the product to it: one more pass over memory, as
costly as the product itself for the narrow layers of stages 1 and 2. The results are the same bits, because both are
oneDNN's. Source of the operator: the one that PyTorch's own compiler emits for CPUs.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor


@functools.lru_cache
def usable(dtype: torch.dtype) -> bool:
    """Whether this build and processor have the operator for this dtype; float32 products are not oneDNN's."""
    if dtype != torch.bfloat16 or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    x = torch.ones(2, 8, 16, dtype=dtype)
    weight, bias = torch.ones(4, 16, dtype=dtype), torch.ones(4, dtype=dtype)
    try:
        return torch.equal(_product(x, weight, bias), F.linear(x, weight, bias))
    except RuntimeError:  # a processor or a build without it
        return False


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`F.linear`: `[..., in], [out, in], [out] -> [..., out]`."""
    return _Linear.apply(x, weight, bias) if torch.is_grad_enabled() else _product(x, weight, bias)


def gelu_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Exact GELU of `F.linear`; its input is needed for a gradient, so only inference skips writing it."""
    if torch.is_grad_enabled():
        return F.gelu(_Linear.apply(x, weight, bias))
    return _product(x, weight, bias, "gelu", "none")


def _product(x: Tensor, weight: Tensor, bias: Tensor, then: str = "none", how: str = "") -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight.contiguous(), bias, then, [], how)


class _Linear(torch.autograd.Function):
    """The product with its bias; the gradients are those of `F.linear`, operator by operator."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        return (
            (rows @ weight).view(x.shape) if need_x else None,
            rows.mT @ x.reshape(-1, x.shape[-1]) if need_weight else None,
            rows.sum(0) if need_bias else None,
        )
