"""`--mode=export`: a checkpoint as a file for other programs, compared with the model before it gets its final name.

    --config.export.format=timm     safetensors for timm.create_model(NAME, num_classes=N, checkpoint_path=FILE)
    --config.export.format=onnx     ONNX for any batch; with --config.export.dynamic_size=true also any size from 33 px
    --config.export.format=pt2      torch.export, likewise; torch.export.load(FILE).module()(images)

Each file contains a JSON description: class names, size, normalisation. A graph (onnx, pt2) takes `images`, float32
`[batch, 3, height, width]`, RGB, normalised ((pixel / 255 - mean) / std), as deployment tools supply them, and returns
`logits`, float32 `[batch, classes]`. Attention is not a fused operator, so the graph consists of matrix products,
softmax, layer norm, erf and one depthwise convolution per stage, which every converter knows. Export runs on the host
and needs no device.

`atc` gives the command from ONNX to Ascend's offline `.om`; a file is for one batch size and one SoC:

- `npu-smi info` names the SoC, for example Ascend310P3.
- ATC reads opsets 9 to 18 since CANN 7.0; the files here are opset 18, and their LayerNormalization needs 17.
- ATC's default precision, `fp16`, also forces norms and softmax into 16 bits; `mixed_float16` keeps those in float32,
  `origin` keeps all. Compare the `.om` with onnxruntime on some images before using it.
- ATC takes uint8 images only through AIPP (`--insert_op_conf`), which can also do the normalisation.
- Not verified here, because CANN was not available: the conversion itself, its accuracy and its speed.
"""

import importlib.util
import io
import itertools
import json
import os
import tempfile
import time
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
from pcpvt.checkpoints import foreign
from pcpvt.checkpoints.load import LoadedModel, class_names, load_configured
from pcpvt.errors import UserError, suppress_logging
from pcpvt.functional.objective import normalisation
from pcpvt.models import pcpvt
from pcpvt.models.layers import PLAIN, Kernels, PatchLinear
from pcpvt.models.pcpvt import PCPVT, Params
from pcpvt.runtime import records
from pcpvt.runtime.console import Console, duration
from pcpvt.runtime.session import Session

FORMATS = {  # to the ending of the files, and what a message calls one
    "timm": (".safetensors", "file for timm"), "onnx": (".onnx", "ONNX file"), "pt2": (".pt2", "pt2 file"),
}  # fmt: skip
OPSET = 18  # the highest that ATC reads
SMALLEST = 33  # pixels, with a dynamic size: torch.export treats a last stage of one token as a constant
TOLERANCE = 1e-4  # relative to the largest logit, or to 1; float32 rounding over 41 blocks is a hundred times less
COMPARED = (1, 3)  # batch sizes
DESCRIPTION = "description.json"  # the name of the description inside a .pt2 archive

Size = tuple[int, int]  # height, width
Network = Callable[[Tensor], Any]  # of a written file: normalised images `[b, channels, h, w]` to logits `[b, classes]`


def run(session: Session) -> int:
    """Exports one checkpoint and writes `result-export.json`; returns the exit code."""
    began = time.perf_counter()
    config, export = session.config, session.config.export
    say = Console().say
    if export.format == "timm" and export.dynamic_size:
        raise UserError("config.export.dynamic_size: weights for timm have no size: leave it out, or use onnx or pt2")
    for name in ("onnx", "onnxscript", "onnxruntime") if export.format == "onnx" else ():
        if importlib.util.find_spec(name) is None:
            raise UserError(f"config.export.format: onnx needs the package {name}: pip install 'pcpvt[export]'")
    path = destination(session)
    loaded = load_configured(config, session.workdir)
    for note in loaded.notes:
        say(f"note: {note}")
    say(f"exporting {loaded.path} ({loaded.which}) as {export.format}")
    description = json.dumps(describe(session, loaded))
    try:
        # The final name appears only after the file has been compared.
        with tempfile.TemporaryDirectory(prefix=".export-", dir=path.parent) as folder:
            cases = write(session, loaded, Path(folder) / path.name, description)
            os.replace(Path(folder) / path.name, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}): check folder and free space") from None
    seconds = time.perf_counter() - began
    result = {
        "mode": "export", "format": export.format, "output": str(path), "bytes": path.stat().st_size,
        "dynamic_size": export.dynamic_size, "verified": cases, "n_parameters": pcpvt.n_parameters(loaded.model),
        "checkpoint": loaded.path, "weights": loaded.which, "seconds": round(seconds, 2),
    }  # fmt: skip
    records.write_json(session.workdir / "result-export.json", result)
    for case in cases:
        height, width = case["size"]
        say(f"compared at batch {case['batch']}, {height}x{width} px: relative difference {case['difference']:.1e}")
    if not cases:
        say(f"not compared: timm has no model like {config.model.name}")
    say(f"written to {path}, {result['bytes'] / 1e6:.1f} MB, in {duration(seconds)}")
    if export.format == "timm" and cases:
        name, outputs = pcpvt.TIMM_NAMES[config.model.name], loaded.model.num_classes
        channels = "" if loaded.model.in_chans == 3 else f"in_chans={loaded.model.in_chans}, "
        say(f'timm.create_model("{name}", num_classes={outputs}, {channels}checkpoint_path="{path}")')
    if export.format == "onnx":
        say(f"for Ascend, where CANN is (not verified here): {atc(path, session.size)}")
    return 0


