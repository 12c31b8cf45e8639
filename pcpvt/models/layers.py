"""The layers of Twins-PCPVT as pure modules: tokens stay `b h w c` throughout, einops patterns give the shapes.

A module holds names and shapes only. There are no buffers, no train/eval switch and no random numbers: whatever a
layer needs beyond its parameters (drop-path factors, the device's kernels) is passed as an argument. Parameter names
and shapes are those of the Twins reference checkpoints, so a convolution whose kernel equals its stride keeps the
convolution's weight `[out, in, k, k]` although it is computed as a linear map over patches.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

Params = dict[str, Tensor]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Capture = Callable[[str, Tensor], None]
Linear = Callable[[Tensor, Tensor, Tensor], Tensor]
LinearAdd = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Norm = Callable[[Tensor, Tensor, Tensor, float], Tensor]
ParamsFn = Callable[[Params], Params]
Residual = Callable[[Tensor, Callable[[Tensor], Tensor], Tensor], Tensor]
BlockFn = Callable[[nn.Module, Tensor, "Kernels", Tensor | None], Tensor]


def attend_plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, written out.

    Args:
        q: `[b, heads, tokens, d]`.
        k, v: `[b, heads, keys, d]`.

    Returns:
        `[b, heads, tokens, d]`. The reference for the devices' attention kernels; exact in float64.
    """
    scores = (q * q.shape[-1] ** -0.5) @ k.mT
    return scores.softmax(-1) @ v


def linear_add_plain(x: Tensor, weight: Tensor, bias: Tensor, onto: Tensor) -> Tensor:
    """A sum with a linear map: `[..., in], [out, in], [out], [..., out] -> [..., out]`."""
    return onto + F.linear(x, weight, bias)


def gelu_linear_plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Exact GELU of a linear map: `[..., in], [out, in], [out] -> [..., out]`."""
    return F.gelu(F.linear(x, weight, bias))


def norm_plain(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm of `[..., c]` over its last axis, computed in the dtype of the weights `[c]`; returns x's dtype."""
    return F.layer_norm(x.to(weight.dtype), weight.shape, weight, bias, eps).to(x.dtype)


def residual_plain(x: Tensor, branch: Callable[[Tensor], Tensor], drop_path_scale: Tensor) -> Tensor:
    """x + drop_path_scale * branch(x): a residual branch under drop path.

    Args:
        x: `[b, h, w, c]`.
        branch: keeps the shape and treats each sample independently.
        drop_path_scale: `[b]`, of x's dtype, 0 where the branch is dropped and 1/keep_prob elsewhere.
    """
    return torch.addcmul(x, branch(x), rearrange(drop_path_scale, "b -> b 1 1 1"))


class Kernels(NamedTuple):
    """Functions that a device may replace by faster ones; tests compare each with the plain version given here."""

    attend: Attend = attend_plain
    linear: Linear = F.linear
    linear_add: LinearAdd = linear_add_plain  # the end of a residual branch, without drop path
    gelu_linear: Linear = gelu_linear_plain
    norm: Norm = norm_plain
    residual: Residual = residual_plain
    block_fn: BlockFn = lambda block, *args: block(*args)  # calls one block of a stage; may be compiled
    prepack: ParamsFn = lambda params: params  # parameters for inference, in the form the kernels read fastest


PLAIN = Kernels()


class PatchLinear(nn.Module):
    """A convolution with kernel = stride = `patch`, computed as one linear map over patches of an NHWC tensor.

    `[b, h, w, c_in] -> [b, ceil(h/patch), ceil(w/patch), c_out]`. A side that `patch` does not divide is padded with
    zeros at the bottom or right, so every output token covers at least one real input position: padding adds no token,
    nothing is dropped, and attention and the mean over tokens need no mask. With divisible sides nothing is padded and
    the result is that of the convolution.

    The weight may be given as the matrix that `flatten_kernel` makes of it, once for many calls.
    """

    def __init__(self, c_in: int, c_out: int, patch: int):
        super().__init__()
        self.patch = patch
        self.weight = nn.Parameter(torch.empty(c_out, c_in, patch, patch))
        self.bias = nn.Parameter(torch.empty(c_out))

    def forward(self, x: Tensor, kernels: Kernels = PLAIN) -> Tensor:
        pad_h, pad_w = -x.shape[1] % self.patch, -x.shape[2] % self.patch
        if pad_h or pad_w:
            x = F.pad(x, (0, 0, 0, pad_w, 0, pad_h))
        x = rearrange(x, "b (h p) (w q) c -> b h w (p q c)", p=self.patch, q=self.patch)
        return kernels.linear(x, flatten_kernel(self.weight), self.bias)


