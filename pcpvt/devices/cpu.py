"""Plain CPUs."""

import os
import platform
import resource
import time
from pathlib import Path

import torch

from pcpvt.devices import cpu_kernels
from pcpvt.devices.base import Device, cores, cores_per_process, keep_freed_memory
from pcpvt.models.layers import Attend, Kernels


class Cpu(Device):
    name = "cpu"
    repeats_exactly = True  # with the same number of threads
    # layer_norm's backward sums over rows in the input's dtype: in bfloat16 the bias gradient of 25,088 rows (stage 1,
    # 8 images of 224 px) is 92 % off.
    fp32_norms = True

    def bind(self, index: int) -> None:
        keep_freed_memory()
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, cores_per_process()))

    def describe(self) -> str:
        model = _proc_value("cpuinfo", "model name") or platform.processor() or platform.machine()
        return f"{model}, {cores()} cores"

    def precision(self) -> str:
        """bfloat16 where the processor has instructions for it (1.8x the images/s of float32); slower elsewhere."""
        capabilities = torch.cpu.get_capabilities()
        return "bfloat16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "float32"

    def attend(self, dtype: torch.dtype) -> Attend:
        # With the 49 keys of 224 px the fused kernel is slow in bfloat16 (12 ms per call), a little faster in float32.
        return cpu_kernels.attend if dtype == torch.bfloat16 else super().attend(dtype)

    def kernels(self, dtype: torch.dtype, *, compiled: bool = False) -> Kernels:
        own = Kernels(self.attend(dtype))
        if compiled:
            return own
        own = own._replace(norm=cpu_kernels.norm, residual=cpu_kernels.residual)
        if not cpu_kernels.usable(dtype):
            return own
        return own._replace(
            linear=cpu_kernels.linear, linear_add=cpu_kernels.linear_add, gelu_linear=cpu_kernels.gelu_linear,
            prepack=cpu_kernels.prepack,
        )  # fmt: skip

    def memory_stats(self) -> tuple[int, int]:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        peak = _proc_value("self/status", "VmHWM")  # not ru_maxrss, which a process inherits from its parent
        peak_kb = int(peak.split()[0]) if peak else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak_kb * 1024, total

    def stamp(self) -> float:
        return time.perf_counter()

    def seconds_between(self, start: float, end: float) -> float:
        return end - start

    def micro_batch(self, size: tuple[int, int], compute: torch.dtype, blocks: int) -> int:
        # 8 images of 224 px keep two cores busy: 16 at once are no faster, and 64 at once take three times the memory.
        return max(1, int(8 * 224**2 / (size[0] * size[1])))


def _proc_value(file: str, key: str) -> str | None:
    """The first value of `key` in a file of /proc that has lines `key: value`; None where there is none (not Linux)."""
    try:
        lines = Path("/proc", file).read_text().splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), None)
