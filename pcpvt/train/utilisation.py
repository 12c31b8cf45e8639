"""How much of a device a run uses: the model's floating-point operations per second over what the data sheet promises.

MFU counts the operations that the model needs (a multiply-add is 2, the backward pass twice the forward one), not
those that recomputation or padding add (Chowdhery et al. 2022, PaLM, appendix B).
"""

from __future__ import annotations

import math
import re

import torch

from pcpvt.models.pcpvt import Spec

# Dense 16-bit tensor throughput in TFLOP/s, by the model number in the device's name, from the makers' data sheets.
# CPUs are missing because no data sheet gives theirs, Ascend's because none was at hand.
_PEAK_16_BIT = (
    ("H200", 989), ("H100 NVL", 835), ("H100 PCIe", 756), ("H100", 989), ("A100", 312), ("V100-PCIE", 112),
    ("V100", 125), ("T4", 65),
)  # fmt: skip


def multiply_adds(spec: Spec, size: tuple[int, int], num_classes: int) -> int:
    """Multiply-adds of one image `(height, width)` in the forward pass; normalisation and activations are left out."""
    (height, width), channels, total = size, 3, 0
    for depth, dim, ratio, reduction, patch in zip(
        spec.depths, spec.dims, spec.mlp_ratios, spec.reductions, spec.patches, strict=True
    ):
        height, width = math.ceil(height / patch), math.ceil(width / patch)
        tokens, keys = height * width, math.ceil(height / reduction) * math.ceil(width / reduction)
        total += tokens * channels * patch**2 * dim + 9 * tokens * dim  # patch embedding, position encoding
        reduce = keys * (dim * reduction) ** 2 if reduction > 1 else 0
        attention = (2 * tokens + 2 * keys) * dim**2 + reduce + 2 * tokens * keys * dim
        total += depth * (attention + 2 * tokens * ratio * dim**2)
        channels = dim
    return total + channels * num_classes


def peak_flops(name: str, dtype: torch.dtype) -> float | None:
    """The data sheet's floating-point operations per second of a device for products in 16-bit `dtype`, or None."""
    for model, tera in _PEAK_16_BIT:
        if re.search(rf"\b{model}\b", name):  # the A1000 is no A100
            older = model.startswith(("V100", "T4"))  # have no bfloat16
            return tera * 1e12 if dtype == torch.float16 or (dtype == torch.bfloat16 and not older) else None
    return None


def mfu(images_per_sec: float, per_image: int, peak: float | None, devices: int) -> float | None:
    """Training's share of the peak of all devices, between 0 and 1; None where the peak is not known."""
    return 3 * 2 * per_image * images_per_sec / (peak * devices) if peak else None
