"""`--mode=export`: a checkpoint as a file for other programs, compared with the model before it gets its final name.

    --config.export.format=timm     safetensors for timm.create_model(NAME, num_classes=N, checkpoint_path=FILE)
    --config.export.format=onnx     ONNX for any batch; with --config.export.dynamic_size=true also any size from 33 px
    --config.export.format=openvino OpenVINO's .xml and .bin, likewise
    --config.export.format=pt2      torch.export, likewise; torch.export.load(FILE).module()(images)
    --config.export.format=aoti     .pt2 with code compiled for this processor
    --config.export.format=hub      a folder for timm.create_model("local-dir:FOLDER") and Transformers
    --config.export.format=om       a folder with all that a conversion to Ascend's .om needs

Each file contains a JSON description: class names, size, normalisation. A graph takes `images`, float32
`[batch, 3, height, width]`, RGB, normalised ((pixel / 255 - mean) / std), as deployment tools supply them, and returns
`logits`, float32 `[batch, classes]`; with `config.export.preprocess` it takes uint8 `[batch, height, width, 3]` and
returns `probabilities`. Attention is not a fused operator, so the graph consists of matrix products,
softmax, layer norm, erf and one depthwise convolution per stage, which every converter knows. Export runs on the host
and needs no device.
"""

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from ml_collections import ConfigDict

from pcpvt.checkpoints.load import LoadedModel, class_names, load_configured
from pcpvt.errors import UserError
from pcpvt.export import aoti, folders, hub, int8, om, onnx, openvino, pt2, timm
from pcpvt.export.formats import Format, Request
from pcpvt.functional.objective import normalisation
from pcpvt.models import pcpvt
from pcpvt.runners.exported import require
from pcpvt.runtime import records
from pcpvt.runtime.console import Console, duration
from pcpvt.runtime.session import Session

FORMATS: dict[str, Format] = {
    "timm": timm.FORMAT, "onnx": onnx.FORMAT, "pt2": pt2.FORMAT, "openvino": openvino.FORMAT, "hub": hub.FORMAT,
    "om": om.FORMAT, "aoti": aoti.FORMAT,
}  # fmt: skip


def run(session: Session) -> int:
    """Exports one checkpoint and writes `result-export.json`; returns the exit code."""
    began = time.perf_counter()
    config, export = session.config, session.config.export
    say = Console().say
    chosen = FORMATS[export.format]
    check_options(config)
    require(chosen.packages, chosen.extra, f"config.export.format: {export.format}")
    path = destination(session)
    loaded = load_configured(config, session.workdir)
    for note in loaded.notes:
        say(f"note: {note}")
    say(f"exporting {loaded.path} ({loaded.which}) as {export.format}")
    params = {name: value.to(torch.float32) for name, value in loaded.params.items()}
    request = Request(session, path, loaded, params, describe(session, loaded))
    try:
        # The final name appears only after the file has been compared.
        with tempfile.TemporaryDirectory(prefix=".export-", dir=path.parent) as folder:
            written = chosen.write(request, Path(folder) / path.name)
            quantised = int8.check(request, Path(folder) / path.name) if export.quantize == "int8" else None
            size = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
            for file in sorted(Path(folder).iterdir(), key=lambda file: file.name == path.name):  # what it needs first
                (folders.replace if file.is_dir() else os.replace)(file, path.parent / file.name)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}): check folder and free space") from None
    seconds = time.perf_counter() - began
    result = {
        "mode": "export", "format": export.format, "output": str(path), "bytes": size,
        "dynamic_size": export.dynamic_size, "verified": written.cases,
        "quantize": export.quantize, "evaluated": quantised,
        "n_parameters": pcpvt.n_parameters(loaded.model),
        "checkpoint": loaded.path, "weights": loaded.which, "seconds": round(seconds, 2),
    }  # fmt: skip
    records.write_json(session.workdir / "result-export.json", result)
    for case in written.cases:
        height, width = case["size"]
        say(f"compared at batch {case['batch']}, {height}x{width} px: relative difference {case['difference']:.1e}")
    if quantised:
        before, after = quantised[session.task.metrics[0]], quantised[f"{session.task.metrics[0]}_quantized"]
        what = f"{session.task.title} {after:.3f} % on {quantised['images']} validation images"
        say(f"int8: {what}; the model itself {before:.3f} %")
    say(f"written to {path}, {size / 1e6:.1f} MB, in {duration(seconds)}")
    for note in written.notes:
        say(note)
    return 0


def check_options(config: ConfigDict) -> None:
    """Raises UserError, with the formats that can, for what the format cannot do."""
    export, multilabel = config.export, config.task == "multilabel"
    for can, asked, said in (
        ("dynamic_size", export.dynamic_size, "dynamic_size: weights for {} have no size: leave it out, or"),
        ("preprocess", export.preprocess, "preprocess: {} files have no such form: leave it out, or"),
        ("quantize", export.quantize != "none", "quantize: {} files stay in float32: leave it out, or"),
        ("multilabel", multilabel, "format: {} is for one label per image:"),
    ):
        if asked and not getattr(FORMATS[export.format], can):
            able = " or ".join(name for name, other in FORMATS.items() if getattr(other, can))
            raise UserError(f"config.export.{said.format(export.format)} use {able}")


def destination(session: Session) -> Path:
    """The path to write, in a folder that is created; UserError if it cannot, for another ending, or if it is taken."""
    export, name = session.config.export, session.config.model.name
    suffix = FORMATS[export.format].suffix
    name += FORMATS[export.format].tag + suffix
    path = Path(os.path.expanduser(export.output)) if export.output else session.workdir / "export" / name
    if not suffix:
        folders.check(path)
    elif path.suffix != suffix:
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
    takes, gives = f"float32 [batch, {channels}, height, width], {colours}, (pixel / 255 - mean) / std", "logits"
    preprocess = session.config.export.preprocess
    if preprocess:
        takes, gives = f"uint8 [batch, height, width, {channels}], {colours}", "probabilities"
    gives += ": float32 [batch, classes]"
    if not preprocess:
        gives += f"; their {'sigmoid' if session.config.task == 'multilabel' else 'softmax'} are the probabilities"
    return {
        "model": session.config.model.name, "task": session.config.task, "input": f"images: {takes}", "output": gives,
        "preprocess": preprocess, "quantize": session.config.export.quantize,
        "image_size": list(session.size), "crop": session.config.eval.crop, "interpolation": "bicubic",
        "mean": list(mean), "std": list(std), "in_chans": channels, "value_range": values and list(values),
        "classes": loaded.classes, "labels": class_names(loaded), "checkpoint": Path(loaded.path).name,
        "weights": loaded.which, "step": loaded.meta.get("step"),
    }  # fmt: skip
