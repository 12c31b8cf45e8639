"""Ascend NPUs through torch_npu, which `import torch` loads by itself where it is installed.

The facts stated here, every `torch.npu.NAME` below and the names that `Device` uses of `torch.npu` are checked against
the torch_npu 2.13 wheel by tests/test_wheel.py.
"""

# mypy: disable-error-code="attr-defined"

import torch
from torch import Tensor

from pcpvt.devices import visible
from pcpvt.devices.base import Device
from pcpvt.errors import UserError
from pcpvt.functional.precision import Overflow
from pcpvt.models.layers import Attend


def attend_primitive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`models.layers.attend_plain` without `softmax`, which torch.func cannot differentiate on NPUs."""
    scores = (q * q.shape[-1] ** -0.5) @ k.mT
    return torch.ops.aten._softmax(scores, -1, False) @ v


class Npu(Device):
    name = "npu"
    backend = "cpu:gloo,npu:hccl"
    worker_start = "spawn"  # CANN does not survive a fork
    pins_memory = True
    fused_adamw_honors_found_inf = False  # torch_npu's _fused_adamw_ ignores grad_scale and found_inf
    environment = {  # noqa: RUF012 - constant
        "TASK_QUEUE_ENABLE": "2",
        "CPU_AFFINITY_CONF": "1",
        "HCCL_CONNECT_TIMEOUT": "1800",
        "HCCL_WHITELIST_DISABLE": "1",
    }

    def __init__(self) -> None:
        """`bind` creates the torch.device: its name exists only once torch_npu has renamed the backend."""

    @visible.driver_errors
    def require(self, count: int) -> None:
        if not hasattr(torch, "npu"):
            raise UserError(
                "config.device: 'npu' but torch_npu is not installed: pip install 'pcpvt[npu]' beside CANN, or use :cpu"
            )
        have = torch.npu.device_count()
        if not have:
            raise visible.no_card("npu")
        if have < count:
            raise visible.too_few("npu", count, have)

    @visible.driver_errors
    def bind(self, index: int) -> None:
        torch.npu.set_compile_mode(jit_compile=False)  # use prebuilt kernels: no compilation per shape
        torch.npu.config.allow_internal_format = False
        torch.npu.set_device(index)
        self.torch = torch.device("npu", index)

    def precision(self) -> str:
        return "bfloat16" if torch.npu.is_bf16_supported() else "float16"

    def check_precision(self, compute: torch.dtype) -> None:
        if compute == torch.float64:
            raise UserError(f"config.precision: float64 has no kernels on NPUs: use {self.precision()} or float32")
        if compute == torch.bfloat16 and not torch.npu.is_bf16_supported():
            raise UserError(f"config.precision: bfloat16: {self.describe()} has none: use float16 or float32")

    def overflow(self, compute: torch.dtype) -> Overflow | None:
        # On the 910A float16 saturates (inf becomes 65504, nan becomes 0), so a test for finiteness never fires. The
        # device's status register records the overflow; torch_npu's own GradScaler reads it too.
        if compute != torch.float16 or torch.npu.utils.is_support_inf_nan():
            return None
        from torch_npu import npu_get_float_status

        def overflowed() -> Tensor:
            return (npu_get_float_status(torch.zeros(8, device=self.torch))[0] != 0).to(torch.float32)

        return Overflow(torch.npu.clear_npu_overflow_flag, overflowed)

    def attend(self, dtype: torch.dtype) -> Attend:
        if not torch.npu.is_bf16_supported():  # the 910A, which has no fused attention either
            return attend_primitive
        from torch_npu import npu_fusion_attention

        def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return npu_fusion_attention(q, k, v, q.shape[1], "BNSD", scale=q.shape[-1] ** -0.5)[0]

        return fused
