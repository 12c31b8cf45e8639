"""CPU kernels: linear layers by oneDNN with fused bias and GELU, drop path that skips work, attention, LayerNorm.

`F.linear` in bfloat16 first writes the bias into the whole output and then adds the product to it: one more pass over
memory, as costly as the product itself for the narrow layers of stages 1 and 2. In float32 it uses MKL, which uses only
AVX2 on processors of other vendors: oneDNN's product is twice as fast on AVX-512 (measured on Zen 4: 400 against
190 GFLOP/s). The operator, `mkldnn._linear_pointwise`, is the one that PyTorch's own compiler emits for CPUs.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from pcpvt.models.layers import attend_plain, flatten_kernel, norm_plain

_MIN_TOKENS_TO_SKIP = 256  # with fewer, a product waits for its weights, so fewer rows save nothing


@functools.lru_cache
def usable(dtype: torch.dtype) -> bool:
    """Whether this build of PyTorch and this processor support the oneDNN operator in this dtype."""
    if dtype not in (torch.bfloat16, torch.float32) or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    x = torch.ones(2, 8, 16, dtype=dtype)
    weight, bias = torch.ones(4, 16, dtype=dtype), torch.ones(4, dtype=dtype)
    try:
        return torch.equal(_product(x, weight, bias), F.linear(x, weight, bias))
    except RuntimeError:  # not supported
        return False


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`layers.attend_plain`, for many queries and few keys: `[b, n, t, d], [b, n, k, d], [b, n, k, d] -> [b, n, t, d]`.

    The scores are stored transposed, `[b, n, k, t]`, so that the softmax over keys vectorizes over queries: along rows
    of 49 keys (224 px) it takes twice as long as along rows of 64. Rows of 64 keys and more vectorize well as they are.
    The keys are scaled instead of the queries because there are fewer.
    """
    if k.shape[-2] >= 64 or q.shape[-2] < 4 * k.shape[-2]:
        return attend_plain(q, k, v)
    scores = (k * k.shape[-1] ** -0.5) @ q.mT
    return scores.softmax(-2).mT @ v


def prepack(params: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parameters, with the weights of `linear` in oneDNN's format: reordered once instead of in every call.

    Those of patches too, a fifth of S's weights, which are also flattened only once.
    """

    def packed(name: str, value: Tensor) -> Tensor:
        if value.ndim == 4 and not name.startswith("pos_block."):  # the depthwise convolutions
            value = flatten_kernel(value)
        return torch.ops.mkldnn._reorder_linear_weight(value) if value.ndim == 2 else value

    return {name: packed(name, value) for name, value in params.items()}


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`F.linear`: `[..., in], [out, in], [out] -> [..., out]`."""
    return _Linear.apply(x, weight, bias) if torch.is_grad_enabled() else _product(x, weight, bias)


def linear_add(x: Tensor, weight: Tensor, bias: Tensor, onto: Tensor) -> Tensor:
    """`layers.linear_add_plain`; fused only without gradients, because the fused operator has none."""
    if torch.is_grad_enabled():
        return onto + _Linear.apply(x, weight, bias)
    x, weight = _ready(x, weight)
    return torch.ops.mkldnn._linear_pointwise.binary(x, onto.contiguous(), weight, bias, "add")


def gelu_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Exact GELU of `F.linear`; fused only without gradients, because the backward needs the input of GELU."""
    if torch.is_grad_enabled():
        return F.gelu(_Linear.apply(x, weight, bias))
    return _product(x, weight, bias, "gelu", "none")


def norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`layers.norm_plain`; without gradients PyTorch's kernel takes 16-bit `x` and float32 weights without a cast.

    This saves 4 % of an evaluation. The backward of that kernel sums rows in 16 bits, which would make stage 1's bias
    gradient 34 % wrong, so it is not used with gradients.
    """
    if torch.is_grad_enabled() or weight.dtype != torch.float32:
        return norm_plain(x, weight, bias, eps)
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def residual(x: Tensor, branch: Callable[[Tensor], Tensor], drop_path_scale: Tensor) -> Tensor:
    """`layers.residual_plain`, with the branch computed only for the samples that keep it.

    The number of computed samples is rounded up to a multiple of an eighth of the batch, because oneDNN generates and
    caches code for every shape; the dropped samples among them are multiplied by 0. `drop_path_scale` is on the host,
    so reading its values does not wait for a device.
    """
    factor = drop_path_scale[:, None, None, None]
    step = max(1, len(x) // 8)
    count = -(-int(drop_path_scale.count_nonzero()) // step) * step
    if count >= len(x) or x[..., 0].numel() < _MIN_TOKENS_TO_SKIP:
        return torch.addcmul(x, branch(x), factor)
    if count == 0:
        return x
    kept = (drop_path_scale != 0).to(torch.uint8).argsort(descending=True, stable=True)[:count].sort().values
    return x.index_add(0, kept, branch(x.index_select(0, kept)) * factor.index_select(0, kept))


def _product(x: Tensor, weight: Tensor, bias: Tensor, activation: str = "none", variant: str = "") -> Tensor:
    x, weight = _ready(x, weight)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], variant)


def _ready(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return x.contiguous(), weight if weight.is_mkldnn else weight.contiguous()


class _Linear(torch.autograd.Function):
    """`_product` with its gradients."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        grad_rows, x_rows = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        if grad.dtype == torch.float32:
            grad_x, grad_weight = _float32_gradients(grad_rows, x_rows, weight, (need_x, need_weight))
        else:
            grad_x = grad_rows @ weight if need_x else None
            grad_weight = grad_rows.mT @ x_rows if need_weight else None
        return grad_x if grad_x is None else grad_x.view(x.shape), grad_weight, grad_rows.sum(0) if need_bias else None


def _float32_gradients(grad: Tensor, x: Tensor, weight: Tensor, needed: tuple[bool, bool]) -> tuple[Tensor | None, ...]:
    """Gradients of `x @ weight.mT` with respect to x and weight, by oneDNN as a 1x1 convolution, without a copy."""
    # Indexing and rearranging are separate steps so that the strides of the axes of length 1 mark channels_last.
    grad_image, x_image = (rearrange(t[None, :, None], "b r w c -> b c r w") for t in (grad, x))
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad_image, x_image, weight[:, :, None, None], None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [*needed, False]
    )
    return rearrange(grad_x, "1 c r 1 -> r c") if needed[0] else None, grad_weight[:, :, 0, 0] if needed[1] else None
