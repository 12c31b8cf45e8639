"""Twins-PCPVT: the model, its sizes, and functions that apply it to a flat dict of parameters.

Source: Chu et al. 2021, "Twins: Revisiting the Design of Spatial Attention in Vision Transformers", and the reference
code where the two differ. A model is built on the meta device: it has names and shapes but no weights.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange, reduce
from torch import Tensor, nn
from torch.func import functional_call

from pcpvt.models.layers import PLAIN, Block, Capture, Kernels, LayerNorm, Params, PatchEmbed, Peg


class Spec(NamedTuple):
    """The dimensions of one model size, one entry per stage."""

    depths: tuple[int, ...]
    dims: tuple[int, ...] = (64, 128, 320, 512)
    heads: tuple[int, ...] = (1, 2, 5, 8)
    mlp_ratios: tuple[int, ...] = (8, 8, 4, 4)
    reductions: tuple[int, ...] = (8, 4, 2, 1)
    patches: tuple[int, ...] = (4, 2, 2, 2)


SPECS = {
    "pcpvt_s": Spec((3, 4, 6, 3)),
    "pcpvt_b": Spec((3, 4, 18, 3)),
    "pcpvt_l": Spec((3, 8, 27, 3)),
    # 0.3 M parameters and every kind of layer, for smoke runs and tests.
    "pcpvt_nano": Spec((2, 1, 1, 1), dims=(16, 32, 40, 64), mlp_ratios=(2, 2, 2, 2)),
}
_TIED = False  # no parameters are shared, and searching for shared ones takes 0.5 ms: 2 % of one image's evaluation
STRIDE = 32  # of the last stage: 4 * 2 * 2 * 2
TIMM_NAMES = {"pcpvt_s": "twins_pcpvt_small", "pcpvt_b": "twins_pcpvt_base", "pcpvt_l": "twins_pcpvt_large"}


class PCPVT(nn.Module):
    """The structure of the model; call it through `apply`, `features` or `torch.func.functional_call`."""

    def __init__(self, spec: Spec, num_classes: int, pad: str = "pad", in_chans: int = 3, task: str = "classes"):
        """
        Args:
            spec: the model size.
            num_classes: outputs of the head.
            pad: how a side that 32 does not divide is handled: "pad" pads with zeros (see `layers.PatchLinear`),
                "error" raises ValueError.
            in_chans: channels of the images.
            task: how the logits are read: "classes" or "multilabel" (see `functional.tasks`).
        """
        super().__init__()
        assert pad in ("pad", "error"), pad
        self.spec, self.num_classes, self.pad, self.in_chans, self.task = spec, num_classes, pad, in_chans, task
        channels = (in_chans, *spec.dims)
        self.patch_embeds = nn.ModuleList(map(PatchEmbed, channels[:-1], channels[1:], spec.patches))
        self.pos_block = nn.ModuleList(map(Peg, spec.dims))
        self.blocks = nn.ModuleList(
            nn.ModuleList(Block(dim, heads, ratio, reduction) for _ in range(depth))
            for depth, dim, heads, ratio, reduction in zip(
                spec.depths, spec.dims, spec.heads, spec.mlp_ratios, spec.reductions, strict=True
            )
        )
        self.norm = LayerNorm(spec.dims[-1], eps=1e-6)
        self.head = nn.Linear(spec.dims[-1], num_classes)

    @property
    def branches(self) -> int:
        """The number of residual branches, which drop path drops independently: two per block."""
        return 2 * sum(self.spec.depths)

    def forward(
        self,
        images: Tensor,
        drop_path_scale: Tensor | None = None,
        kernels: Kernels = PLAIN,
        capture: Capture = lambda name, value: None,
        attention: bool = False,
        dense: bool = False,
    ) -> Tensor | list[Tensor]:
        """Logits `[b, num_classes]` of normalised images `[b, H, W, in_chans]`.

        Args:
            images: NHWC, any height and width.
            drop_path_scale: drop-path factors `[b, branches]` (see `draw_drop_path_scale`), or None for no drop path.
            kernels: the device's kernels.
            capture: called with (name, tensor) for `stages.{s}`, `blocks.{s}.{i}`, `pooled` and `logits`.
            attention: capture also each block's attention matrix `[b, heads, tokens, keys]` as
                `blocks.{s}.{i}.attention`: for S at 224 px 4.5 MB an image in float32, beside 5.8 MB for all the rest.
            dense: return the four stage outputs `[b, h, w, c]`, before the final norm, instead of logits.
        """
        if self.pad == "error" and (images.shape[1] % STRIDE or images.shape[2] % STRIDE):
            raise ValueError(f"image size {tuple(images.shape[1:3])} is not divisible by {STRIDE} and pad is 'error'")
        if drop_path_scale is not None:
            drop_path_scale = drop_path_scale.to(images.dtype)
        x, branch, stages = images, 0, []
        for s, (embed, position, blocks) in enumerate(zip(self.patch_embeds, self.pos_block, self.blocks, strict=True)):
            x = embed(x, kernels)
            for i, block in enumerate(blocks.children()):
                own = _capturing(kernels, capture, f"blocks.{s}.{i}.attention") if attention else kernels
                scale = None if drop_path_scale is None else drop_path_scale[:, branch : branch + 2]
                x = own.block_fn(block, x, own, scale)
                branch += 2
                if i == 0:
                    x = position(x)
                capture(f"blocks.{s}.{i}", x)
            capture(f"stages.{s}", x)
            stages.append(x)
        if dense:
            return stages
        pooled = reduce(self.norm(x, kernels), "b h w c -> b c", "mean")
        logits = kernels.linear(pooled, self.head.weight, self.head.bias)
        capture("pooled", pooled)
        capture("logits", logits)
        return logits


def _capturing(kernels: Kernels, capture: Capture, name: str) -> Kernels:
    """The kernels with an attention that also captures its matrix under `name`; compiled blocks would not call it."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        capture(name, ((q * q.shape[-1] ** -0.5) @ k.mT).softmax(-1))
        return kernels.attend(q, k, v)

    return kernels._replace(attend=attend, block_fn=PLAIN.block_fn)


