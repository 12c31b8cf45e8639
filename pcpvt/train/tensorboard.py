"""TensorBoard events of a run in `<workdir>/tensorboard/`: scalars, the config as text, the first images of the run.

PyTorch's own writer is used, and imported only where events are written: on the main process, once training starts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pcpvt.functional import mixing
from pcpvt.functional.objective import IMAGENET_MEAN, IMAGENET_STD

IMAGES = 8


class Board:
    """Writes events; when that fails (a full disk, no package) it says so once, and the run goes on without.

    Args:
        folder: the run's workdir.
        step: where the run goes on; events from this step on, left by a run that was cut, are purged.
        warn: called with one line.
    """

    def __init__(self, folder: Path, step: int, warn: Callable[[str], None]):
        self._warn, self._writer = warn, None
        try:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step)
        except (ImportError, OSError) as error:
            self._fail(error)

    def record(self, entry: Mapping[str, Any]) -> None:
        """The numbers of one record of `metrics.jsonl` as scalars `<kind>/<name>`, at its step."""
        kind, step = entry["kind"], entry["step"]
        numbers = {n: v for n, v in entry.items() if n != "step" and isinstance(v, int | float)}

        def add(writer: Any) -> None:
            for name, value in numbers.items():
                writer.add_scalar(f"{kind}/{name}", value, step)
            writer.flush()  # what a run that is killed has recorded is not written again

        self._try(add)

    def config(self, config: Mapping[str, Any], step: int) -> None:
        """The config as text."""
        text = "\n".join(f"    {line}" for line in json.dumps(config, indent=2).splitlines())
        self._try(lambda writer: writer.add_text("config", text, step))

    def images(self, batch: dict[str, Tensor], step: int) -> None:
        """The first images of a training batch, exactly as the network sees them; see `seen`."""
        pair = {name: value[:IMAGES].cpu() for name, value in batch.items()}
        self._try(lambda writer: writer.add_images("train/images", seen(pair), step, dataformats="NHWC"))

    def close(self) -> None:
        self._try(lambda writer: writer.close())
        self._writer = None

    def _try(self, action: Callable[[Any], Any]) -> None:
        if self._writer is None:
            return
        try:
            action(self._writer)
        except OSError as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._writer = None
        self._warn(f"TensorBoard events are not written ({error}); training goes on without")


def seen(batch: dict[str, Tensor]) -> Tensor:
    """A training batch as the network sees it, back in pixels: uint8 `[b, h, w, 3]`; `b` even where samples are mixed.

    The same functions as in the step: random erasing's noise, which is drawn in normalised space, then appears as
    coloured noise around ImageNet's mean, and mixing is shown.
    """
    x = mixing.decode_images(batch["image"], batch.get("erase"), IMAGENET_MEAN, IMAGENET_STD)
    if "lam" in batch:
        x = mixing.mix_images(x, batch["lam"], batch["box"])
    pixels = 255 * (x * torch.tensor(IMAGENET_STD) + torch.tensor(IMAGENET_MEAN))
    return pixels.round().clamp(0, 255).to(torch.uint8)
