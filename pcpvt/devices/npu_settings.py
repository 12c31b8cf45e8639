"""Environment variables of processes that use an NPU: one table, of which docs/pods.md is a copy.

The launcher sets them before its ranks import torch_npu; a process that it has not started sets them before its first
operation on the device. What the environment already has is kept.
"""

from collections.abc import Callable
from typing import NamedTuple


class Setting(NamedTuple):
    """A variable's value, what it is good for, and the document that defines it."""

    value: str
    why: str
    source: str
    of_timeout: Callable[[int], int] | None = None  # from `config.timeout` in seconds, where `value` says in words how


def within(low: int, high: int) -> Callable[[int], int]:
    """6/7 of the timeout, in the range that CANN allows: 1800 s of the default 2100 s."""
    return lambda timeout: min(max(timeout * 6 // 7, low), high)


SETTINGS = {
    "HCCL_EXEC_TIMEOUT": Setting(
        "6/7 of `config.timeout`, 68 to 17340 s",
        "the longest wait in a collective; below the limit of the process group, so that HCCL reports the error",
        "CANN: HCCL_EXEC_TIMEOUT; torch_npu: TORCH_HCCL_ASYNC_ERROR_HANDLING",
        within(68, 17340),
    ),
    "HCCL_CONNECT_TIMEOUT": Setting(
        "6/7 of `config.timeout`, 120 to 7200 s",
        "the longest wait for the others to connect; CANN's default, 120 s, is less than a node's start may take",
        "CANN: HCCL_CONNECT_TIMEOUT",
        within(120, 7200),
    ),
    "HCCL_WHITELIST_DISABLE": Setting(
        "1", "nodes connect without a file that lists them", "CANN: HCCL_WHITELIST_DISABLE"
    ),
    "PYTORCH_NPU_ALLOC_CONF": Setting(
        "expandable_segments:True",
        "memory segments grow, so that changing sizes (training and evaluation) do not fragment it",
        "torch_npu: PYTORCH_NPU_ALLOC_CONF",
    ),
    "TASK_QUEUE_ENABLE": Setting(
        "2", "a second thread launches operators and prepares their workspaces", "torch_npu: TASK_QUEUE_ENABLE"
    ),
    "CPU_AFFINITY_CONF": Setting(
        "1", "each card's process stays on its own share of the cores", "torch_npu: CPU_AFFINITY_CONF"
    ),
    "OMP_NUM_THREADS": Setting(
        "1", "operators on the host are small: more threads take cores of loader processes", "PyTorch: CPU threading"
    ),
}  # fmt: skip


def environment(timeout: int) -> dict[str, str]:
    """The table's variables and values; `timeout` is `config.timeout`, in seconds."""
    return {name: str(s.of_timeout(timeout)) if s.of_timeout else s.value for name, s in SETTINGS.items()}
