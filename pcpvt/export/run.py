"""`--mode=export`: a checkpoint as a file for other programs, compared with the model before it gets its final name.

    --config.export.format=timm     safetensors for timm.create_model(NAME, num_classes=N, checkpoint_path=FILE)
    --config.export.format=onnx     ONNX for any batch; with --config.export.dynamic_size=true also any size from 33 px
    --config.export.format=pt2      torch.export, likewise; torch.export.load(FILE).module()(images)

Each file contains a JSON description: class names, size, normalisation. Inputs and outputs of the graphs, and the
conversion to Ascend's `.om`, are described in `export.graph`. Export runs on the host and needs no device.
"""

from __future__ import annotations

import importlib.util
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from pcpvt.checkpoints import foreign
from pcpvt.checkpoints.load import LoadedModel, class_names, load_configured
from pcpvt.errors import UserError, suppress_logging
from pcpvt.export import graph
from pcpvt.functional.objective import IMAGENET_MEAN, IMAGENET_STD
from pcpvt.models import pcpvt
from pcpvt.runtime import records
from pcpvt.runtime.console import Console, duration
from pcpvt.runtime.session import Session

FORMATS = {  # to the ending of the files, and what a message calls one
    "timm": (".safetensors", "file for timm"), "onnx": (".onnx", "ONNX file"), "pt2": (".pt2", "pt2 file"),
}  # fmt: skip


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
        say(f'timm.create_model("{name}", num_classes={outputs}, checkpoint_path="{path}")')
    if export.format == "onnx":
        say(f"for Ascend, where CANN is (not verified here): {graph.atc(path, session.size)}")
    return 0


def destination(session: Session) -> Path:
    """The path of the file to write, and creates its folder.

    Raises UserError when the name has another format's ending, or the folder cannot be made.
    """
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
    return {
        "model": session.config.model.name,
        "input": "images: float32 [batch, 3, height, width], RGB, (pixel / 255 - mean) / std",
        "output": "logits: float32 [batch, classes]",
        "image_size": list(session.size), "crop": session.config.eval.crop, "interpolation": "bicubic",
        "mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD),
        "classes": loaded.classes, "labels": class_names(loaded),
        "checkpoint": Path(loaded.path).name, "weights": loaded.which, "step": loaded.meta.get("step"),
    }  # fmt: skip


def write(session: Session, loaded: LoadedModel, path: Path, description: str) -> list[dict[str, Any]]:
    """Writes the file; returns the cases in which it was compared with the model, none if timm lacks the model."""
    config, model = session.config, loaded.model
    params = {name: value.to(torch.float32) for name, value in loaded.params.items()}
    if config.export.format == "timm":
        foreign.write_timm(params, path, {foreign.DESCRIPTION: description})
        if config.model.name not in pcpvt.TIMM_NAMES:
            return []
        run = load_in_timm(config.model.name, model.num_classes, path)
        height, width = (-(-side // pcpvt.STRIDE) * pcpvt.STRIDE for side in session.size)
        sizes = [(height, width)]  # timm pads others differently
    else:
        program, sizes = graph.capture(model, params, session.size, config.export.dynamic_size)
        write_graph = graph.write_onnx if config.export.format == "onnx" else graph.write_pt2
        run = write_graph(program, path, description)
    return graph.compare(model, params, sizes, run, FORMATS[config.export.format][1])


def load_in_timm(name: str, num_classes: int, path: Path) -> graph.Run:
    """The network that timm builds from an exported file."""
    from pcpvt import torchvision_compat  # noqa: F401 - before timm
    import timm  # isort: skip

    with suppress_logging():
        return timm.create_model(pcpvt.TIMM_NAMES[name], num_classes=num_classes, checkpoint_path=str(path)).eval()
