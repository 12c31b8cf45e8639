"""A seed to initial parameters, with the reference's distributions.

Linear: normal, std 0.02, bias 0. (The reference truncates at +-2, a hundred standard deviations: no draw is ever cut.)
Norm: weight 1, bias 0. Convolution: normal with std sqrt(2 / fan_out), fan_out = kh * kw * out / groups, bias 0.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from pcpvt import rng
from pcpvt.models.layers import PatchLinear


def init(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """float32 parameters on the host, keyed like `model.named_parameters()`; each leaf has a stream of its own.

    A leaf depends on (seed, its name, its shape) only, so a model with another head keeps every other leaf.
    """
    params = {}
    for path, module in model.named_modules():
        for name, leaf in module.named_parameters(prefix=path, recurse=False):
            params[name] = _leaf(module, name, leaf.shape, seed)
    return {name: params[name] for name, _ in model.named_parameters()}


def _leaf(module: nn.Module, name: str, shape: torch.Size, seed: int) -> Tensor:
    if name.endswith("bias"):
        return torch.zeros(shape)
    if isinstance(module, nn.LayerNorm):
        return torch.ones(shape)
    if isinstance(module, nn.Linear):
        std = 0.02
    elif isinstance(module, PatchLinear | nn.Conv2d):
        out, _, kh, kw = shape
        std = math.sqrt(2.0 / (kh * kw * out / getattr(module, "groups", 1)))
    else:
        raise AssertionError(f"no initialiser for {name} of {type(module).__name__}")
    draws = rng.generator(seed, f"init/{name}").standard_normal(tuple(shape), dtype=np.float32)
    return torch.from_numpy(draws).mul_(std)
