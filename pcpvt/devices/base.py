"""The small interface behind which devices differ; `pcpvt.devices.get(name)` gives one of three implementations."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch

from pcpvt.functional.objective import Batch
from pcpvt.functional.precision import Overflow
from pcpvt.models.layers import Attend, Kernels, attend_plain


class Device:
    """What the shell may know of a device. Subclasses override what differs from a plain host."""

    name = ""
    backend = "gloo"  # torch.distributed backend, host tensors included
    worker_start = "forkserver"  # how loader processes start: a fork would inherit this process's threads and locks
    pins = False  # whether host batches go through page-locked memory, for copies that overlap
    default_compile = "none"
    fp32_norms = False  # whether layer_norm's kernel needs float32 weights to sum their gradients in float32
    fused_adamw_honors_found_inf = True  # whether the fused optimizer kernel divides by grad_scale and obeys found_inf
    environment: Mapping[str, str] = {}  # what a launcher sets for its processes, unless it is set already
    vmaps = True  # whether torch.func.vmap works here

    def __init__(self) -> None:
        self.torch = torch.device(self.name)

    def require(self, count: int) -> None:
        """Raises UserError, one line with the remedy, unless `count` devices can be used on this host."""

    def bind(self, index: int) -> torch.device:
        """Makes device `index` of this host this process's own; called once, before tensors exist."""
        return self.torch

    def describe(self) -> str:
        """Product name, for records and reports."""
        raise NotImplementedError

    def precision(self) -> str:
        """The policy that `auto` means here."""
        return "float32"

    def check_precision(self, compute: torch.dtype) -> None:
        """Raises UserError when the device computes wrongly, or not at all, in this dtype."""

    def overflow(self, compute: torch.dtype) -> Overflow | None:
        """The record of overflow that decides instead of inf and nan, where this dtype saturates."""
        return None

    def attend(self, dtype: torch.dtype) -> Attend:
        """The attention kernel for this dtype."""
        return attend_plain

    def kernels(self, dtype: torch.dtype, *, compiled: bool = False) -> Kernels:
        """This device's kernels for the model; a compiler fuses the plain operators itself."""
        return Kernels(self.attend(dtype))

    def memory_stats(self) -> tuple[int, int]:
        """(peak bytes used by this process so far, bytes that exist)."""
        raise NotImplementedError

    def reset_memory(self) -> None:
        """Starts a new peak, where the device can."""

    def micro_batch(self, size: tuple[int, int], compute: torch.dtype, blocks: int) -> int:
        """Training samples of `size` that one device takes at once; `blocks` is the model's depth.

        Activations of Twins-PCPVT-S take about 110 MB a sample at 224 px in 16 bits (measured), in proportion to
        pixels, depth and bytes per number; three quarters of the memory are given to them.
        """
        pixels = size[0] * size[1] / 224**2
        per_sample = 110e6 * pixels * blocks / 16 * compute.itemsize / 2
        return max(1, int(0.75 * self.memory_stats()[1] / per_sample))

    def synchronize(self) -> None:
        """Waits until everything queued is done."""

    def prefetch(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches on the device, the next one's transfer overlapping the present one's use."""
        return iter(batches)

    def timer(self) -> Callable[[], float]:
        """Seconds since the call, everything queued on the device included."""
        self.synchronize()
        start = time.perf_counter()

        def elapsed() -> float:
            self.synchronize()
            return time.perf_counter() - start

        return elapsed


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def prefetch_through_stream(batches: Iterable[Batch], device: torch.device, streams) -> Iterator[Batch]:
    """Copies batch i+1 from pinned memory on a side stream while batch i is used.

    Args:
        streams: the device's module (`torch.cuda`, `torch.npu`), for Stream, stream and current_stream.
    """
    side = streams.Stream()

    def copy(batch: Batch) -> Batch:
        with streams.stream(side):
            return {name: value.to(device, non_blocking=True) for name, value in batch.items()}

    ready = None
    for batch in batches:
        following = copy(batch)
        if ready is not None:
            yield ready
        streams.current_stream().wait_stream(side)
        for value in following.values():
            value.record_stream(streams.current_stream())  # the side stream's memory is used on this one
        ready = following
    if ready is not None:
        yield ready
