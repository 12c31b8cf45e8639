"""The peers that numbers are compared with: timm's model and a plain PyTorch training loop."""

from __future__ import annotations

import torch

from pcpvt import torchvision_compat  # noqa: F401 - before timm

import timm  # isort: skip

TIMM_NAMES = {"pcpvt_s": "twins_pcpvt_small", "pcpvt_b": "twins_pcpvt_base", "pcpvt_l": "twins_pcpvt_large"}


def timm_model(name: str, num_classes: int = 1000, seed: int = 0, **options) -> torch.nn.Module:
    """timm's model of the same size, with weights from a seed; every leaf is made to matter.

    timm starts biases at 0 and norms at 1, which would hide a leaf that is not used: they are shaken.
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