def flatten_kernel(weight: Tensor) -> Tensor:
    """PatchLinear's weight as a matrix, `[o, c, p, p] -> [o, p * p * c]`; what is a matrix already stays as it is."""
    return weight if weight.ndim == 2 else rearrange(weight, "o c p q -> o (p q c)")


class LayerNorm(nn.LayerNorm):
    """LayerNorm computed in the dtype of its weights, e.g. float32 for bfloat16 input; the output keeps x's dtype."""

    def forward(self, x: Tensor, kernels: Kernels = PLAIN) -> Tensor:
        return kernels.norm(x, self.weight, self.bias, self.eps)


class PatchEmbed(nn.Module):
    """Strided patch projection and LayerNorm (eps 1e-5, PyTorch's default, as in the reference)."""

    def __init__(self, c_in: int, c_out: int, patch: int):
        super().__init__()
        self.proj = PatchLinear(c_in, c_out, patch)
        self.norm = LayerNorm(c_out, eps=1e-5)

    def forward(self, x: Tensor, kernels: Kernels = PLAIN) -> Tensor:
        return self.norm(self.proj(x, kernels), kernels)


class Attention(nn.Module):
    """Global attention with keys and values at 1 / `reduction` of the resolution (PVT, Wang et al. 2021)."""

    def __init__(self, dim: int, heads: int, reduction: int):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.reduces = reduction > 1
        if self.reduces:
            self.sr = PatchLinear(dim, dim, reduction)
            self.norm = LayerNorm(dim, eps=1e-5)  # PyTorch's default, unlike the 1e-6 of the blocks

    def forward(self, x: Tensor, kernels: Kernels = PLAIN, onto: Tensor | None = None) -> Tensor:
        """`[b, h, w, c]`; the sum with `onto`, if that is given."""
        reduced = self.norm(self.sr(x, kernels), kernels) if self.reduces else x
        q = kernels.linear(x, self.q.weight, self.q.bias)
        kv = kernels.linear(reduced, self.kv.weight, self.kv.bias)
        q = rearrange(q, "b h w (n d) -> b n (h w) d", n=self.heads)
        k, v = (rearrange(half, "b h w (n d) -> b n (h w) d", n=self.heads) for half in kv.chunk(2, -1))
        out = rearrange(kernels.attend(q, k, v), "b n (h w) d -> b h w (n d)", h=x.shape[1])
        return _linear(kernels, out, self.proj, onto)


class Mlp(nn.Module):
    """Linear, exact GELU, linear."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, kernels: Kernels = PLAIN, onto: Tensor | None = None) -> Tensor:
        """`[b, h, w, c]`; the sum with `onto`, if that is given."""
        hidden = kernels.gelu_linear(x, self.fc1.weight, self.fc1.bias)
        return _linear(kernels, hidden, self.fc2, onto)


def _linear(kernels: Kernels, x: Tensor, layer: nn.Linear, onto: Tensor | None) -> Tensor:
    if onto is None:
        return kernels.linear(x, layer.weight, layer.bias)
    return kernels.linear_add(x, layer.weight, layer.bias, onto)


class Block(nn.Module):
    """Pre-norm transformer block: attention, then the MLP, each a residual branch under drop path."""

    def __init__(self, dim: int, heads: int, mlp_ratio: int, reduction: int):
        super().__init__()
        self.norm1 = LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads, reduction)
        self.norm2 = LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, mlp_ratio * dim)

    def forward(self, x: Tensor, kernels: Kernels = PLAIN, drop_path_scale: Tensor | None = None) -> Tensor:
        """`x`: `[b, h, w, c]`; `drop_path_scale`: `[b, 2]`, 0 where a branch is dropped, 1/keep_prob elsewhere."""

        def attn(x: Tensor, onto: Tensor | None = None) -> Tensor:
            return self.attn(self.norm1(x, kernels), kernels, onto)

        def mlp(x: Tensor, onto: Tensor | None = None) -> Tensor:
            return self.mlp(self.norm2(x, kernels), kernels, onto)

        if drop_path_scale is None:
            x = attn(x, onto=x)
            return mlp(x, onto=x)
        x = kernels.residual(x, attn, drop_path_scale[:, 0])
        return kernels.residual(x, mlp, drop_path_scale[:, 1])


class Peg(nn.Module):
    """Conditional position encoding (Chu et al. 2021): 3x3 depthwise convolution with bias, plus identity."""

    def __init__(self, dim: int):
        super().__init__()
        # In a list because the reference checkpoints name the convolution `proj.0`.
        self.proj = nn.ModuleList([nn.Conv2d(dim, dim, 3, padding=1, groups=dim)])

    def forward(self, x: Tensor) -> Tensor:
        # The permuted view of NHWC memory is what PyTorch calls channels_last: no copy is made.
        return x + rearrange(self.proj[0](rearrange(x, "b h w c -> b c h w")), "b c h w -> b h w c")
