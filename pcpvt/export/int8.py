"""`config.export.quantize=int8`: an ONNX file's matrix products in 8 bits, by ONNX Runtime's static quantisation.

Weights are int8 per output channel, activations uint8 with the range that they have on the calibration images. Weights
use 7 of the 8 bits: processors without VNNI instructions add pairs of products in 16 bits, which 8 would overflow. In
float32 stay LayerNorm, softmax, GELU, the sums of the residual branches, the products of attention without weights
(8 bits make them no faster), the depthwise convolutions, the first layer, whose few products see the pixels, and the
head: they take less than 5 % of the time, and cost a third of the error. `docs/export.md` has the figures.
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange

from pcpvt.checkpoints.labels import match
from pcpvt.config.plan import eval_batch
from pcpvt.errors import UserError, suppress_logging
from pcpvt.evaluate.evaluator import evaluate_one, open_split
from pcpvt.export import samples
from pcpvt.export.formats import Request
from pcpvt.functional.mixing import decode_images
from pcpvt.functional.objective import normalisation
from pcpvt.runners.runner import of_weights, open_graph
from pcpvt.runtime import session as sessions

BATCH = 16  # calibration images at a time


def quantise(request: Request, path: Path) -> None:
    """Quantises an ONNX file in place.

    Raises:
        UserError: when there are no training images to calibrate with.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        """The calibration images, batch by batch."""

        def __init__(self) -> None:
            self.batches = calibration(request)

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"images": batch}

    if request.session.config.export.calibration == 0:
        raise UserError("config.export.calibration: 0 and config.export.quantize=int8 needs images: give 64 or more")
    before = onnx.load(path)
    kept = in_float(before)
    with suppress_logging():
        quantize_static(
            str(path), str(path), Reader(), quant_format=QuantFormat.QDQ, op_types_to_quantize=["MatMul"],
            per_channel=True, reduce_range=True, weight_type=QuantType.QInt8, activation_type=QuantType.QUInt8,
            nodes_to_exclude=kept,
        )  # fmt: skip
    after = onnx.load(path)
    del after.metadata_props[:]
    after.metadata_props.extend(before.metadata_props)
    onnx.save(after, path)


def in_float(model: Any) -> list[str]:
    """Names of the matrix products of an ONNX model that stay in float32: the first one, and those without weights."""
    weights = {tensor.name for tensor in model.graph.initializer}
    products = [node for node in model.graph.node if node.op_type == "MatMul"]
    weighted = [node.name for node in products if node.input[1] in weights]
    return [node.name for node in products if node.name not in weighted[1:]]


def calibration(request: Request) -> Iterator[np.ndarray]:
    """Batches of training images as the graph takes them, `config.export.calibration` in all, drawn by key."""
    session, config = request.session, request.session.config
    train = sessions.open_data(session, "train")
    drawn = samples.draw(session, train, config.export.calibration, "calibration")
    while found := [sample.pixels for sample in islice(drawn, BATCH)]:
        pixels = torch.from_numpy(np.stack(found))
        if config.export.preprocess:
            yield pixels.numpy()
        else:
            images = decode_images(pixels, None, *normalisation(session.reading.channels))
            yield rearrange(images, "b h w c -> b c h w").contiguous().numpy()


def check(request: Request, path: Path) -> dict[str, float]:
    """Evaluates the model and a quantised file of it on the validation images, both in the session's precision.

    Returns:
        `images`, and in percent the task's main metric, `acc1` or `map`, of the model, and `..._quantized`.

    Raises:
        UserError: naming both, when the file loses more than `config.export.max_drop`.
    """
    session, export = request.session, request.session.config.export
    matched = match(request.loaded, sessions.open_data(session, "val"), session.config)
    split = open_split(session, matched.dataset, eval_batch(session.config))
    runners = of_weights(session, request.loaded), open_graph(session, str(path))
    main, title = session.task.metrics[0], session.task.title
    before, after = (evaluate_one(session, split, runner.predict).metrics for runner in runners)
    exact, quantised = before[main], after[main]
    if not exact - quantised <= export.max_drop:  # also nan
        raise UserError(
            f"config.export.quantize: {title} is {exact:.3f} % before and {quantised:.3f} % after, which is more than "
            f"config.export.max_drop={export.max_drop:g} less: nothing was written: set export.calibration or "
            "export.max_drop higher, or leave export.quantize out"
        )
    return {"images": before["seen"], main: exact, f"{main}_quantized": quantised}
