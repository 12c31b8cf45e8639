"""Writers of a training's progress: the metrics file, TensorBoard events, and the console.

The loop calls every writer in a list with the same data; another destination is another subclass of `Writer`.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pcpvt.config.plan import Plan
from pcpvt.evaluate.evaluator import report
from pcpvt.functional import mixing
from pcpvt.functional.objective import Batch, normalisation
from pcpvt.runtime import environment, records
from pcpvt.runtime.console import Console, duration
from pcpvt.runtime.session import Session
from pcpvt.train.history import BadStep, History, Rate

IMAGES = 8  # of the first batch that TensorBoard shows
_BAR = 16  # characters of the progress bar


class Writer:
    """A destination of progress; every method does nothing unless a subclass overrides it."""

    def first_batch(self, batch: Batch) -> None:
        """The first batch of the whole run, on the device."""

    def step(self, step: int, rate: Rate) -> None:
        """After every step; `step` counts the steps done."""

    def bad_step(self, bad: BadStep) -> None:
        """A step whose loss or gradient was not finite."""

    def record(self, entry: Mapping[str, Any]) -> None:
        """One record: `kind` ("train", "eval" or "restart"), `step`, `epoch` and its numbers (see `history`)."""

    def sync(self) -> None:
        """Make the records durable before a checkpoint counts them; raises OSError when that fails."""

    def close(self) -> None:
        """After the last call."""


def open_writers(
    session: Session, plan: Plan, history: History, step: int, console: Console
) -> tuple[list[Writer], History]:
    """Create `environment.json` and the writers of this process: all on the main process, none on the others.

    Returns:
        The writers, and the history with the number of records that were found: `history.records` at most, because
        later ones belong to steps that will be repeated.
    """
    if not session.world.is_main:
        return [], history
    file = MetricsWriter(session.workdir / "metrics.jsonl", history.records, console.warn)
    records.write_json(session.workdir / environment.FILE, environment.describe(session))
    writers: list[Writer] = [file, ConsoleWriter(console, plan)]
    if session.config.tensorboard:
        board = TensorBoardWriter(session.workdir, step, console.warn)
        board.config(session.config.to_dict(), step)
        for entry in records.read_metrics(file.path):
            if entry["step"] == step:  # its events were purged, because this step may be evaluated again
                board.record(entry)
        writers.insert(0, board)
    return writers, history._replace(records=file.count)


class MetricsWriter(Writer):
    """Writes each record as one line of `metrics.jsonl`; while the disk is full, lines wait in memory."""

    def __init__(self, path: Path, keep_records: int, warn: Callable[[str], None]):
        self.path, self._warn, self._warned = path, warn, False
        self._file = records.MetricsFile(path, keep_records)
        self.count = self._file.count  # records that were there

    def record(self, entry: Mapping[str, Any]) -> None:
        error = self._file.write(dict(entry))
        if error and not self._warned:
            self._warned = True
            self._warn(f"{self.path}: not written ({error.strerror}); its records wait until they can be")

    def sync(self) -> None:
        self._file.sync()

    def close(self) -> None:
        self._file.close()


class TensorBoardWriter(Writer):
    """Writes TensorBoard events: records as scalars, the config as text, the first batch as images.

    When events cannot be written (a full disk, no package) it warns once, and training goes on without them.

    Args:
        folder: the run's workdir; events go to its `tensorboard/`.
        step: where the run starts; later events, left by an interrupted run, are purged.
    """

    def __init__(self, folder: Path, step: int, warn: Callable[[str], None]):
        self._warn, self._writer = warn, None
        try:
            from torch.utils.tensorboard import SummaryWriter  # slow to import, and needed on the main process only

            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step)
        except (ImportError, OSError) as error:
            self._fail(error)

    def record(self, entry: Mapping[str, Any]) -> None:
        """The numbers of the record as scalars `<kind>/<name>`, at its step."""
        for name, value in entry.items():
            if name != "step" and isinstance(value, int | float):
                self._write("add_scalar", f"{entry['kind']}/{name}", value, entry["step"])
        self._write("flush")  # a run that is killed keeps what it has recorded

    def config(self, config: Mapping[str, Any], step: int) -> None:
        """The config as text."""
        text = "\n".join(f"    {line}" for line in json.dumps(config, indent=2).splitlines())
        self._write("add_text", "config", text, step)

    def first_batch(self, batch: Batch) -> None:
        """The first images of the batch, exactly as the network sees them; see `network_input`."""
        few = {name: value[:IMAGES].cpu() for name, value in batch.items()}
        pixels = network_input(few)
        shown = pixels if pixels.shape[-1] == 3 else pixels[..., :1]
        self._write("add_images", "train/images", shown, 0, dataformats="NHWC")

    def close(self) -> None:
        self._write("close")
        self._writer = None

    def _write(self, method: str, *args: Any, **options: Any) -> None:
        """Call a method of torch's writer, while there is one."""
        if self._writer is not None:
            try:
                getattr(self._writer, method)(*args, **options)
            except OSError as error:
                self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._writer = None
        self._warn(f"TensorBoard events are not written ({error}); training goes on without")


