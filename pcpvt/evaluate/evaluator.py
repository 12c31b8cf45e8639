"""Evaluation of a whole split: exact counts at any world size, in a loop that can be stopped."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pcpvt.data import sources
from pcpvt.data.loader import EvalBatches, Loader
from pcpvt.distributed import collectives
from pcpvt.evaluate import mistakes, scores
from pcpvt.functional import metrics
from pcpvt.functional.objective import Batch
from pcpvt.runtime import session as sessions
from pcpvt.runtime.console import Console
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


class Evaluation(NamedTuple):
    """What a model got on a split."""

    metrics: dict[str, float]  # those of the task; and `unreadable` when samples were skipped
    labels: list[int]  # samples of each class
    hits: list[int]  # those of them that are predicted to be of it
    predicted: list[int]  # samples that are predicted to be of each class
    log: mistakes.Log | None  # what was recorded of each sample, of the first model at least


class Split(NamedTuple):
    """A data set to evaluate on; its loader processes live as long as this value."""

    dataset: sources.Dataset
    loader: Loader
    unreadable: UnreadableLog


def open_split(session: Session, dataset: sources.Dataset, local_batch: int, workers: int | None = None) -> Split:
    """Prepare a data set for evaluation in batches of `local_batch` samples, read by `workers`, per process."""
    config, world = session.config, session.world
    batches = EvalBatches(
        dataset,
        session.size,
        config.eval.crop,
        local_batch,
        world.rank,
        world.size,
        config.data.on_error,
        session.reading,
    )
    loader = sessions.open_loader(session, batches, range(len(batches)), workers)
    return Split(dataset, loader, UnreadableLog(dataset, Console(world.is_main)))


def evaluate(
    session: Session,
    split: Split,
    eval_step: Callable[[Batch], Sequence[Scored]],
    *,
    stop: Callable[[], bool] = lambda: False,
) -> list[Evaluation] | None:
    """Evaluate one or several models in one pass over a split.

    Args:
        eval_step: a batch on the device to the scores of each model (see `functional.step.make_eval_step`).
        stop: asked before each batch, on all processes alike; True ends the evaluation.

    Returns:
        One for each model; None when stopped.

    Raises:
        AssertionError: when not every sample was seen exactly once.
    """
    batches: list[list[metrics.Sums]] = []
    skipped: list[Tensor] = []
    logs: list[mistakes.Log] = []
    for batch in session.device.prefetch(split.loader):
        if stop():
            return None
        scored = eval_step(batch)
        logs = logs or open_logs(session, len(split.dataset), len(scored))
        for log, (logits, _) in zip(logs, scored, strict=False):
            log(batch, logits)
        batches.append([sums for _, sums in scored])  # read from the device after the last batch
        if session.config.data.on_error == "skip":
            skipped.append(torch.where(batch["valid"], -1, batch["id"]))  # -1: also of rows without a sample
    left_out = [index for ids in skipped for index in ids.tolist() if index >= 0]
    for index in left_out:
        split.unreadable.add(index, "left out of the evaluation")
    unreadable = int(collectives.sum_numbers([float(len(left_out))])[0])
    found = []
    for log, model in itertools.zip_longest(logs, zip(*batches, strict=True)):
        total = _total(model)
        assert int(total["seen"]) + unreadable == len(split.dataset), (total["seen"], unreadable, len(split.dataset))
        summary = (log.metrics() if log else {}) | session.task.summarize(total)
        summary |= {"unreadable": unreadable} if unreadable else {}
        labels, hits, predicted = ([int(n) for n in total[name]] for name in metrics.PER_CLASS)
        found.append(Evaluation(summary, labels, hits, predicted, log))
    return found


def open_logs(session: Session, samples: int, models: int) -> list[mistakes.Log]:
    """Logs of an evaluation: of the first model's predictions, or with several labels of the scores of each model."""
    config = session.config
    if config.task == "multilabel":
        return [scores.ScoreLog(samples, config.predict.threshold) for _ in range(models)]
    return [mistakes.PredictionLog(samples)]


def evaluate_one(session: Session, split: Split, predict: Callable[[Tensor], Tensor]) -> Evaluation:
    """`evaluate` for one model, `predict`: uint8 images `[b, h, w, channels]` on the device to logits."""

    def eval_step(batch: Batch) -> list[Scored]:
        logits = predict(batch["image"])
        return [(logits, session.task.sums(logits, batch["label"], batch["valid"]))]

    found = evaluate(session, split, eval_step)
    assert found is not None  # nothing stops it
    return found[0]


def _total(batches: Sequence[metrics.Sums]) -> dict[str, Any]:
    """The sums of all batches of all processes as numbers, those per class as lists."""
    names = [name for name in batches[0] if name not in metrics.PER_CLASS]
    numbers = [float(sum(sums[name].item() for sums in batches)) for name in names]
    per_class = [torch.stack([sums[name] for sums in batches]).sum(0).tolist() for name in metrics.PER_CLASS]
    classes = len(per_class[0])
    flat = collectives.sum_numbers([*numbers, *(float(n) for row in per_class for n in row)])
    rows = [flat[len(names) + i * classes :][:classes] for i in range(len(per_class))]
    return dict(zip(names, flat, strict=False)) | dict(zip(metrics.PER_CLASS, rows, strict=True))


def per_class(evaluation: Evaluation, classes: Sequence[str]) -> dict[str, dict[str, float]]:
    """Figures by class name, in percent: `recall` of the classes that have samples.

    With several labels also `f1`, of those that have samples or predictions, and `average_precision`.
    """
    labels, hits, predicted, log = evaluation[1:]
    names = [*classes, *(f"output {i}" for i in range(len(classes), len(labels)))]
    figures = {"recall": metrics.recalls(labels, hits)}
    precision = log.average_precision() if log else None
    if precision is not None:
        f1 = [None if value is None else 100 * value for value in metrics.f1_scores(labels, hits, predicted)]
        figures |= {"f1": f1, "average_precision": precision}
    return {
        figure: {name: round(value, 4) for name, value in zip(names, values, strict=True) if value is not None}
        for figure, values in figures.items()
    }


def split_name(dataset: sources.Dataset) -> str:
    """The split of a dataset, as its source calls it."""
    return str(getattr(dataset, "split", "val"))


def report(summary: Mapping[str, Any]) -> str:
    """The metrics as one line, the same in training and evaluation."""
    left_out = f"   unreadable {summary['unreadable']}" if summary.get("unreadable") else ""
    if "map" in summary:
        f1 = f"macro F1 {summary['macro_f1']:.3f} %   micro F1 {summary['micro_f1']:.3f} %"
        text = f"mAP {summary['map']:.3f} %   {f1}   loss {summary['loss']:.6f}"
        if "map_raw" in summary:
            raw = f"mAP {summary['map_raw']:.3f} %   loss {summary['loss_raw']:.6f}"
            text += f"   (weights before averaging: {raw})"
        return text + left_out
    text = f"top-1 {summary['acc1']:.3f} %   top-5 {summary['acc5']:.3f} %   loss {summary['loss']:.6f}"
    if "acc1_raw" in summary:
        text += f"   (weights before averaging: top-1 {summary['acc1_raw']:.3f} %   loss {summary['loss_raw']:.6f})"
    balanced = summary.get("balanced_acc")  # equal to top-1 where all classes have as many samples
    if balanced is not None and abs(balanced - summary["acc1"]) >= 0.05:
        text += f"   balanced {balanced:.3f} %"
    return text + left_out
