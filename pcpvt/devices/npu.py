"""Ascend NPUs through torch_npu, which `import torch` loads by itself where it is installed.

Facts behind the choices were checked against the torch_npu 2.13 wheel (tests/wheel).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from pcpvt.devices.base import Batch, Device, prefetch_through_stream
from pcpvt.errors import UserError
from pcpvt.models.layers import Attend


class Npu(Device):
    name = "npu"
    backend = "cpu:gloo,npu:hccl"
    worker_start = "spawn"  # CANN does not survive a fork

    def __init__(self) -> None:
        """The torch.device exists only once torch_npu has renamed the backend, so `bind` makes it."""

    def require(self, count: int) -> None:
        if not hasattr(torch, "npu"):
            raise UserError(
                "config.device: 'npu' but torch_npu is not installed: pip install 'pcpvt[npu]' beside CANN, or use :cpu"
            )
        if (have := torch.npu.device_count()) < count:
            raise UserError(
                f"config.processes: {count} NPUs are asked for on this host and it has {have}: use :npu{have or 1}, "
                "or launch/npu_pod.sh for several hosts"
            )

    def bind(self, index: int) -> torch.device:
        torch.npu.set_compile_mode(jit_compile=False)  # kernels from the binary library: shapes need no recompilation
        torch.npu.config.allow_internal_format = False
        torch.npu.set_device(index)
        self.torch = torch.device("npu", index)
        return self.torch

    def describe(self) -> str:
        return torch.npu.get_device_name(self.torch)

    def _saturates(self) -> bool:
        # On the 910A overflow saturates (inf becomes 65504, nan becomes 0): a test for finiteness never fires.
        return not torch.npu.is_bf16_supported()

    def precision(self) -> str:
        return "float32" if self._saturates() else "bfloat16"

    def check_precision(self, compute: torch.dtype) -> None:
        if compute == torch.float64:
            raise UserError("config.precision: float64 has no NPU kernels: use float32 or bfloat16")
        if self._saturates() and compute != torch.float32:
            why = (
                "has no bfloat16"
                if compute == torch.bfloat16
                else "saturates on overflow, which hides a loss scale's failures"
            )
            name = str(compute).removeprefix("torch.")
            raise UserError(f"config.precision: {name}: {self.describe()} {why}: use float32")

    def attend(self, dtype: torch.dtype) -> Attend:
        from torch_npu import npu_fusion_attention

        def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return npu_fusion_attention(q, k, v, q.shape[1], "BNSD", scale=q.shape[-1] ** -0.5)[0]

        return fused

    def memory(self) -> tuple[int, int]:
        return torch.npu.max_memory_allocated(self.torch), torch.npu.mem_get_info(self.torch)[1]

    def reset_memory(self) -> None:
        torch.npu.reset_peak_memory_stats(self.torch)

    def synchronize(self) -> None:
        torch.npu.synchronize()

    def prefetch(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        return prefetch_through_stream(batches, self.torch, torch.npu)
