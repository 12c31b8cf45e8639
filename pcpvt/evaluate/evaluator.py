"""Evaluation of a whole split: exact counts at any world size, in a loop that can be stopped."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from pcpvt.config import stored
from pcpvt.data import sources
from pcpvt.data.loader import EvalBatches, Loader
from pcpvt.distributed import collectives
from pcpvt.functional import metrics
from pcpvt.functional.objective import Batch
from pcpvt.models import pcpvt
from pcpvt.runtime import records
from pcpvt.runtime import session as sessions
from pcpvt.runtime.console import Console, duration
from pcpvt.runtime.session import Session

Scored = tuple[Tensor, metrics.Sums]  # logits [b, classes] of one model, and their sums (see functional.metrics)


class UnreadableLog:
    """Warns about samples that cannot be read: once each, from the first process that meets it."""

    def __init__(self, dataset: sources.Dataset, console: Console):
        self._dataset, self._console, self._named = dataset, console, set[int]()

    def add(self, index: int, consequence: str) -> None:
        text = f"{self._dataset.name(index)}: unreadable; {consequence}"
        if index not in self._named and collectives.first_to_say(text):
            self._console.warn(text)
        self._named.add(index)


class Split(NamedTuple):
    """A data set to evaluate on; its loader processes live as long as this value."""

    dataset: sources.Dataset
    loader: Loader
    unreadable: UnreadableLog


def open_split(session: Session, dataset: sources.Dataset, local_batch: int) -> Split:
    """Prepare a data set for evaluation in batches of `local_batch` samples per process."""
    config, world = session.config, session.world
    batches = EvalBatches(
        dataset, session.size, config.eval.crop, local_batch, world.rank, world.size, config.data.on_error
    )
    loader = sessions.open_loader(session, batches, range(len(batches)))
    return Split(dataset, loader, UnreadableLog(dataset, Console(world.is_main)))


def evaluate(
    session: Session,
    split: Split,
    eval_step: Callable[[Batch], Sequence[Scored]],
    *,
    observe: Callable[[Batch, Tensor], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> list[dict[str, float]] | None:
    """Evaluate one or several models in one pass over a split.

    Args:
        eval_step: a batch on the device to the scores of each model (see `functional.step.make_eval_step`).
        observe: called with each batch and the first model's logits, on the device.
        stop: asked before each batch, on all processes alike; True ends the evaluation.

    Returns:
        For each model `acc1`, `acc5`, `loss`, `seen`, and `unreadable` when samples were skipped; None when stopped.

    Raises:
        AssertionError: when not every sample was seen exactly once.
    """
    batches: list[list[metrics.Sums]] = []
    skipped = 0.0
    for batch in session.device.prefetch(split.loader):
        if stop():
            return None
        scores = eval_step(batch)
        if observe is not None:
            observe(batch, scores[0][0])
        batches.append([sums for _, sums in scores])  # read from the device after the last batch
        if session.config.data.on_error == "skip":
            for index in batch["id"][(batch["id"] >= 0) & ~batch["valid"]].tolist():
                split.unreadable.add(index, "left out of the evaluation")
                skipped += 1
    unreadable = int(collectives.sum_numbers([skipped])[0])
    summaries = []
    for model in zip(*batches, strict=True):
        local = {name: sum(sums[name].item() for sums in model) for name in model[0]}
        total = dict(zip(local, collectives.sum_numbers([float(v) for v in local.values()]), strict=True))
        assert int(total["seen"]) + unreadable == len(split.dataset), (total["seen"], unreadable, len(split.dataset))
        summaries.append(metrics.summarize(total) | ({"unreadable": unreadable} if unreadable else {}))
    return summaries


def split_name(dataset: sources.Dataset) -> str:
    """The split of a dataset, as its source calls it."""
    return str(getattr(dataset, "split", "val"))


def write_result(session: Session, model: pcpvt.PCPVT, figures: dict[str, Any], seconds: float) -> None:
    """Write `result-eval.json`, and `result.json` unless a training has left one, on the main process."""
    path = session.workdir / "result-eval.json"
    result = {
        "mode": "eval", **figures, "images": figures["seen"], "image_size": list(session.size),
        "crop": session.config.eval.crop, "precision": str(session.policy),
        "images_per_sec": round(figures["seen"] / seconds, 2), "seconds": round(seconds, 2),
        "n_parameters": pcpvt.n_parameters(model),
    }  # fmt: skip
    if session.world.is_main:
        records.write_json(path, result)
        training = session.workdir / "result.json"
        if not training.exists() or stored.read_config(training).get("mode") != "train":
            records.write_json(training, result)
    Console(session.world.is_main).say(f"{figures['seen']} images in {duration(seconds)}; written to {path}")


def report(summary: Mapping[str, Any]) -> str:
    """The metrics as one line, the same in training and evaluation."""
    text = f"top-1 {summary['acc1']:.3f} %   top-5 {summary['acc5']:.3f} %   loss {summary['loss']:.6f}"
    return text + (f"   unreadable {summary['unreadable']}" if summary.get("unreadable") else "")
