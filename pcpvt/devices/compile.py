"""Compilation of pure functions with `torch.compile`, as the device and `config.compile` select.

A backend that generates code (inductor) compiles one block of each stage, forward and backward, and all blocks of the
stage run that code: compiling takes 56 s instead of 127 s, with a warm cache 5.5 s instead of 18.5 s, and steps are as
fast (S at 224 px on two Zen 4 cores). A backend that records the device's work (npugraphs) takes the whole function,
forward and backward together (`torch.func`), because it gains from one large graph.

Shapes are fixed and nothing is drawn inside, so every step runs the same code on the same draws as in eager mode.
The fused optimizer kernels are not compiled.
"""

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

from pcpvt import errors
from pcpvt.devices.base import Device
from pcpvt.errors import UserError
from pcpvt.functional.step import Objective, autograd_value_and_grad, functional_value_and_grad
from pcpvt.models.layers import Kernels

Warn = Callable[[str], None]

_GENERATES_CODE = ("inductor",)
_VARIANTS = 64  # of a block: stages, image and batch sizes, with and without gradients; dynamo's default limit is 8


def backend(device: Device, choice: str) -> str:
    """The dynamo backend that `config.compile` selects on this device, or `none`."""
    return device.default_compile if choice == "auto" else choice


def compiled(function: Callable, device: Device, choice: str, warn: Warn = errors.warn) -> Callable:
    """Compiles `function` as a whole if `config.compile` selects a whole-graph backend; otherwise returns it unchanged.

    If the backend that `auto` selected cannot compile it, `warn` is called once and the plain function is used.

    Raises:
        UserError: when called, if a backend that the user named cannot compile it.
    """
    if backend(device, choice) in ("none", *_GENERATES_CODE):
        return function
    return _Compiled(function, function, backend(device, choice), warn if choice == "auto" else None)


def compiled_blocks(kernels: Kernels, device: Device, choice: str, warn: Warn = errors.warn) -> Kernels:
    """Kernels with compiled blocks if `config.compile` selects a code-generating backend; fallback as in `compiled`."""
    if backend(device, choice) not in _GENERATES_CODE:
        return kernels

    def run(block: nn.Module, x: Tensor, drop_path_scale: Tensor | None) -> Tensor:
        return block(x, kernels, drop_path_scale)

    shared = _Compiled(run, run, backend(device, choice), warn if choice == "auto" else None)
    return kernels._replace(block_fn=lambda block, x, _, drop_path_scale: shared(block, x, drop_path_scale))


def value_and_grad(device: Device, choice: str, warn: Warn = errors.warn) -> Callable:
    """The gradient implementation (see `functional.step`): `torch.autograd.grad`, or one compiled graph."""
    if backend(device, choice) in ("none", *_GENERATES_CODE):
        return autograd_value_and_grad

    def differentiate(objective: Objective, trainable: Collection[str] | None = None) -> Callable:
        plain = autograd_value_and_grad(objective, trainable)
        traceable = functional_value_and_grad(objective, trainable)
        return _Compiled(traceable, plain, backend(device, choice), warn if choice == "auto" else None)

    return differentiate


class _Compiled:
    """Calls `traceable` compiled, or `plain` after a failed compilation; without `warn` a failure is a UserError."""

    def __init__(self, traceable: Callable, plain: Callable, backend: str | Callable, warn: Warn | None):
        self.traceable, self.plain, self.backend, self.warn = traceable, plain, backend, warn
        self.function: Callable | None = None  # compiled at the first call, because importing dynamo takes a second

    def __call__(self, *args):
        if self.function is self.plain:
            return self.plain(*args)
        try:
            if self.function is None:
                torch._dynamo.config.recompile_limit = max(_VARIANTS, torch._dynamo.config.recompile_limit)
                # Compile the backward together with the forward, so that its failure is caught here too.
                torch._functorch.config.force_non_lazy_backward_lowering = True
                self.function = torch.compile(self.traceable, backend=self.backend, fullgraph=True, dynamic=False)
            return self.function(*args)
        except Exception as error:
            if not _is_compiler_error(error):
                raise
            problem = f"cannot compile here ({_reason(error)})"
            if self.warn is None:
                raise UserError(f"config.compile: {self.backend!r} {problem}: use config.compile=none") from error
            self.warn(f"{self.backend} {problem}; going on without (config.compile=none)")
        self.function = self.plain
        return self.plain(*args)


def _is_compiler_error(error: Exception) -> bool:
    """Whether compilation failed: dynamo wraps such errors, while errors of running compiled code keep their type."""
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException  # a second of imports

    return isinstance(error, TorchDynamoException | FailOnRecompileLimitHit | ImportError)


def _reason(error: BaseException) -> str:
    """The cause in one line; dynamo wraps the error of a backend in an exception of its own."""
    error = getattr(error, "inner_exception", error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]
