"""`config.export.format=aoti`: the model compiled ahead of time by AOTInductor, for this processor.

The code computes in `config.precision`, with its weights packed for the matrix products of that precision. It runs in
the same build of PyTorch on processors with the same instructions: `torch._inductor.aoti_load_package(FILE)(images)`.
"""

import functools
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from pcpvt import devices
from pcpvt.errors import UserError, one_line, suppress_logging
from pcpvt.export.formats import TOLERANCE, Format, Request, Size, Written, compare, reopen
from pcpvt.export.graph import capture
from pcpvt.functional import precision
from pcpvt.functional.flat import pack
from pcpvt.models.layers import PLAIN
from pcpvt.models.pcpvt import PCPVT, Params
from pcpvt.runners import aoti
from pcpvt.runners.graph import Network
from pcpvt.runtime.session import Session

OPTIONS = {
    "freezing": True,  # weights are constants, in the format of the products
    "cpp.dynamic_threads": True,  # as many as the program that loads it has, not as many as now
}
NOTE = "the code is for this processor and this build of PyTorch: export again where either changes"


def write(request: Request, path: Path) -> Written:
    """Writes the package; it may be twice as far from the float32 model as the same graph is without compiling."""
    session, model, params = request.session, request.loaded.model, request.params
    program, sizes = make_graph(session, model, params)
    network = compile_graph(program, path, describe(session, model, request.description))
    check = functools.partial(compare, model, params, sizes, preprocess=session.config.export.preprocess)
    rounding = max(case["difference"] for case in check(program.module(), "graph", tolerance=math.inf))  # 0 in float32
    return Written(check(network, "package", tolerance=max(TOLERANCE, 2 * rounding)), [NOTE])


def make_graph(session: Session, model: PCPVT, params: Params) -> tuple[ExportedProgram, list[Size]]:
    """The graph in the session's precision, with the kernels of CPUs, of float32 params on the host."""
    cpu, compute = devices.get("cpu"), session.policy.compute
    kernels = PLAIN if session.config.kernels == "plain" else cpu.kernels(compute, compiled=True)
    cast = precision.cast(pack(params), session.policy, cpu.fp32_norms)
    # The names are views into one tensor, which the package would hold as often as there are names.
    own = {name: value.clone() for name, value in cast.items()}
    preprocess = session.config.export.preprocess
    return capture(model, own, session.size, False, preprocess, compute=compute, kernels=kernels)


def describe(session: Session, model: PCPVT, said: dict[str, Any]) -> str:
    """A description as JSON, with what `runners.aoti.read` needs."""
    own = {
        "image_size": list(session.size), "in_chans": model.in_chans, "outputs": model.num_classes,
        "preprocess": session.config.export.preprocess, "compiled": aoti.host(),
        "precision": str(session.policy.compute).removeprefix("torch."),
    }  # fmt: skip
    return json.dumps({**said, **own})


def compile_graph(program: ExportedProgram, path: Path, description: str) -> Network:
    """Compiles a graph into a package, which takes a minute for S, and loads it."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise UserError(
            f"config.export.format: aoti needs a C++ compiler and {compiler!r} is not found: install g++, or name one "
            "in the environment variable CXX"
        )
    from torch._inductor.utils import fresh_cache  # a second of imports

    # Inductor freezes weights only without gradients. Its cache, 100 MB for S, is of no use afterwards.
    with torch.no_grad(), fresh_cache(), suppress_logging():
        options = {**OPTIONS, "aot_inductor.metadata": {aoti.DESCRIPTION: description}}
        try:
            torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=options)
        except Exception as error:  # inductor raises what it likes, and what the compiler says
            raise UserError(
                f"config.export.format: aoti: PyTorch cannot compile the model here ({type(error).__name__}: "
                f"{one_line(error)}): use openvino or onnx"
            ) from error
    return reopen(path, description)


FORMAT = Format(".pt2", write, dynamic_size=False, preprocess=True, tag="-aoti")
