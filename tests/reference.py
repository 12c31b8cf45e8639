"""References for numeric tests: timm's model, and the network written out in plain PyTorch; and their inputs."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from pcpvt import (
    rng,
    torchvision_compat,  # noqa: F401 - before timm
)
from pcpvt.models import pcpvt
from pcpvt.models.init import init

import timm  # isort: skip

TIMM_NAMES = {"pcpvt_s": "twins_pcpvt_small", "pcpvt_b": "twins_pcpvt_base", "pcpvt_l": "twins_pcpvt_large"}


def timm_model(name: str, num_classes: int = 1000, seed: int = 0, **options) -> torch.nn.Module:
    """timm's model of the same size, with weights from a seed.

    timm initialises biases to 0 and norms to 1, which would hide a parameter that is not used, so noise is added.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = timm.create_model(TIMM_NAMES[name], num_classes=num_classes, **options)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def nchw(images: torch.Tensor) -> torch.Tensor:
    return images.permute(0, 3, 1, 2).contiguous()


def images(*shape: int, dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(rng.generator(seed, "test").standard_normal(shape)).to(dtype)


def nano(num_classes: int = 10, pad: str = "pad"):
    """The model pcpvt_nano and float64 parameters for it."""
    model = pcpvt.build("pcpvt_nano", num_classes, pad)
    return model, {n: v.double() for n, v in init(model, 0).items()}


def written_out(spec: pcpvt.Spec, params: pcpvt.Params, x: torch.Tensor) -> torch.Tensor:
    """Logits of NHWC images by F.conv2d and F.linear, with explicit zero padding before each strided convolution."""

    def linear(x, name):
        return F.linear(x, params[f"{name}.weight"], params[f"{name}.bias"])

    def norm(x, name, eps):
        return F.layer_norm(x, x.shape[-1:], params[f"{name}.weight"], params[f"{name}.bias"], eps)

    def strided(x, name, stride):
        height, width = (math.ceil(side / stride) * stride for side in x.shape[2:])
        full = x.new_zeros(*x.shape[:2], height, width)
        full[:, :, : x.shape[2], : x.shape[3]] = x
        return F.conv2d(full, params[f"{name}.weight"], params[f"{name}.bias"], stride)

    def attention(x, size, name, heads, reduction):
        reduced = x
        if reduction > 1:
            reduced = strided(x.mT.unflatten(2, size), f"{name}.sr", reduction)
            reduced = norm(reduced.flatten(2).mT, f"{name}.norm", 1e-5)
        q, (k, v) = linear(x, f"{name}.q"), linear(reduced, f"{name}.kv").chunk(2, -1)
        q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
        return linear((weights @ v).transpose(1, 2).flatten(2), f"{name}.proj")

    x = nchw(x)
    for s, (depth, dim, patch) in enumerate(zip(spec.depths, spec.dims, spec.patches, strict=True)):
        x = strided(x, f"patch_embeds.{s}.proj", patch)
        size = x.shape[2:]
        x = norm(x.flatten(2).mT, f"patch_embeds.{s}.norm", 1e-5)
        for i in range(depth):
            name = f"blocks.{s}.{i}"
            x = x + attention(norm(x, f"{name}.norm1", 1e-6), size, f"{name}.attn", spec.heads[s], spec.reductions[s])
            x = x + linear(F.gelu(linear(norm(x, f"{name}.norm2", 1e-6), f"{name}.mlp.fc1")), f"{name}.mlp.fc2")
            if i == 0:
                kernel, bias = (params[f"pos_block.{s}.proj.0.{leaf}"] for leaf in ("weight", "bias"))
                x = x + F.conv2d(x.mT.unflatten(2, size), kernel, bias, padding=1, groups=dim).flatten(2).mT
        x = x.mT.unflatten(2, size)
    return linear(norm(x.flatten(2).mT, "norm", 1e-6).mean(1), "head")
