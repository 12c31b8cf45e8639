"""ONNX files, run by ONNX Runtime on the host in the precision of the graph."""

from pathlib import Path
from typing import Any

import torch

from pcpvt.runners.graph import Graph, Network, NoClassifier, sides

DESCRIPTION = "description"  # key of the metadata


def read(path: Path) -> Graph:
    """Raises NoClassifier, or whatever the packages raise for a damaged file."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in constants]
    if len(inputs) != 1 or len(model.graph.output) != 1:
        raise NoClassifier(f"has {len(inputs)} inputs and {len(model.graph.output)} outputs, not one of each")
    images, outputs = sides(_shape(inputs[0]), _shape(model.graph.output[0]))
    said = {entry.key: entry.value for entry in model.metadata_props}

    def start(precision: torch.dtype) -> tuple[Network, str]:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Threads that wait in busy loops would take the cores from the loader processes, and from a bench's other side.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3  # errors only
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        name = inputs[0].name
        return (
            lambda batch: torch.from_numpy(session.run(None, {name: batch.numpy()})[0]),
            f"ONNX Runtime {onnxruntime.__version__}",
        )

    return Graph(said.get(DESCRIPTION, ""), images, outputs, start)


def _shape(value: Any) -> tuple[int | None, ...]:
    dims = value.type.tensor_type.shape.dim
    return tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in dims)
