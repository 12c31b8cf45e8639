"""Ahead-of-time compilation of inference for CPUs: AOTInductor's packages, whose code starts without a compiler.

The weights are constants of the graph: those of products lie in oneDNN's format, and bias, GELU and residual sums are
done by the product itself; all between products becomes a few loops. A package holds machine code, for processors with
the instructions of the one that compiled it, and for the version of PyTorch that did.
"""

import io
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram

from pcpvt.errors import suppress_logging


def compile_package(program: ExportedProgram) -> io.BytesIO:
    """A program with one input and one output as the bytes of a `.pt2` package; raises whatever PyTorch raises."""
    from torch._inductor import aoti_compile_and_package  # a second of imports

    package = io.BytesIO()  # on a full disk, PyTorch's own file writer ends the process
    with suppress_logging(), torch.no_grad():
        aoti_compile_and_package(program, package_path=package, inductor_configs={"freezing": True})
    return package


def load_package(path: Path) -> Callable[[Tensor], Tensor]:
    """The compiled function of a package; raises whatever PyTorch raises. Runs the machine code that is in it."""
    from torch._inductor import aoti_load_package

    with suppress_logging():
        return aoti_load_package(str(path))


def instructions() -> str:
    """The sets of instructions of this processor, as a text to compare."""
    capabilities = torch.cpu.get_capabilities()
    return " ".join(sorted(name for name, found in capabilities.items() if found is True))
