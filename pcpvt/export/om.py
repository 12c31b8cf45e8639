"""`config.export.format=om`: a kit for Ascend's offline model `.om`, to be converted where CANN is; see docs/om.md.

A folder with ONNX files of fixed batch, the AIPP configuration, images for calibration and for the check, precision
files, the script that converts and the one that checks the result. ONNX parity is verified here. CANN was not
available: conversion, accuracy on a chip and speed are not.
"""

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from pcpvt.checkpoints.labels import match
from pcpvt.errors import UserError, one_line, suppress_logging
from pcpvt.export import om_check, om_texts, samples
from pcpvt.export.formats import Format, Network, Request, Size, Written, compare
from pcpvt.export.graph import capture
from pcpvt.functional.objective import make_predict
from pcpvt.runtime import session as sessions

if TYPE_CHECKING:
    from onnx import ModelProto

PRECISE = ("LayerNormalization", "Softmax", "ReduceMean")  # ONNX operators kept in float32: they sum many numbers
ASCEND_TYPES = ("LayerNorm", "SoftmaxV2", "ReduceMean")  # what Ascend IR calls them
CHECKED = 16  # images per batch of the reference


def write(request: Request, path: Path) -> Written:
    """Writes the folder; every ONNX file is compared with the model."""
    session, model, name = request.session, request.loaded.model, request.session.config.model.name
    batches = [int(word) for word in session.config.export.batches.split(",")]
    for folder in ("", "precision", "calibration", "validation"):
        (path / folder).mkdir()
    calibration, validation = _write_images(request, path)  # first, since it may lack data
    text = json.dumps(request.description, ensure_ascii=False, indent=2)
    (path / "description.json").write_text(text + "\n", encoding="utf-8")
    cases = []
    if session.config.export.dynamic_size:
        dynamic, sizes = lowered(request, dynamic_size=True)
        network = _save(dynamic, path / f"{name}_dynamic.onnx", text)
        cases += compare(model, request.params, sizes, network, "dynamic ONNX file")
    graph, sizes = lowered(request, dynamic_size=False)
    for batch in batches:
        network = _save(graph, path / f"{name}_b{batch}.onnx", text, batch)
        cases += compare(model, request.params, sizes, network, f"ONNX file for batch {batch}", [batch])
    kept = [node.name for node in graph.graph.node if node.op_type in PRECISE]
    (path / "precision" / "keep_dtype.cfg").write_text("\n".join(kept) + "\n")
    mixlist = {"black-list": {"to-add": list(ASCEND_TYPES)}}
    (path / "precision" / "mixlist.json").write_text(json.dumps(mixlist, indent=2) + "\n")
    has_aipp = model.in_chans in (1, 3)
    if has_aipp:
        mean, std = request.description["mean"], request.description["std"]
        (path / "aipp.cfg").write_text(aipp(session.size, mean, std))
    shutil.copy(om_check.__file__, path / "check.py")
    facts = om_texts.Facts(name, batches, session.size, model.in_chans, has_aipp, calibration, validation)
    (path / "convert.sh").write_text(om_texts.convert(facts))
    (path / "README.md").write_text(om_texts.readme(facts))
    return Written(cases, [f"where CANN is (not verified here): sh {request.output}/convert.sh Ascend310P3"])


def lowered(request: Request, dynamic_size: bool) -> tuple["ModelProto", list[Size]]:
    """The model as ONNX of opset 17 and IR 8 for any batch, and the sizes to compare it at."""
    from pcpvt.export import opset17

    program, sizes = capture(request.loaded.model, request.params, request.session.size, dynamic_size)
    with suppress_logging():
        exported = torch.onnx.export(
            program, input_names=["images"], output_names=["logits"], opset_version=18, verbose=False
        )
    assert exported is not None
    graph = exported.model_proto
    try:
        opset17.lower(graph)
    except ValueError as error:
        raise UserError(f"config.export.format: {error}: try another version of torch") from None
    opset17.name_axes(graph)
    return graph, sizes


