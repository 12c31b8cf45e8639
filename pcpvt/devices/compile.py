"""The compile seam: pure functions to faster equal ones, or to themselves, by device and by the user's choice.

A backend that generates code compiles one block of each stage, forward and backward, and all blocks of the stage run
that code: compiling takes 56 s instead of 127 s, with a warm cache 5.5 s instead of 18.5 s, and steps are as fast (S at
224 px on two Zen 4 cores). A backend that records the device's work takes the whole function, forward and backward
together (`torch.func`): there one large graph is the gain.

Shapes are fixed and nothing is drawn inside, so every step runs the same code on the same draws as in eager mode. The
fused optimizer kernels stay outside.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

from pcpvt import errors
from pcpvt.devices.base import Device
from pcpvt.errors import UserError
from pcpvt.functional.step import Objective, autograd_value_and_grad, functional_value_and_grad
from pcpvt.models.layers import Kernels

Warn = Callable[[str], None]

_GENERATES = ("inductor",)
_VARIANTS = 64  # of a block: stages, image and batch sizes, with gradient and without; dynamo's own limit is 8


def backend(device: Device, choice: str) -> str:
    """The dynamo backend that `config.compile` means on this device, or `none`."""
    return device.default_compile if choice == "auto" else choice


def compiled(function: Callable, device: Device, choice: str, warn: Warn = errors.warn) -> Callable:
    """Compile `function` as a whole if `config.compile` selects a whole-graph backend; otherwise return it unchanged.

    When the backend that `auto` chose cannot compile it, `warn` is called once and the plain function is used.

    Raises:
        UserError: when called, if a backend that was named cannot compile it.
    """
    if backend(device, choice) in ("none", *_GENERATES):
        return function
    return _Compiled(function, function, backend(device, choice), warn if choice == "auto" else None)


def compiled_blocks(kernels: Kernels, device: Device, choice: str, warn: Warn = errors.warn) -> Kernels:
    """Kernels with compiled blocks if `config.compile` selects a code-generating backend; fallback as in `compiled`."""
    if backend(device, choice) not in _GENERATES:
        return kernels
    return kernels._replace(block_fn=Blocks(kernels, backend(device, choice), warn if choice == "auto" else None))


def value_and_grad(device: Device, choice: str, warn: Warn = errors.warn) -> Callable:
    """The gradient implementation (see `functional.step`): `torch.autograd.grad`, or one compiled graph."""
    if backend(device, choice) in ("none", *_GENERATES):
        return autograd_value_and_grad

    def seam(objective: Objective, trainable: Collection[str] | None = None) -> Callable:
        plain = autograd_value_and_grad(objective, trainable)
        fast = functional_value_and_grad(objective, trainable)
        return _Compiled(fast, plain, backend(device, choice), warn if choice == "auto" else None)

    return seam


class _Compiled:
    """Calls `fast` compiled, or `plain` once a compilation has failed; without `warn` a failure is an error."""

    def __init__(self, fast: Callable, plain: Callable, backend: str | Callable, warn: Warn | None):
        self.fast, self.plain, self.backend, self.warn = fast, plain, backend, warn
        self.function: Callable | None = None

    def __call__(self, *args):
        if self.function is self.plain:
            return self.plain(*args)
        try:
            if self.function is None:
                torch._dynamo.config.recompile_limit = max(_VARIANTS, torch._dynamo.config.recompile_limit)
                # A backward is compiled with its forward, so what cannot be compiled fails here.
                torch._functorch.config.force_non_lazy_backward_lowering = True
                self.function = torch.compile(self.fast, backend=self.backend, fullgraph=True, dynamic=False)
            return self.function(*args)
        except Exception as error:
            if not _is_of_compiler(error):
                raise
            if self.warn is None:
                raise UserError(
                    f"config.compile: {self.backend!r} cannot compile here ({_reason(error)}): use config.compile=none"
                ) from error
            self.warn(f"{self.backend} cannot compile here ({_reason(error)}); going on without (config.compile=none)")
        self.function = self.plain
        return self.plain(*args)


class Blocks:
    """`layers.Kernels.block_fn` by code that the blocks of a stage share."""

    def __init__(self, kernels: Kernels, backend: str | Callable, warn: Warn | None):
        def run(block: nn.Module, x: Tensor, drop_path_scale: Tensor | None) -> Tensor:
            return block(x, kernels, drop_path_scale)

        self._compiled = _Compiled(run, run, backend, warn)

    def __call__(self, block: nn.Module, x: Tensor, kernels: Kernels, drop_path_scale: Tensor | None) -> Tensor:
        return self._compiled(block, x, drop_path_scale)


def _is_of_compiler(error: Exception) -> bool:
    """Dynamo wraps what goes wrong while it compiles; an error while compiled code runs keeps its own type."""
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException  # a second of imports

    return isinstance(error, TorchDynamoException | FailOnRecompileLimitHit | ImportError)


def _reason(error: BaseException) -> str:
    """The cause in one line; dynamo wraps what a backend raised in an exception of its own."""
    error = getattr(error, "inner_exception", error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]
