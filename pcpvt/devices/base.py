"""The device interface, and functions of the host; `pcpvt.devices.get(name)` returns one of three implementations."""

import ctypes
import os
import platform
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from pcpvt.functional.objective import Batch
from pcpvt.functional.precision import Overflow
from pcpvt.models.layers import PLAIN, Attend, Kernels


class Device:
    """Everything that depends on the kind of device. Subclasses override what differs between them."""

    name = ""
    backend = "gloo"  # torch.distributed backend; must include gloo, which sums host tensors
    worker_start = "forkserver"  # how loader processes start: a fork would inherit this process's threads and locks
    pins_memory = False  # whether host batches are page-locked, so that copies to the device overlap with computation
    default_compile = "none"
    repeats_exactly = False  # whether a gradient that is computed again, also on another such device, has the same bits
    fp32_norms = False  # whether layer_norm's kernel needs float32 weights to sum their gradients in float32
    fused_adamw_honors_found_inf = True  # whether the fused optimizer kernel divides by grad_scale and obeys found_inf
    # Variables that switch on the recording of collectives; `{file}`: where a watchdog that ends the process writes it.
    recording: Mapping[str, str] = {"TORCH_FR_BUFFER_SIZE": "2000"}  # collectives

    def __init__(self) -> None:
        self.torch = torch.device(self.name)

    @property
    def module(self) -> Any:
        """`torch.cpu`, `torch.cuda` or `torch.npu`."""
        return getattr(torch, self.name)

    def environment(self, timeout: int) -> dict[str, str]:
        """Environment variables of its processes, unless they are already set; `timeout` is `config.timeout`, in s."""
        return {}

    def require(self, count: int) -> None:
        """Raises UserError, one line with the remedy, unless `count` devices can be used on this host."""

    def bind(self, index: int) -> None:
        """Selects device `index` of this host for this process; called once, before any tensor exists on it."""

    def describe(self) -> str:
        """Product name, for records and reports."""
        return self.module.get_device_name(self.torch)

    def recorded_collectives(self) -> dict[str, bytes]:
        """The last collectives of each library, as JSON."""
        from torch._C import _distributed_c10d as library

        return {"gloo": library._dump_fr_trace_json()}  # type: ignore[attr-defined]

    def precision(self) -> str:
        """The precision policy that `config.precision=auto` selects."""
        return "float32"

    def check_precision(self, compute: torch.dtype) -> None:
        """Raises UserError when the device does not support this compute dtype, or computes wrong results in it."""

    def overflow(self, compute: torch.dtype) -> Overflow | None:
        """The device's overflow flag, where this dtype saturates instead of producing inf and nan."""
        return None

    def attend(self, dtype: torch.dtype) -> Attend:
        """The attention kernel for this dtype."""
        return F.scaled_dot_product_attention

    def plain_kernels(self) -> Kernels:
        """PyTorch's own operators, or exact ones in the place of those that are not exact on this device."""
        return PLAIN

    def kernels(self, dtype: torch.dtype, *, compiled: bool = False) -> Kernels:
        """This device's kernels for the model; with `compiled` only those that a compiler does not fuse itself."""
        return Kernels(self.attend(dtype))

    def memory_stats(self) -> tuple[int, int]:
        """(peak bytes that this process has used so far, total bytes of the device)."""
        return self.module.max_memory_allocated(self.torch), self.module.mem_get_info(self.torch)[1]

    def micro_batch(self, size: tuple[int, int], compute: torch.dtype, blocks: int) -> int:
        """The largest number of training samples of `size` to compute at once on one device.

        Activations of Twins-PCPVT-S (16 `blocks`) take about 110 MB per sample at 224 px in 16 bits (measured), in
        proportion to pixels, blocks and bytes per number. They may fill three quarters of the memory.
        """
        pixels = size[0] * size[1] / 224**2
        per_sample = 110e6 * pixels * blocks / 16 * compute.itemsize / 2
        return max(1, int(0.75 * self.memory_stats()[1] / per_sample))

    def synchronize(self) -> None:
        """Waits until all queued work is done."""
        self.module.synchronize()

    def stamp(self) -> Any:
        """A mark in the device's queue of work, for `seconds_between`; the host does not wait."""
        event = self.module.Event(enable_timing=True)
        event.record()
        return event

    def seconds_between(self, start: Any, end: Any) -> float:
        """Seconds of the device from one stamp to another, both of which it must have passed."""
        return start.elapsed_time(end) / 1000

    def prefetch(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches on the device; from pinned memory, batch i+1 is copied on a side stream while batch i is used."""
        if not self.pins_memory:
            yield from batches
            return
        side = self.module.Stream()

        def copy(batch: Batch) -> Batch:
            with self.module.stream(side):
                return {name: value.to(self.torch, non_blocking=True) for name, value in batch.items()}

        copies = map(copy, batches)
        following = next(copies, None)
        while (current := following) is not None:
            self.module.current_stream().wait_stream(side)
            for value in current.values():
                value.record_stream(self.module.current_stream())  # allocated on the side stream, used on this one
            following = next(copies, None)
            yield current


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cores_per_process() -> int:
    """This process's share of the host's cores, which it may be bound to; 0 where processes are more than cores."""
    if os.environ.get("PCPVT_CORES"):  # set by `launch/cpu.sh`, obeyed by `main`
        return cores()
    return cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def keep_freed_memory() -> None:
    """Makes glibc's allocator keep freed memory of tensors and images, large ones too, for the next ones.

    Every step allocates the same sizes again; mapping them afresh costs 30,000 page faults per training step at 64 px,
    a seventh of its time.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX of glibc's malloc.h
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD
