"""`torch.npu` of the stand-in: the part that pcpvt uses, with the names and signatures of torch_npu 2.13."""

from __future__ import annotations

import contextlib
import os
import warnings

import torch
from torch.accelerator import current_device_index as current_device
from torch.accelerator import (
    empty_cache,
    max_memory_allocated,
    max_memory_reserved,
    memory_allocated,
    memory_reserved,
    memory_stats,
    reset_peak_memory_stats,
)

SOC = os.environ["PCPVT_NPU_STANDIN_SOC"]
DEVICES = int(os.environ["PCPVT_NPU_STANDIN_DEVICES"])
SATURATES = os.environ["PCPVT_NPU_STANDIN_910A"] == "1"
__all__ = [
    "empty_cache",
    "max_memory_allocated",
    "max_memory_reserved",
    "memory_allocated",
    "memory_reserved",
    "memory_stats",
    "reset_peak_memory_stats",
]


def _index(device=None) -> int:
    index = device if isinstance(device, int) or device is None else torch.device(device).index
    return current_device() if index is None else index


def device_count() -> int:
    return DEVICES


def is_available() -> bool:
    return DEVICES > 0


def is_initialized() -> bool:
    return True


def _is_in_bad_fork() -> bool:
    return False


def set_device(device) -> None:
    torch.accelerator.set_device_index(_index(device))


def synchronize(device=None) -> None:
    torch.accelerator.synchronize(_index(device))


def mem_get_info(device=None) -> tuple[int, int]:
    return torch.accelerator.get_memory_info(_index(device))


def get_device_name(device_name=None) -> str:
    return SOC


def get_soc_version() -> int:
    return 102 if SATURATES else 221  # the wheel's values for Ascend910A and Ascend910B2


def is_bf16_supported(including_emulation: bool = False) -> bool:
    return not SATURATES


def manual_seed_all(seed: int) -> None:
    """Called by torch.manual_seed; this device has no generator."""


# ---- streams: one per device, always idle; classes in torch_npu, functions here


def Stream(device=None, priority=0):
    return torch.Stream(device=torch.device("npu", _index(device)), priority=priority)


def Event(enable_timing=False, blocking=False, interprocess=False):
    return torch.Event("npu", enable_timing=enable_timing)


def current_stream(device=None):
    return torch.accelerator.current_stream(torch.device("npu", _index(device)))


def stream(stream):
    return contextlib.nullcontext(stream)


# ---- options that must be set before tensors exist


def _require_no_tensors(name: str) -> None:
    if torch.ops.npu_standin.allocations():
        raise RuntimeError(f"npu stand-in: {name} after the first tensor")


def set_compile_mode(jit_compile: bool = False) -> None:
    _require_no_tensors("set_compile_mode")


class _Config:
    def __init__(self, option: str):
        object.__setattr__(self, "option", option)

    def __setattr__(self, name, value):
        if name != self.option:
            raise AttributeError(f"npu stand-in: no option {name}")
        _require_no_tensors(name)
        object.__setattr__(self, name, value)


config, conv = _Config("allow_internal_format"), _Config("allow_hf32")


# ---- the overflow flag of devices that saturate


class utils:
    @staticmethod
    def is_support_inf_nan() -> bool:
        return not SATURATES


def get_npu_overflow_flag() -> bool:
    if utils.is_support_inf_nan():
        raise RuntimeError("npu stand-in: this device has inf and nan and no overflow flag")
    return torch.ops.npu_standin.overflow()


def clear_npu_overflow_flag() -> None:
    if utils.is_support_inf_nan():
        warnings.warn("npu stand-in: this device has no overflow flag", stacklevel=2)
    torch.ops.npu_standin.set_overflow(False)
