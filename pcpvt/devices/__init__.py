"""Devices by name; torch is imported only when one is asked for."""

from __future__ import annotations

import glob
import os
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pcpvt.devices.base import Device


def get(name: str) -> Device:
    """The device class instance for `cpu`, `cuda` or `npu`; does not touch the hardware."""
    if name == "npu":
        from pcpvt.devices.npu import Npu

        return Npu()
    if name == "cuda":
        from pcpvt.devices.cuda import Cuda

        return Cuda()
    from pcpvt.devices.cpu import Cpu

    return Cpu()


def detect() -> str:
    """ARG for what this host has, by its device files (no driver is loaded): `npuN`, `cudaN` or `cpu`.

    Under torchrun N is the number of processes that it started, on all hosts.
    """
    started = os.environ.get("WORLD_SIZE", "")
    for kind, pattern, digits in (("npu", "/dev/davinci*", r"davinci\d+"), ("cuda", "/dev/nvidia*", r"nvidia\d+")):
        found = [path for path in glob.glob(pattern) if re.fullmatch(digits, path.rsplit("/", 1)[1])]
        if found:
            return f"{kind}{started or len(found)}"
    return f"cpu{started}"
