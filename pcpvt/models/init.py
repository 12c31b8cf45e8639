"""Initial parameters from a seed, with the distributions of the reference code.

Linear: normal, std 0.02, bias 0. (The reference truncates at +-2, a hundred standard deviations, which has no effect.)
Norm: weight 1, bias 0. Convolution: normal with std sqrt(2 / fan_out), fan_out = kh * kw * out / groups, bias 0.
"""

import math

import numpy as np
import torch
from torch import Tensor, nn

from pcpvt import rng
from pcpvt.models.layers import Params, PatchLinear


def init(model: nn.Module, seed: int) -> Params:
    """float32 parameters on the host, in the order of `model.named_parameters()`.

    Each depends only on (seed, its name, its shape), so with another head all other parameters stay the same.
    """
    modules = dict(model.named_modules())
    return {
        name: _draw(modules[name.rpartition(".")[0]], name, value.shape, seed)
        for name, value in model.named_parameters()
    }


def _draw(module: nn.Module, name: str, shape: torch.Size, seed: int) -> Tensor:
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
