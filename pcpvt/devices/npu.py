"""Ascend NPUs through torch_npu, which `import torch` loads by itself where it is installed.

The facts stated here, every `torch.npu.NAME` below and the names that `Device` uses of `torch.npu` are checked against
the torch_npu 2.13 wheel by tests/test_wheel.py. docs/npu.md lists the operators that differ from PyTorch's.
"""

# mypy: disable-error-code="attr-defined"

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from pcpvt.devices import npu_settings, visible
from pcpvt.devices.base import Device
from pcpvt.errors import UserError
from pcpvt.functional.precision import Overflow
from pcpvt.models.layers import PLAIN, Attend, Kernels


def attend_primitive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`models.layers.attend_plain` without `softmax`, which torch.func cannot differentiate on NPUs."""
    scores = (q * q.shape[-1] ** -0.5) @ k.mT
    return torch.ops.aten._softmax(scores, -1, False) @ v


def norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`models.layers.norm_plain`: the kernel takes 16-bit `x` beside float32 weights and sums in float32."""
    return F.layer_norm(x, weight.shape, weight, bias, eps)


class Npu(Device):
    name = "npu"
    backend = "cpu:gloo,npu:hccl"
    worker_start = "spawn"  # CANN does not survive a fork
    fp32_norms = True  # saves a cast of each gradient: the kernel sums them in float32
    pins_memory = True
    fused_adamw_honors_found_inf = False  # torch_npu's _fused_adamw_ ignores grad_scale and found_inf
    recording = {  # noqa: RUF012 - constant
        **Device.recording, "TORCH_HCCL_TRACE_BUFFER_SIZE": "2000", "TORCH_HCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_HCCL_DEBUG_INFO_TEMP_FILE": "{file}",
    }  # fmt: skip

    def __init__(self) -> None:
        """`bind` creates the torch.device: its name exists only once torch_npu has renamed the backend."""

    def environment(self, timeout: int) -> dict[str, str]:
        return npu_settings.environment(timeout)

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
        torch.npu.conv.allow_hf32 = False  # on by default, unlike that of matmul; float32 must mean float32
        torch.npu.set_device(index)
        self.torch = torch.device("npu", index)

    def recorded_collectives(self) -> dict[str, bytes]:
        from torch_npu._C import _distributed_c10d as library

        return {**super().recorded_collectives(), "hccl": library._dump_hccl_trace_json()}

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
        from torch_npu import npu_clear_float_status, npu_get_float_status

        def clear() -> None:  # torch.npu.clear_npu_overflow_flag waits for a copy from the host
            npu_clear_float_status(torch.empty(8, device=self.torch))

        def overflowed() -> Tensor:
            return (npu_get_float_status(torch.zeros(8, device=self.torch))[0] != 0).to(torch.float32)

        return Overflow(clear, overflowed)

    def attend(self, dtype: torch.dtype) -> Attend:
        if not torch.npu.is_bf16_supported():  # the 910A, which has no fused attention either
            return attend_primitive
        from torch_npu import npu_fusion_attention

        def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            # In BSND, the memory order of the model's tokens, nothing is transposed.
            q, k, v = (rearrange(t, "b n s d -> b s n d") for t in (q, k, v))
            out = npu_fusion_attention(q, k, v, q.shape[2], "BSND", scale=q.shape[-1] ** -0.5)[0]
            return rearrange(out, "b s n d -> b n s d")

        return fused

    def plain_kernels(self) -> Kernels:
        from torch_npu import npu_gelu

        def gelu_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            # F.gelu is the tanh form on NPUs, whatever its argument says (docs/npu.md).
            return npu_gelu(F.linear(x, weight, bias), approximate="none")

        return PLAIN._replace(gelu_linear=gelu_linear)

    def kernels(self, dtype: torch.dtype, *, compiled: bool = False) -> Kernels:
        return self.plain_kernels()._replace(attend=self.attend(dtype), norm=norm)
