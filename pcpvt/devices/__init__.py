"""Devices by name; torch is imported only when `get` is called."""

from __future__ import annotations

import glob
import importlib
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pcpvt.devices.base import Device


def get(name: str) -> Device:
    """The device `cpu`, `cuda` or `npu`; does not touch the hardware."""
    module = importlib.import_module(f"pcpvt.devices.{name}")
    return getattr(module, name.capitalize())()


def detect() -> str:
    """The config's ARG for this host, from its device files (no driver is loaded): `npuN`, `cudaN` or `cpu`.

    Under torchrun N is the number of processes that it started on all hosts.
    """
    world_size = os.environ.get("WORLD_SIZE", "")
    for kind, prefix in (("npu", "/dev/davinci"), ("cuda", "/dev/nvidia")):
        if count := sum(path.removeprefix(prefix).isdecimal() for path in glob.glob(f"{prefix}*")):
            return f"{kind}{world_size or count}"
    return f"cpu{world_size}"
