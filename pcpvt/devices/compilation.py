"""The compile seam: pure functions to faster equal ones, or to themselves, by device and by the user's choice.

A gradient is compiled as one function, forward and backward together (`torch.func`), so no backward is compiled behind
the caller's back and whatever fails to compile fails here. Shapes are fixed and nothing is drawn inside, so every step
runs the same code on the same draws as in eager mode. The fused optimizer kernels stay outside.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection

import torch

from pcpvt.devices import collectives
from pcpvt.devices.base import Device
from pcpvt.errors import UserError, printable, put
from pcpvt.functional.step import Objective, autograd_value_and_grad, functional_value_and_grad


def backend(device: Device, choice: str) -> str:
    """The dynamo backend that `config.compile` means on this device, or `none`."""
    return device.default_compile if choice == "auto" else choice


def compiled(function: Callable, device: Device, choice: str) -> Callable:
    """`function` compiled as `config.compile` says: `auto` takes the device's default, `none` leaves it as it is.

    When the backend that `auto` chose cannot compile it, one warning is printed and the plain function is used.

    Raises:
        UserError: when called, if a backend that was named cannot compile it.
    """
    if backend(device, choice) == "none":
        return function
    return _Compiled(function, function, backend(device, choice), falls_back=choice == "auto")


def value_and_grad(device: Device, choice: str) -> Callable:
    """How a gradient is taken here (see `functional.step`): by `torch.autograd.grad`, or in one compiled graph."""
    if backend(device, choice) == "none":
        return autograd_value_and_grad

    def seam(objective: Objective, trainable: Collection[str] | None = None) -> Callable:
        plain = autograd_value_and_grad(objective, trainable)
        fast = functional_value_and_grad(objective, trainable)
        return _Compiled(fast, plain, backend(device, choice), falls_back=choice == "auto")

    return seam


class _Compiled:
    """Calls `fast` compiled; after a failure to compile `plain`, for good."""

    def __init__(self, fast: Callable, plain: Callable, backend: str, falls_back: bool):
        self.fast, self.plain, self.backend, self.falls_back = fast, plain, backend, falls_back
        self.function: Callable | None = None

    def __call__(self, *args):
        if self.function is self.plain:
            return self.plain(*args)
        try:
            if self.function is None:
                self.function = torch.compile(self.fast, backend=self.backend, fullgraph=True, dynamic=False)
            return self.function(*args)
        except Exception as error:
            if not _is_of_compiler(error):
                raise
            if not self.falls_back:
                raise UserError(
                    f"config.compile: {self.backend!r} cannot compile here ({_reason(error)}): use config.compile=none"
                ) from error
            warning = f"{self.backend} cannot compile here ({_reason(error)}); going on without (config.compile=none)"
        if collectives.first_to_say(warning):
            put(f"pcpvt: warning: {printable(warning)}\n", sys.stderr)
        self.function = self.plain
        return self.plain(*args)


def _is_of_compiler(error: Exception) -> bool:
    """Dynamo wraps what goes wrong while it compiles; an error while compiled code runs keeps its own type."""
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException  # a second of imports

    return isinstance(error, TorchDynamoException | FailOnRecompileLimitHit | ImportError)


def _reason(error: BaseException) -> str:
    """The cause in one line; dynamo wraps what a backend raised in an exception of its own."""
    error = getattr(error, "inner_exception", error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]
