"""`config.export.format=pt2`: torch.export's archive; `torch.export.load(FILE).module()(images)`."""

import io
import json
from pathlib import Path

import torch
from torch.export import ExportedProgram

from pcpvt.export.formats import Format, Request, Written, compare, reopen
from pcpvt.export.graph import capture
from pcpvt.runners.graph import Network
from pcpvt.runners.pt2 import DESCRIPTION


def write(request: Request, path: Path) -> Written:
    """Writes the archive; compared with the model."""
    session, model, params = request.session, request.loaded.model, request.params
    preprocess = session.config.export.preprocess
    program, sizes = capture(model, params, session.size, session.config.export.dynamic_size, preprocess)
    network = write_pt2(program, path, json.dumps(request.description))
    return Written(compare(model, params, sizes, network, "pt2 file", preprocess=preprocess), [])


def write_pt2(program: ExportedProgram, path: Path, description: str) -> Network:
    """Writes `.pt2` for `torch.export.load`, and loads it again."""
    buffer = io.BytesIO()  # on a full disk, PyTorch's own file writer ends the process
    torch.export.save(program, buffer, extra_files={DESCRIPTION: description})
    path.write_bytes(buffer.getbuffer())
    return reopen(path, description)


FORMAT = Format(".pt2", write, dynamic_size=True, preprocess=True)
