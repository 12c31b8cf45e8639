"""The C library's allocator, told once per process to keep what it has."""

from __future__ import annotations

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory() -> None:
    """Makes glibc keep what tensors and pictures leave behind for the next ones, large ones too: nothing is unmapped.

    Every step asks for the same memory again; mapping it afresh costs 30,000 page faults a training step at 64 px, a
    seventh of its time.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)
