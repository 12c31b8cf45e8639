"""Files of `--mode=export` that are graphs, told by their ending: what they say about themselves, and running them.

Files of other programs are read too: a graph without a description takes images normalised as here, and of the size
that it is fixed to. Graphs run on the host, whatever the device.
"""

import contextlib
import functools
import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from pcpvt.checkpoints import description
from pcpvt.checkpoints.description import Description
from pcpvt.errors import UserError, one_line, suppress_logging
from pcpvt.runners import onnx, openvino, pt2
from pcpvt.runners.graph import Graph, Network, NoClassifier


class Kind(NamedTuple):
    """One format."""

    what: str
    read: Callable[[Path], Graph]
    packages: tuple[str, ...] = ()  # that it needs beside those of pcpvt
    extra: str = ""  # that installs them


KINDS = {
    ".onnx": Kind("ONNX", onnx.read, ("onnx", "onnxruntime"), "export"),
    ".xml": Kind("OpenVINO", openvino.read, ("openvino",), "openvino"),
    ".pt2": Kind("torch.export", pt2.read),
}


def is_graph(path: str) -> bool:
    """Whether a path means an exported graph."""
    return Path(path).suffix in KINDS


def require(packages: tuple[str, ...], extra: str, what: str) -> None:
    """Raises UserError, beginning with `what`, when a package is not installed."""
    for name in packages:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"{what} needs the package {name}: pip install 'pcpvt[{extra}]'")


def read(path: str | Path) -> Graph:
    """One file; UserError when it is missing, damaged or no classifier of images, or its runtime is not installed."""
    path = Path(path).expanduser()
    kind = KINDS[path.suffix]
    try:
        found = path.stat()
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}): give a file that --mode=export has written"
        ) from None
    require(kind.packages, kind.extra, f"{path}: {kind.what}")
    return _read(path, found.st_mtime_ns, found.st_size)


@functools.lru_cache(maxsize=1)  # for the description first and then to run it, which takes seconds with torch.export
def _read(path: Path, changed: int, size: int) -> Graph:
    kind = KINDS[path.suffix]
    try:
        with suppress_logging():
            graph = kind.read(path)
    except NoClassifier as error:
        raise UserError(f"{path}: {error}: export the model again") from None
    except Exception as error:  # each runtime raises what it likes
        raise UserError(
            f"{path}: cannot be read as {kind.what} ({type(error).__name__}: {one_line(error)}): export it again"
        ) from None

    if takes_pixels(graph):
        batch, height, width, channels = graph.images
        graph = graph._replace(images=(batch, channels, height, width))
    return graph


def takes_pixels(graph: Graph) -> bool:
    """Whether a graph was exported with its preprocessing: from uint8 images `[b, h, w, channels]` to probabilities."""
    return facts(graph).get("preprocess") is True


def facts(graph: Graph) -> dict[str, Any]:
    """The description in a graph as JSON values; empty where there is none."""
    try:
        found = json.loads(graph.description or "{}")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def describe(path: str | Path) -> Description:
    """What a file says about itself, and of its images what the graph settles."""
    graph = read(path)
    said = description.from_export(facts(graph))
    _, channels, height, width = graph.images
    size = (height, width) if height is not None and width is not None else said.size
    return said._replace(size=size, channels=channels or said.channels)


def check_fit(path: str | Path, graph: Graph, size: tuple[int, int], channels: int, num_classes: int | None) -> None:
    """Raises UserError when a graph does not take such images, or has another number of outputs."""
    _, own_channels, *sides = graph.images
    if any(own not in (None, side) for own, side in zip(sides, size, strict=True)):
        takes = "x".join("any" if side is None else str(side) for side in sides)
        raise UserError(
            f"config.image_size: {size[0]}x{size[1]} px and {path} takes {takes} only: leave it out, or export again, "
            "with that size or with config.export.dynamic_size"
        )
    if own_channels not in (None, channels):
        raise UserError(
            f"config.model.in_chans: {channels} and {path} takes images of {own_channels} channels: leave it unset"
        )
    if num_classes not in (None, graph.outputs):
        raise UserError(f"config.num_classes: {num_classes} and {path} has {graph.outputs} classes: leave it unset")


def start(path: str | Path, graph: Graph, precision: torch.dtype) -> tuple[Network, str]:
    """The network of a file that was read, for batches of any size, and the name and precision of what runs it."""
    what = KINDS[Path(path).suffix].what
    with _runtime_errors(path, what), suppress_logging():
        network, runtime = graph.start(precision)
    fixed = graph.images[0]

    def run(images: torch.Tensor) -> torch.Tensor:
        parts, rows = (images,), len(images)
        if fixed not in (None, rows):
            parts = F.pad(images, (0, 0, 0, 0, 0, 0, 0, -rows % fixed)).split(fixed)
        with _runtime_errors(path, what):  # a graph of another program may take other images than it says, or float16
            logits = [network(part.contiguous()) for part in parts]
        return torch.cat(logits)[:rows]

    return run, runtime


@contextlib.contextmanager
def _runtime_errors(path: str | Path, what: str) -> Iterator[None]:
    """Turns whatever a runtime raises for a graph into a UserError."""
    try:
        yield
    except Exception as error:  # each runtime raises what it likes
        raise UserError(
            f"{path}: {what} cannot run it ({type(error).__name__}: {one_line(error)}): export it again"
        ) from None