def _save(graph: "ModelProto", path: Path, description: str, batch: int = 0) -> Network:
    """Writes ONNX, for one batch size if it is not 0, and loads it into onnxruntime."""
    import onnx
    import onnxruntime

    from pcpvt.export import opset17

    model = opset17.fixed(graph, batch) if batch else graph
    del model.metadata_props[:]
    model.metadata_props.append(onnx.StringStringEntryProto(key="description", value=description))
    onnx.checker.check_model(model)
    onnx.save(model, str(path))
    run = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(run.run(["logits"], {"images": images.numpy()})[0])


def aipp(size: Size, mean: Sequence[float], std: Sequence[float]) -> str:
    """The AIPP configuration that normalises uint8 images of one size, RGB or grey.

    AIPP computes (pixel - mean_chn - min_chn) * var_reci_chn of pixels in 0..255. The mean goes into both terms, whole
    numbers and the rest, because 16 bits would round 123.675 by 0.0125.
    """
    rows = {
        "aipp_mode": "static", "related_input_rank": 0, "input_format": "RGB888_U8" if len(mean) == 3 else "YUV400_U8",
        "src_image_size_w": size[1], "src_image_size_h": size[0], "crop": "false", "csc_switch": "false",
        "rbuv_swap_switch": "false",
    }  # fmt: skip
    for channel, (centre, width) in enumerate(zip(mean, std, strict=True)):
        whole = math.floor(255 * centre)
        rows[f"mean_chn_{channel}"] = whole
        rows[f"min_chn_{channel}"] = f"{255 * centre - whole:.6f}"
        rows[f"var_reci_chn_{channel}"] = f"{1 / (255 * width):.10f}"
    return "\n".join(["aipp_op {", *(f"    {name}: {value}" for name, value in rows.items()), "}", ""])


def _write_images(request: Request, path: Path) -> tuple[int, int]:
    """Training images for calibration and validation images with labels and reference logits; how many of each.

    Raises:
        UserError: when there are no data, or a split has no readable image.
    """
    session, count = request.session, request.session.config.export.calibration
    if not count:
        (path / "validation.txt").touch()
        return 0, 0
    if not session.config.data.path and session.config.data.name in ("", "folder"):
        raise UserError(
            "config.data.path: not set, and the kit holds images of the data: give their folder, or set "
            "config.export.calibration=0 for a kit without"
        )
    train = sessions.open_data(session, "train")
    calibration = list(samples.draw(session, train, count, "calibration"))
    _write_list(path / "calibration", calibration, [_named(sample) for sample in calibration])
    val = match(request.loaded, sessions.open_data(session, "val"), session.config).dataset
    validation = list(samples.draw(session, val, count, "export validation"))
    _write_list(path / "validation", validation, [f"{sample.label}\t{_named(sample)}" for sample in validation])
    predict, logits = make_predict(request.loaded.model), []
    for start in range(0, len(validation), CHECKED):
        pixels = np.stack([sample.pixels for sample in validation[start : start + CHECKED]])
        logits.append(predict(request.params, torch.from_numpy(pixels)).numpy())
    np.save(path / "reference.npy", np.concatenate(logits))
    return len(calibration), len(validation)


def _named(sample: samples.Sample) -> str:
    return one_line(Path(sample.name).name)


def _write_list(folder: Path, found: Sequence[samples.Sample], columns: Sequence[str]) -> None:
    """One raw file `[h, w, channels]` per image, and a list beside the folder: its name and what belongs to it."""
    names = [f"{i:05d}.bin" for i in range(len(found))]
    for name, sample in zip(names, found, strict=True):
        np.ascontiguousarray(sample.pixels).tofile(folder / name)
    lines = [f"{name}\t{column}\n" for name, column in zip(names, columns, strict=True)]
    folder.with_suffix(".txt").write_text("".join(lines), encoding="utf-8", errors="backslashreplace", newline="\n")


FORMAT = Format("", write, True, ("onnx", "onnxscript", "onnxruntime"), "export", multilabel=False, tag="-om")
