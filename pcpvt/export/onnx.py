"""`config.export.format=onnx`: ONNX, for every runtime and converter.

`atc` gives the command from ONNX to Ascend's offline `.om`; a file is for one batch size and one SoC:

- `npu-smi info` names the SoC, for example Ascend310P3.
- ATC reads opsets 9 to 18 since CANN 7.0; the files here are opset 18, and their LayerNormalization needs 17.
- ATC's default precision, `fp16`, also forces norms and softmax into 16 bits; `mixed_float16` keeps those in float32,
  `origin` keeps all. Compare the `.om` with onnxruntime on some images before using it.
- ATC takes uint8 images only through AIPP (`--insert_op_conf`), which can also do the normalisation.
- Not verified here, because CANN was not available: the conversion itself, its accuracy and its speed.
"""

import json
from pathlib import Path

import torch
from torch.export import ExportedProgram

from pcpvt.errors import suppress_logging
from pcpvt.export import int8
from pcpvt.export.formats import Format, Request, Size, Written, compare, reopen
from pcpvt.export.graph import capture, output_name
from pcpvt.runners.graph import Network
from pcpvt.runners.onnx import DESCRIPTION

OPSET = 18  # the highest that ATC reads


def write(request: Request, path: Path) -> Written:
    """Writes the file, quantised if asked to; compared with the model, in float32, before that."""
    session, model, params = request.session, request.loaded.model, request.params
    preprocess = session.config.export.preprocess
    program, sizes = capture(model, params, session.size, session.config.export.dynamic_size, preprocess)
    network = write_onnx(program, path, json.dumps(request.description))
    cases = compare(model, params, sizes, network, "ONNX file", preprocess=preprocess)
    if session.config.export.quantize == "int8":
        int8.quantise(request, path)
    if preprocess or session.config.export.quantize != "none":  # ATC quantises itself, and takes pixels through AIPP
        return Written(cases, [])
    command = atc(request.output, session.size, model.in_chans)
    return Written(cases, [f"for Ascend, where CANN is (not verified here): {command}"])


def write_onnx(program: ExportedProgram, path: Path, description: str) -> Network:
    """Writes ONNX with the description in its metadata, and loads it into onnxruntime."""
    with suppress_logging():
        onnx = torch.onnx.export(
            program, input_names=["images"], output_names=[output_name(program)], opset_version=OPSET, verbose=False
        )
    assert onnx is not None
    onnx.model.metadata_props[DESCRIPTION] = description
    onnx.save(str(path), external_data=False)
    return reopen(path, description)


def atc(path: Path, size: Size, channels: int, batch: int = 8) -> str:
    """The command that converts an ONNX file to an `.om` for one batch size; see the top of this module."""
    return (
        f"atc --framework=5 --model={path} --output={path.with_suffix('')}_b{batch} --input_format=NCHW "
        f'--input_shape="images:{batch},{channels},{size[0]},{size[1]}" --soc_version=YOUR_SOC '
        "--precision_mode_v2=mixed_float16"
    )


FORMAT = Format(".onnx", write, True, ("onnx", "onnxscript", "onnxruntime"), "export", preprocess=True, quantize=True)