def destination(session: Session) -> Path:
    """The path of the file to write, in a folder that is created; UserError if it cannot, or for another ending."""
    export, name = session.config.export, session.config.model.name
    suffix, _ = FORMATS[export.format]
    path = Path(os.path.expanduser(export.output)) if export.output else session.workdir / "export" / f"{name}{suffix}"
    if path.suffix != suffix:
        raise UserError(f"config.export.output: {path}: {export.format} files end in {suffix}: rename it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"config.export.output: {path.parent}: {error.strerror}: choose another folder") from None
    return path


def describe(session: Session, loaded: LoadedModel) -> dict[str, Any]:
    """The description in the file: `labels` names the outputs, `classes` is None unless training named them."""
    channels, values = session.reading
    (mean, std), colours = normalisation(channels), "RGB" if channels == 3 else "as they are read"
    probabilities = {"classes": "softmax", "multilabel": "sigmoid"}[loaded.model.task]
    return {
        "model": session.config.model.name, "task": loaded.model.task,
        "input": f"images: float32 [batch, {channels}, height, width], {colours}, (pixel / 255 - mean) / std",
        "output": f"logits: float32 [batch, classes]; their {probabilities} are the probabilities",
        "image_size": list(session.size), "crop": session.config.eval.crop, "interpolation": "bicubic",
        "mean": list(mean), "std": list(std), "in_chans": channels, "value_range": values and list(values),
        "classes": loaded.classes, "labels": class_names(loaded), "checkpoint": Path(loaded.path).name,
        "weights": loaded.which, "step": loaded.meta.get("step"),
    }  # fmt: skip


def write(session: Session, loaded: LoadedModel, path: Path, description: str) -> list[dict[str, Any]]:
    """Writes the file; returns the cases in which it was compared with the model, none if timm lacks the model."""
    config, model = session.config, loaded.model
    params = {name: value.to(torch.float32) for name, value in loaded.params.items()}
    if config.export.format == "timm":
        foreign.write_timm(params, path, {foreign.DESCRIPTION: description})
        if config.model.name not in pcpvt.TIMM_NAMES:
            return []
        from pcpvt import torchvision_compat  # noqa: F401 - before timm
        import timm  # isort: skip

        name, classes = pcpvt.TIMM_NAMES[config.model.name], model.num_classes
        with suppress_logging():
            network: Network = timm.create_model(
                name, num_classes=classes, in_chans=model.in_chans, checkpoint_path=str(path)
            ).eval()
        height, width = (-(-side // pcpvt.STRIDE) * pcpvt.STRIDE for side in session.size)
        sizes = [(height, width)]  # timm pads others differently
    else:
        program, sizes = capture(model, params, session.size, config.export.dynamic_size)
        write_graph = write_onnx if config.export.format == "onnx" else write_pt2
        network = write_graph(program, path, description)
    return compare(model, params, sizes, network, FORMATS[config.export.format][1])


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
            self.model = PCPVT(model.spec, model.num_classes, model.pad, model.in_chans)
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
        program = torch.export.export(deployed, (torch.zeros(2, model.in_chans, *sizes[-1]),), dynamic_shapes=shapes)
    return program, sizes


def compare(model: PCPVT, params: Params, sizes: Sequence[Size], network: Network, what: str) -> list[dict[str, Any]]:
    """Compares a written model's logits with ours at each size and each batch size of COMPARED.

    Returns `batch`, `size` and relative `difference` of each case; UserError, naming the file, above TOLERANCE.
    """
    cases = []
    for size, batch in itertools.product(sizes, COMPARED):
        noise = rng.generator(0, "export", batch, *size).standard_normal(
            (batch, model.in_chans, *size), dtype=np.float32
        )
        images = torch.from_numpy(noise)
        with torch.no_grad():
            expected = pcpvt.apply(model, params, rearrange(images, "b c h w -> b h w c"))
            difference = (torch.as_tensor(network(images)) - expected).abs().max().item()
        relative = difference / max(1.0, expected.abs().max().item())
        if not relative <= TOLERANCE:  # also nan
            raise UserError(
                f"config.export.format: the {what}, with batch {batch} at {size[0]}x{size[1]} px, differs from the "
                f"model by {relative:.1e}: it was not kept: try another version of torch"
            )
        cases.append({"batch": batch, "size": list(size), "difference": relative})
    return cases


def write_pt2(program: ExportedProgram, path: Path, description: str) -> Network:
    """Writes `.pt2` for `torch.export.load`, and loads it again."""
    buffer = io.BytesIO()  # on a full disk, PyTorch's own file writer ends the process
    torch.export.save(program, buffer, extra_files={DESCRIPTION: description})
    path.write_bytes(buffer.getbuffer())
    extra = {DESCRIPTION: ""}
    loaded = torch.export.load(path, extra_files=extra).module()
    assert extra[DESCRIPTION] == description, extra
    return loaded


def write_onnx(program: ExportedProgram, path: Path, description: str) -> Network:
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
