"""The CPU's own kernels: linear maps by oneDNN, with bias and GELU inside; drop path that skips work; norms.

`F.linear` in bfloat16 first writes the bias into the whole output and then adds the product to it: one more pass over
memory, as costly as the product itself for the narrow layers of stages 1 and 2. In float32 it is MKL's, which on
processors of other vendors keeps to AVX2: oneDNN's product is twice as fast on AVX-512 (measured on Zen 4: 400 against
190 GFLOP/s). Source of the operator: the one that PyTorch's own compiler emits for CPUs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from pcpvt.functional.precision import to_patch_layout
from pcpvt.models.layers import attend_plain, norm_plain

_SKIPS = 256


@functools.lru_cache
def usable(dtype: torch.dtype) -> bool:
    """Whether this build and processor have the operator for this dtype."""
    if dtype not in (torch.bfloat16, torch.float32) or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    x = torch.ones(2, 8, 16, dtype=dtype)
    weight, bias = torch.ones(4, 16, dtype=dtype), torch.ones(4, dtype=dtype)
    try:
        return torch.equal(_product(x, weight, bias), F.linear(x, weight, bias))
    except RuntimeError:  # a processor or a build without it
        return False


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`layers.attend_plain`, for many queries and few keys: `[b, n, t, d], [b, n, k, d], [b, n, k, d] -> [b, n, t, d]`.

    The scores are kept keys first, so that the softmax runs down columns, all of a register's lanes at once: over rows
    of the 49 keys of 224 px it takes twice as long as over rows of 64. Longer rows fill the registers by themselves.
    Scaling the keys instead of the queries touches less.
    """
    if k.shape[-2] >= 64 or q.shape[-2] < 4 * k.shape[-2]:
        return attend_plain(q, k, v)
    scores = (k * k.shape[-1] ** -0.5) @ q.mT
    return scores.softmax(-2).mT @ v


def to_train_layout(params: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parameters, patch projections lying as their linear map reads them: a step of 64 px takes 3.5 % less."""
    return {name: to_patch_layout(value) for name, value in params.items()}


def prepack(params: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parameters with the weights of linear maps as oneDNN reads them: `linear` then does it no more each time."""
    return {n: torch.ops.mkldnn._reorder_linear_weight(v) if v.ndim == 2 else v for n, v in params.items()}


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`F.linear`: `[..., in], [out, in], [out] -> [..., out]`."""
    return _Linear.apply(x, weight, bias) if torch.is_grad_enabled() else _product(x, weight, bias)


def gelu_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Exact GELU of `F.linear`; its input is needed for a gradient, so only inference skips writing it."""
    if torch.is_grad_enabled():
        return F.gelu(_Linear.apply(x, weight, bias))
    return _product(x, weight, bias, "gelu", "none")


def norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`layers.norm_plain`; without a gradient PyTorch's kernel takes 16-bit `x` beside float32 weights as they are.

    4 % of an evaluation. The backward of that kernel sums rows in 16 bits: stage 1's bias gradient would be 34 % off.
    """
    if torch.is_grad_enabled() or weight.dtype != torch.float32:
        return norm_plain(x, weight, bias, eps)
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def residual(x: Tensor, branch: Callable[[Tensor], Tensor], drop_path_scale: Tensor) -> Tensor:
    """`layers.residual_plain`, with the branch computed for the samples that keep it: the same function, less work.

    The draws lie on the host, so looking at them waits for nothing. Some dropped samples are computed all the same
    (and then count 0): sample counts are multiples of an eighth of the batch, because oneDNN prepares, and keeps, code
    for every shape that it meets. Below `_SKIPS` tokens a product waits for its weights, not for its rows.
    """
    factor = drop_path_scale.to(x.dtype)[:, None, None, None]
    step = max(1, len(x) // 8)
    count = -(-int(drop_path_scale.count_nonzero()) // step) * step
    if count >= len(x) or x[..., 0].numel() < _SKIPS:
        return torch.addcmul(x, branch(x), factor)
    if count == 0:
        return x
    kept = (drop_path_scale != 0).to(torch.uint8).argsort(descending=True, stable=True)[:count].sort().values
    return x.index_add(0, kept, branch(x.index_select(0, kept)) * factor.index_select(0, kept))


def _product(x: Tensor, weight: Tensor, bias: Tensor, then: str = "none", how: str = "") -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(
        x.contiguous(), weight if weight.is_mkldnn else weight.contiguous(), bias, then, [], how
    )


class _Linear(torch.autograd.Function):
    """The product with its bias, and the gradients of both."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        rows, source = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        if grad.dtype == torch.float32:
            to_x, to_weight = _gradients(rows, source, weight, (need_x, need_weight))
        else:
            to_x = rows @ weight if need_x else None
            to_weight = rows.mT @ source if need_weight else None
        return to_x if to_x is None else to_x.view(x.shape), to_weight, rows.sum(0) if need_bias else None


def _gradients(grad: Tensor, x: Tensor, weight: Tensor, need: tuple[bool, bool]) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of `x @ weight.mT` in both, as those of a 1x1 convolution over rows: oneDNN's, without a copy."""
    # In two steps: the strides of a side of length 1 tell the kernel that channels come last.
    pixels, source = (rearrange(t[None, :, None], "b r w c -> b c r w") for t in (grad, x))
    to_x, to_weight, _ = torch.ops.aten.convolution_backward(
        pixels, source, weight[:, :, None, None], None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [*need, False]
    )
    return (
        rearrange(to_x, "1 c r 1 -> r c") if need[0] else None,
        to_weight[:, :, 0, 0] if need[1] else None,
    )
