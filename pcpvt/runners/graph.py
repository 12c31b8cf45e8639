"""An exported model as a file holds it, whatever its format."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Shape = tuple[int | None, int | None, int | None, int | None]  # batch, channels, height, width; None: any
# Normalised images, float32 `[b, channels, h, w]`, to logits `[b, classes]`; or as `exported.takes_pixels` says.
Network = Callable[[Tensor], Tensor]


class Graph(NamedTuple):
    """A file that has been read, before anything is compiled for it."""

    description: str  # JSON of `export.run.describe`; empty: the file has none
    images: Shape  # that it takes
    outputs: int
    start: Callable[[torch.dtype], tuple[Network, str]]  # from the wished precision; and what runs it, in which one


class NoClassifier(Exception):
    """A file that does not map one batch of images to one batch of logits; says why."""


def sides(shape: tuple[int | None, ...], outputs: tuple[int | None, ...]) -> tuple[Shape, int]:
    """The shape of the images and the number of classes of a graph with one input and one output of these shapes."""
    if len(shape) != 4 or len(outputs) != 2 or outputs[1] is None:
        raise NoClassifier(
            f"maps {_shown(shape)} to {_shown(outputs)}, not [batch, channels, h, w] to [batch, classes]"
        )
    batch, channels, height, width = shape
    return (batch, channels, height, width), outputs[1]


def _shown(shape: tuple[int | None, ...]) -> str:
    return f"[{', '.join('?' if side is None else str(side) for side in shape)}]"
