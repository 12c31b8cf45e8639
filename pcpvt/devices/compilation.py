"""The compile seam: a pure function to a faster equal one, or to itself, by device and by the user's choice."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

from pcpvt.devices.base import Device


def compiled(function: Callable, device: Device, choice: str) -> Callable:
    """`function` compiled as `config.compile` says: `auto` takes the device's default, `none` leaves it as it is.

    The backend chosen by `auto` may fail: the run then goes on in eager mode, with one warning. A backend that was named
    stops the run instead.
    """
    backend = device.default_compile if choice == "auto" else choice
    if backend == "none":
        return function
    fast = torch.compile(function, backend=backend, fullgraph=True, dynamic=False)
    return fast if choice != "auto" else _Fallback(fast, function, backend)


class _Fallback:
    """Calls the compiled function, and the plain one for good after the first failure to compile."""

    def __init__(self, fast: Callable, plain: Callable, backend: str):
        self.function, self.plain, self.backend = fast, plain, backend

    def __call__(self, *args):
        if self.function is self.plain:
            return self.plain(*args)
        try:
            return self.function(*args)
        except (torch._dynamo.exc.TorchDynamoException, ImportError) as error:
            reason = str(error).strip().splitlines()[0][:200]
            print(
                f"pcpvt: warning: {self.backend} could not compile ({reason}): going on without",
                file=sys.stderr,
                flush=True,
            )
            self.function = self.plain
            return self.plain(*args)
