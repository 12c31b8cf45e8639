"""Model FLOPs utilisation (MFU): the model's operations per second relative to the device's peak.

MFU counts the operations that the model needs (a multiply-add is 2, the backward pass twice the forward pass), not
those of recomputation or padding (Chowdhery et al. 2022, PaLM, appendix B).
"""

import functools
import re

import torch

from pcpvt.models.pcpvt import PCPVT

# Dense 16-bit tensor throughput in TFLOP/s, by the model number in the device's name, from the makers' data sheets.
# CPUs are missing because no data sheet gives theirs, Ascend's because none names chips: published figures of a "910A"
# range from 256 to 320 by board, of a "910B" from 256 to 376, while the device's name (Ascend910B2) tells no board.
_PEAK_16_BIT = (
    ("H200", 989), ("H100 NVL", 835), ("H100 PCIe", 756), ("H100", 989), ("A100", 312), ("V100-PCIE", 112),
    ("V100", 125), ("T4", 65),
)  # fmt: skip


@functools.lru_cache
def forward_flops(model: PCPVT, size: tuple[int, int]) -> int:
    """Floating-point operations of one image `(height, width)` in the forward pass: matrix products, convolutions."""
    from torch.utils.flop_counter import FlopCounterMode  # slow to import, and needed only where the peak is known

    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, *size, model.in_chans, device="meta"))
    return counter.get_total_flops()


def peak_flops(name: str, dtype: torch.dtype) -> float | None:
    """The data sheet's operations per second for matrix products in 16-bit `dtype`; None where it is not known."""
    for model, tera in _PEAK_16_BIT:
        if re.search(rf"\b{model}\b", name):  # "A100" must not match "A1000"
            older = model.startswith(("V100", "T4"))  # without bfloat16
            return tera * 1e12 if dtype == torch.float16 or (dtype == torch.bfloat16 and not older) else None
    return None


def mfu(images_per_sec: float, flops: int, peak: float, devices: int) -> float:
    """Training's share of the peak of all devices, between 0 and 1; `flops`: of one image's forward pass."""
    return 3 * flops * images_per_sec / (peak * devices)