def build(name: str, num_classes: int, pad: str = "pad", in_chans: int = 3, task: str = "classes") -> PCPVT:
    """A model on the meta device; `name` is a key of SPECS."""
    with torch.device("meta"):
        return PCPVT(SPECS[name], num_classes, pad, in_chans, task)


def shapes(model: PCPVT) -> dict[str, torch.Size]:
    """Parameter name to shape, in the model's order."""
    return {name: p.shape for name, p in model.named_parameters()}


def n_parameters(model: PCPVT) -> int:
    return sum(math.prod(shape) for shape in shapes(model).values())


def apply(model: PCPVT, params: Params, images: Tensor, drop_path_scale: Tensor | None = None, **options) -> Tensor:
    """Logits `[b, num_classes]`; see `PCPVT.forward` for the arguments."""
    return functional_call(model, params, (images, drop_path_scale), options, tie_weights=_TIED)


def bind(model: PCPVT, params: Params) -> PCPVT:
    """The same model with these parameters in it, for repeated calls without gradients.

    `apply` exchanges all parameters for those of the call and back, a fifth of the time that a call spends in Python.
    """
    with torch.device("meta"):
        bound = PCPVT(model.spec, model.num_classes, model.pad, model.in_chans, model.task)
    for name, value in params.items():
        module, _, own = name.rpartition(".")
        owner = bound.get_submodule(module)
        delattr(owner, own)
        setattr(owner, own, value)  # a plain attribute: the weights of some kernels cannot be an nn.Parameter
    return bound


def features(model: PCPVT, params: Params, images: Tensor, **options) -> list[Tensor]:
    """Dense features: four maps `[b, c, h, w]` at strides 4, 8, 16, 32 of normalised images `[b, H, W, 3]`.

    Channels are the spec's dims (64, 128, 320, 512). Equal to timm's `forward_intermediates`; the maps are
    channels-last views, differentiable in `params` and `images`.
    """
    maps = functional_call(model, params, (images,), {**options, "dense": True}, tie_weights=_TIED)
    return [rearrange(x, "b h w c -> b c h w") for x in maps]


def intermediates(
    model: PCPVT, params: Params, images: Tensor, attention: bool = False, **options
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and all captured tensors by name: see `capture` and `attention` of `PCPVT.forward`."""
    captured: dict[str, Tensor] = {}
    logits = apply(model, params, images, capture=captured.__setitem__, attention=attention, **options)
    return logits, captured


def drop_rates(spec: Spec, rate: float) -> np.ndarray:
    """The drop probability of each residual branch `[branches]`: linear from 0 to `rate` over the blocks."""
    return np.repeat(np.linspace(0.0, rate, sum(spec.depths)), 2)


def draw_drop_path_scale(rng: np.random.Generator, rates: np.ndarray) -> np.ndarray:
    """One sample's drop-path factors, float32 `[branches]`: 0 with probability `rate`, else 1 / (1 - rate)."""
    kept = rng.random(len(rates), dtype=np.float32) >= rates
    return np.where(kept, 1.0 / (1.0 - rates), 0.0).astype(np.float32)


def depth_of(spec: Spec, name: str) -> int:
    """A parameter's depth for layer-wise learning rates: the index of its block; `sum(depths)` for norm and head.

    A stage's patch embedding and position encoding belong to its first block.
    """
    kind, *rest = name.split(".")
    if kind in ("norm", "head"):
        return sum(spec.depths)
    stage = int(rest[0])
    return sum(spec.depths[:stage]) + (int(rest[1]) if kind == "blocks" else 0)


def layer_decay(spec: Spec, decay: float) -> Callable[[str], float]:
    """Parameter name to learning-rate factor: 1 at the head, times `decay` per block below (BEiT, Bao et al. 2022)."""
    return lambda name: decay ** (sum(spec.depths) - depth_of(spec, name))
