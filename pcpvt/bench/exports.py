"""Peers of the benchmark that run a graph on the host: `onnx`, `openvino` and `aoti`, made of our model, and files."""

import tempfile
from pathlib import Path

import torch

from pcpvt.export import aoti, onnx, openvino
from pcpvt.export.formats import Format
from pcpvt.export.graph import capture
from pcpvt.models.pcpvt import PCPVT, Params
from pcpvt.runners.exported import is_graph, require
from pcpvt.runners.runner import Runner, open_graph
from pcpvt.runtime.session import Session

FORMATS: dict[str, Format] = {"onnx": onnx.FORMAT, "openvino": openvino.FORMAT, "aoti": aoti.FORMAT}


def is_export(peer: str) -> bool:
    """Whether a name in `config.bench.against` is one of these peers."""
    return peer in FORMATS or is_graph(peer)


def check(peer: str) -> None:
    """Raises UserError when the packages that a peer needs are not installed."""
    if peer in FORMATS:
        require(FORMATS[peer].packages, FORMATS[peer].extra, f"config.bench.against: {peer}")


def open_peer(session: Session, model: PCPVT, params: Params, peer: str) -> Runner:
    """A peer that is ready to run; UserError for a file that takes other images."""
    if peer not in FORMATS:
        return open_graph(session, peer)
    host = {name: value.to("cpu", torch.float32) for name, value in params.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model").with_suffix(FORMATS[peer].suffix)
        if peer == "aoti":
            aoti.compile_graph(aoti.make_graph(session, model, host)[0], path, aoti.describe(session, model, {}))
        else:
            program, _ = capture(model, host, session.size, dynamic_size=False)
            onnx.write_onnx(program, path.with_suffix(".onnx"), "{}")
        if peer == "openvino":
            openvino.convert(path.with_suffix(".onnx"), path, "{}")
        return open_graph(session, str(path))
