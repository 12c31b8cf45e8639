"""Devices by name; torch is imported only when `get` is called."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING

from pcpvt.devices import visible

if TYPE_CHECKING:
    from pcpvt.devices.base import Device


def get(name: str) -> Device:
    """The device `cpu`, `cuda` or `npu`; does not touch the hardware."""
    module = importlib.import_module(f"pcpvt.devices.{name}")
    return getattr(module, name.capitalize())()


def detect() -> str:
    """The config's ARG for this host, from the cards that it shows (no driver is loaded): `npuN`, `cudaN` or `cpu`.

    Under torchrun N is the number of processes that it started on all hosts.

    Raises:
        UserError: when the environment names cards, and this host has other ones.
    """
    world_size = os.environ.get("WORLD_SIZE", "")
    for kind in ("npu", "cuda"):
        visible.check_named(kind)
        if count := visible.count(kind):
            return f"{kind}{world_size or count}"
    return f"cpu{world_size}"
