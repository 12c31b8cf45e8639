"""`config.export.format=openvino`: OpenVINO's `.xml` with `.bin` beside it, made from the ONNX file.

Weights are in float32, or as `int8` leaves them; OpenVINO computes the rest in bfloat16 where the processor has it,
unless it is told otherwise.
"""

import json
from pathlib import Path

from pcpvt.errors import suppress_logging
from pcpvt.export import int8, onnx
from pcpvt.export.formats import Format, Request, Written, compare, reopen
from pcpvt.export.graph import capture
from pcpvt.runners.graph import Network
from pcpvt.runners.openvino import DESCRIPTION


def write(request: Request, path: Path) -> Written:
    """Writes both files, quantised if asked to; compared with the model, in float32, before that."""
    session, model, params = request.session, request.loaded.model, request.params
    preprocess, description = session.config.export.preprocess, json.dumps(request.description)
    program, sizes = capture(model, params, session.size, session.config.export.dynamic_size, preprocess)
    source = path.with_suffix(".onnx")
    onnx.write_onnx(program, source, description)
    network = convert(source, path, description)
    cases = compare(model, params, sizes, network, "OpenVINO file", preprocess=preprocess)
    if session.config.export.quantize == "int8":
        int8.quantise(request, source)
        convert(source, path, description)
    source.unlink()
    return Written(cases, [])


def convert(source: Path, path: Path, description: str) -> Network:
    """Writes both files from an ONNX file, with the description, and loads them into OpenVINO."""
    import openvino

    with suppress_logging():
        model = openvino.convert_model(source)
    model.set_rt_info(description, DESCRIPTION)
    openvino.save_model(model, path, compress_to_fp16=False)
    return reopen(path, description)


FORMAT = Format(".xml", write, True, ("openvino", *onnx.FORMAT.packages), "openvino", preprocess=True, quantize=True)
