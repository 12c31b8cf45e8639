"""Archives of torch.export, run by PyTorch on the host in float32; packages with the same ending: `aoti`."""

from pathlib import Path
from typing import Any

import torch

from pcpvt.runners import aoti
from pcpvt.runners.graph import Graph, Network, NoClassifier, sides

DESCRIPTION = "description.json"  # the name of the description inside the archive


def read(path: Path) -> Graph:
    """Raises NoClassifier, or whatever PyTorch raises for a damaged file."""
    if aoti.is_package(path):
        return aoti.read(path)
    extra = {DESCRIPTION: ""}
    program = torch.export.load(path, extra_files=extra)
    signature = program.graph_signature
    nodes = {node.name: node for node in program.graph.nodes}
    inputs, results = signature.user_inputs, signature.user_outputs
    if len(inputs) != 1 or len(results) != 1:
        raise NoClassifier(f"has {len(inputs)} inputs and {len(results)} outputs, not one of each")
    images, outputs = sides(_shape(nodes[str(inputs[0])]), _shape(nodes[str(results[0])]))

    def start(precision: torch.dtype) -> tuple[Network, str]:
        module = program.module()

        def network(batch: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                return module(batch)

        return network, f"torch.export, PyTorch {torch.__version__}"

    return Graph(extra[DESCRIPTION], images, outputs, start)


def _shape(node: Any) -> tuple[int | None, ...]:
    return tuple(side if isinstance(side, int) else None for side in node.meta["val"].shape)
