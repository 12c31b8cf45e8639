"""OpenVINO's files, `.xml` with `.bin` beside it, run on the host in float32 or bfloat16."""

from pathlib import Path
from typing import Any

import torch

from pcpvt.runners.graph import Graph, Network, NoClassifier, sides

DESCRIPTION = ["pcpvt", "description"]  # path in the file's runtime information
HINTS = {torch.bfloat16: "bf16", torch.float16: "f16"}  # float32 otherwise


def read(path: Path) -> Graph:
    """Raises NoClassifier, or whatever OpenVINO raises for a damaged file."""
    import openvino

    weights = path.with_suffix(".bin")
    if not weights.is_file():
        raise NoClassifier(f"lacks its weights, {weights.name} beside it")
    core = openvino.Core()
    model = core.read_model(path)
    if len(model.inputs) != 1 or len(model.outputs) != 1:
        raise NoClassifier(f"has {len(model.inputs)} inputs and {len(model.outputs)} outputs, not one of each")
    images, outputs = sides(_shape(model.inputs[0]), _shape(model.outputs[0]))
    said = str(model.get_rt_info(DESCRIPTION).astype(str)) if model.has_rt_info(DESCRIPTION) else ""

    def start(precision: torch.dtype) -> tuple[Network, str]:
        options = {"INFERENCE_PRECISION_HINT": HINTS.get(precision, "f32"), "PERFORMANCE_HINT": "LATENCY"}
        compiled = core.compile_model(model, "CPU", {**options, "INFERENCE_NUM_THREADS": torch.get_num_threads()})
        kind = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        version = openvino.__version__.partition("-")[0]
        return lambda batch: torch.from_numpy(compiled(batch.numpy())[0]), f"OpenVINO {version}, {kind}"

    return Graph(said, images, outputs, start)


def _shape(port: Any) -> tuple[int | None, ...]:
    return tuple(side.get_length() if side.is_static else None for side in port.partial_shape)
