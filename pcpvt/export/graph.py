"""A model as a graph for other programs: captured by torch.export, written as `.pt2` or ONNX, and compared with ours.

The graph takes `images`, float32 `[batch, 3, height, width]`, RGB, normalised ((pixel / 255 - mean) / std), as
deployment tools supply them, and returns `logits`, float32 `[batch, classes]`. Attention is not a fused operator, so
the graph consists of matrix products, softmax, layer norm, erf and one depthwise convolution per stage, which every
converter knows.

`atc` gives the command from ONNX to Ascend's offline `.om`; a file is for one batch size and one SoC:

- `npu-smi info` names the SoC, for example Ascend310P3.
- ATC reads opsets 9 to 18 since CANN 7.0; the files here are opset 18, and their LayerNormalization needs 17.
- ATC's default precision, `fp16`, also forces norms and softmax into 16 bits; `mixed_float16` keeps those in float32,
  `origin` keeps all. Compare the `.om` with onnxruntime on some images before using it.
- ATC takes uint8 images only through AIPP (`--insert_op_conf`), which can also do the normalisation.
- Not verified here, because CANN was not available: the conversion itself, its accuracy and its speed.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from pcpvt import rng
from pcpvt.errors import UserError, suppress_logging
from pcpvt.models import pcpvt
from pcpvt.models.layers import PLAIN, Kernels, PatchLinear
from pcpvt.models.pcpvt import PCPVT, Params

OPSET = 18  # the highest that ATC reads
SMALLEST = 33  # pixels, with a dynamic size: torch.export treats a last stage of one token as a constant
TOLERANCE = 1e-4  # relative to the largest logit, or to 1; float32 rounding over 41 blocks is a hundred times less
COMPARED = (1, 3)  # batch sizes
DESCRIPTION = "description.json"  # the name of the description inside a .pt2 archive

Size = tuple[int, int]  # height, width
Run = Callable[[Tensor], Any]  # normalised images `[b, 3, h, w]` to logits `[b, classes]`, by a written file


class AnySize(PatchLinear):
    """PatchLinear without a branch on the size, so that one graph is valid for all sizes; with equal results."""

    def forward(self, x: Tensor, kernels: Kernels = PLAIN) -> Tensor:
        p = self.patch
        rows, columns = (x.shape[1] + p - 1) // p, (x.shape[2] + p - 1) // p
        x = F.pad(x, (0, 0, 0, columns * p - x.shape[2], 0, rows * p - x.shape[1]))
        x = rearrange(x, "b (h p) (w q) c -> b h w (p q c)", h=rows, w=columns, p=p, q=p)
        return kernels.linear(x, rearrange(self.weight, "o c p q -> o (p q c)"), self.bias)


class Deployed(nn.Module):
    """The model with its weights, from NCHW images to logits."""

    def __init__(self, model: PCPVT, params: Params, dynamic_size: bool):
        super().__init__()
        with torch.device("meta"):
            self.model = PCPVT(model.spec, model.num_classes, model.pad)
            for parent in list(self.model.modules()) if dynamic_size else []:
                for name, child in parent.named_children():
                    if isinstance(child, PatchLinear):
                        c_out, c_in, patch, _ = child.weight.shape
                        setattr(parent, name, AnySize(c_in, c_out, patch))
        self.model.load_state_dict(params, assign=True)
        self.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        return self.model(rearrange(images, "b c h w -> b h w c"))


def capture(model: PCPVT, params: Params, size: Size, dynamic_size: bool) -> tuple[ExportedProgram, list[Size]]:
    """The graph of a model for any batch size, and the sizes at which a written file should be compared with the model.

    The params are float32. The graph takes images of one size, or with `dynamic_size` of any from SMALLEST; raises
    UserError when the model then does not pad, or `size` is below SMALLEST.
    """
    sizes, axes = [size], {}
    if dynamic_size:
        if model.pad != "pad":
            raise UserError("config.export.dynamic_size: needs padding: use config.model.pad=pad, or leave it out")
        if min(size) < SMALLEST:
            raise UserError(
                f"config.export.dynamic_size: takes images from {SMALLEST} px and config.image_size is {min(size)}: "
                "leave it out, or give a larger config.image_size"
            )
        sizes += [(size[0] + 13, size[1] + 38)]  # not square, and no multiple of 4 px (the first patch) if `size` is
        axes = {2: Dim("height", min=SMALLEST), 3: Dim("width", min=SMALLEST)}
    deployed = Deployed(model, params, dynamic_size)
    shapes = {"images": {0: Dim("batch"), **axes}}
    with suppress_logging():
        program = torch.export.export(deployed, (torch.zeros(2, 3, *sizes[-1]),), dynamic_shapes=shapes)
    return program, sizes


def compare(model: PCPVT, params: Params, sizes: Sequence[Size], run: Run, what: str) -> list[dict[str, Any]]:
    """Compares the logits of a written model with ours, at each size and each batch size of COMPARED.

    Returns `batch`, `size` and relative `difference` of each case; raises UserError, in which `what` names the file,
    when a difference exceeds TOLERANCE.
    """
    cases = []
    for size, batch in itertools.product(sizes, COMPARED):
        noise = rng.generator(0, "export", batch, *size).standard_normal((batch, 3, *size), dtype=np.float32)
        images = torch.from_numpy(noise)
        with torch.no_grad():
            expected = pcpvt.apply(model, params, rearrange(images, "b c h w -> b h w c"))
            difference = (torch.as_tensor(run(images)) - expected).abs().max().item()
        relative = difference / max(1.0, expected.abs().max().item())
        if not relative <= TOLERANCE:  # also nan
            raise UserError(
                f"config.export.format: the {what}, with batch {batch} at {size[0]}x{size[1]} px, differs from the "
                f"model by {relative:.1e}: it was not kept: try another version of torch"
            )
        cases.append({"batch": batch, "size": list(size), "difference": relative})
    return cases


def write_pt2(program: ExportedProgram, path: Path, description: str) -> Run:
    """Writes `.pt2` for `torch.export.load`, and loads it again."""
    buffer = io.BytesIO()  # on a full disk, PyTorch's own file writer ends the process
    torch.export.save(program, buffer, extra_files={DESCRIPTION: description})
    path.write_bytes(buffer.getbuffer())
    extra = {DESCRIPTION: ""}
    loaded = torch.export.load(path, extra_files=extra).module()
    assert extra[DESCRIPTION] == description, extra
    return loaded


def write_onnx(program: ExportedProgram, path: Path, description: str) -> Run:
    """Writes ONNX with the description in its metadata, and loads it into onnxruntime."""
    import onnxruntime

    with suppress_logging():
        onnx = torch.onnx.export(
            program, input_names=["images"], output_names=["logits"], opset_version=OPSET, verbose=False
        )
    assert onnx is not None
    onnx.model.metadata_props["description"] = description
    onnx.save(str(path), external_data=False)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert session.get_modelmeta().custom_metadata_map["description"] == description
    return lambda images: session.run(["logits"], {"images": images.numpy()})[0]


def atc(path: Path, size: Size, batch: int = 8) -> str:
    """The command that converts an ONNX file to an `.om` for one batch size; see the top of this module."""
    return (
        f"atc --framework=5 --model={path} --output={path.with_suffix('')}_b{batch} --input_format=NCHW "
        f'--input_shape="images:{batch},3,{size[0]},{size[1]}" --soc_version=YOUR_SOC '
        "--precision_mode_v2=mixed_float16"
    )
