"""`config.export.format=openvino`: OpenVINO's `.xml` with `.bin` beside it, weights in float32."""

import json
from pathlib import Path

from torch.export import ExportedProgram

from pcpvt.errors import suppress_logging
from pcpvt.export.formats import Format, Request, Written, compare, reopen
from pcpvt.export.graph import capture, output_name
from pcpvt.runners.graph import Network
from pcpvt.runners.openvino import DESCRIPTION


def write(request: Request, path: Path) -> Written:
    session, model, params = request.session, request.loaded.model, request.params
    preprocess = session.config.export.preprocess
    program, sizes = capture(model, params, session.size, session.config.export.dynamic_size, preprocess)
    network = write_openvino(program, path, json.dumps(request.description))
    return Written(compare(model, params, sizes, network, "OpenVINO file", preprocess=preprocess), [])


def write_openvino(program: ExportedProgram, path: Path, description: str) -> Network:
    """Writes both files with the description in their runtime information, and loads them into OpenVINO."""
    import openvino

    with suppress_logging():
        model = openvino.convert_model(program)
    model.inputs[0].set_names({"images"})
    model.outputs[0].set_names({output_name(program)})
    # A captured graph says which sides are fixed, but the converter makes all of them free.
    (images,) = (n.meta["val"] for n in program.graph.nodes if n.name == program.graph_signature.user_inputs[0])
    model.reshape([side if isinstance(side, int) else -1 for side in images.shape])
    model.set_rt_info(description, DESCRIPTION)
    openvino.save_model(model, path, compress_to_fp16=False)
    return reopen(path, description)


FORMAT = Format(".xml", write, True, ("openvino",), "openvino", preprocess=True)