def network_input(batch: Batch) -> Tensor:
    """A training batch as the network sees it, converted back to pixels: uint8 `[b, h, w, c]`, `b` even if mixed.

    Uses the step's own functions, so random erasing and mixing are shown; erasing's noise, drawn in normalised space,
    appears as coloured noise around ImageNet's mean.
    """
    mean, std = normalisation(batch["image"].shape[-1])
    x = mixing.decode_images(batch["image"], batch.get("erase"), mean, std)
    if "lam" in batch:
        x = mixing.mix_images(x, batch["lam"], batch["box"])
    pixels = 255 * (x * torch.tensor(std) + torch.tensor(mean))
    return pixels.round().clamp(0, 255).to(torch.uint8)


class ConsoleWriter(Writer):
    """Prints progress: a live line at every step on a terminal, a plain line per record elsewhere."""

    def __init__(self, console: Console, plan: Plan):
        self.console, self.plan, self._rate = console, plan, Rate()
        self._latest: dict[str, Any] = {}

    def step(self, step: int, rate: Rate) -> None:
        self._rate = rate
        if self.console.is_terminal:
            self.console.live(self.line({**self._latest, "step": step}, bar=True))

    def bad_step(self, bad: BadStep) -> None:
        self.console.warn(
            f"step {bad.step}: the loss or gradient is not finite; updates skipped in a row: {bad.in_a_row}"
        )

    def record(self, entry: Mapping[str, Any]) -> None:
        if entry["kind"] == "eval":
            self.console.say(f"epoch {entry['epoch']:.2f}  {report(entry)}")
            return
        if entry["kind"] == "restart":
            self.console.say(f"restart {entry['restart']}, from step {entry['step']}: {entry['reason']}")
            return
        self._latest = dict(entry)
        if not self.console.is_terminal:
            self.console.say(self.line(entry))

    def line(self, entry: Mapping[str, Any], *, bar: bool = False) -> str:
        """The progress line, most important items first, because a narrow terminal cuts the end.

        Args:
            entry: `step`, and `loss`, `lr` and `mfu` where they are known.
            bar: include a progress bar.
        """
        plan, step, speed = self.plan, int(entry["step"]), self._rate.images_per_sec
        parts = [f"epoch {step * plan.epochs / plan.steps:.2f}/{plan.epochs:.4g}"]
        if bar:
            done = round(_BAR * step / plan.steps)
            parts.append(f"[{'#' * done}{'.' * (_BAR - done)}]")
        parts.append(f"step {step}/{plan.steps}")
        if "loss" in entry:
            parts += [f"loss {entry['loss']:.4f}", f"lr {entry['lr']:.2e}"]
        if speed:
            parts.append(f"{speed:.0f} images/s" if speed >= 10 else f"{speed:.2f} images/s")
            left = plan.sizes.cost(step, plan.steps) / plan.sizes.cost(max(step, 1) - 1, max(step, 1))  # steps as now
            parts.append(f"{duration(left * plan.batch / speed)} left")
            if entry.get("mfu"):
                parts.append(f"MFU {100 * entry['mfu']:.1f} %")
            if not entry.get("mfu") or self._rate.waiting >= 0.05:
                parts.append(f"waiting for data {100 * self._rate.waiting:.0f} %")
        return "  ".join(parts)
