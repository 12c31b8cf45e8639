"""What every format of `--mode=export` is: how its files are called, what it needs, and a function that writes one."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange

from pcpvt import rng
from pcpvt.checkpoints.load import LoadedModel
from pcpvt.errors import UserError
from pcpvt.functional import tasks
from pcpvt.functional.objective import make_predict
from pcpvt.models import pcpvt
from pcpvt.models.pcpvt import PCPVT, Params
from pcpvt.runners import exported
from pcpvt.runners.graph import Network
from pcpvt.runtime.session import Session

TOLERANCE = 1e-4  # relative to the largest logit, or to 1; float32 rounding over 41 blocks is a hundred times less
COMPARED = (1, 3)  # batch sizes

Size = tuple[int, int]  # height, width


class Request(NamedTuple):
    """What is exported."""

    session: Session
    output: Path  # where the file will be
    loaded: LoadedModel
    params: Params  # of the model, float32
    description: dict[str, Any]  # JSON, for the file to contain; see `run.describe`


class Written(NamedTuple):
    """What a format has written."""

    cases: list[dict[str, Any]]  # in which it was compared with the model, see `compare`
    notes: list[str]  # for the log: why it was not compared, how to use it


class Format(NamedTuple):
    """One value of `config.export.format`."""

    suffix: str  # of the file; empty: it is a folder
    write: Callable[[Request, Path], Written]  # writes the file, in a new folder whose files are kept, and compares it
    dynamic_size: bool  # whether config.export.dynamic_size can be
    packages: tuple[str, ...] = ()  # that it needs beside those of pcpvt
    extra: str = ""  # that installs them
    preprocess: bool = False  # whether config.export.preprocess can be
    quantize: bool = False  # whether config.export.quantize can be
    multilabel: bool = True  # whether models of several labels per image can be
    tag: str = ""  # in the default name, of folders and of files whose ending another format has too


def reopen(path: Path, description: str) -> Network:
    """The network of a graph that was written, in float32, as whoever uses the file gets it."""
    graph = exported.read(path)
    assert graph.description == description, graph.description
    return exported.start(path, graph, torch.float32)[0]


def compare(
    model: PCPVT, params: Params, sizes: Sequence[Size], network: Network, what: str, batches: Sequence[int] = COMPARED,
    *, preprocess: bool = False, tolerance: float = TOLERANCE,
) -> list[dict[str, Any]]:  # fmt: skip
    """Compares a written model with ours at each size and each batch size.

    By logits of noise, or with `preprocess` by probabilities of uint8 images `[b, h, w, channels]`.

    Returns `batch`, `size` and relative `difference` of each case; UserError, naming the file, above `tolerance`.
    """
    cases = []
    for size, batch in itertools.product(sizes, batches):
        source, channels = rng.generator(0, "export", batch, *size), model.in_chans
        with torch.no_grad():
            if preprocess:
                images = torch.from_numpy(source.integers(0, 256, (batch, *size, channels), np.uint8))
                expected = tasks.choose(model.task).probabilities(make_predict(model)(params, images))
            else:
                images = torch.from_numpy(source.standard_normal((batch, channels, *size), dtype=np.float32))
                expected = pcpvt.apply(model, params, rearrange(images, "b c h w -> b h w c"))
            difference = (network(images) - expected).abs().max().item()
        relative = difference / max(1.0, expected.abs().max().item())
        if not relative <= tolerance:  # also nan
            raise UserError(
                f"config.export.format: the {what}, with batch {batch} at {size[0]}x{size[1]} px, differs from the "
                f"model by {relative:.1e}: it was not kept: try another version of torch"
            )
        cases.append({"batch": batch, "size": list(size), "difference": relative})
    return cases
