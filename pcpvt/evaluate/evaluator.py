"""`--mode=eval` and the evaluation inside training: exact counts over a whole split at any world size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from pcpvt.checkpoints.load import LoadedModel
from pcpvt.config import stored
from pcpvt.data import sources
from pcpvt.data.loader import EvalBatches, Loader
from pcpvt.distributed import collectives
from pcpvt.functional import metrics
from pcpvt.models import pcpvt
from pcpvt.runtime import records
from pcpvt.runtime import session as sessions
from pcpvt.runtime.console import Console, duration
from pcpvt.runtime.session import Session

Observe = Callable[[dict[str, Tensor], Tensor], None]


class Unreadable:
    """Names the samples of a source that cannot be read: each once, by the first process that meets it."""

    def __init__(self, source: sources.Dataset, console: Console):
        self._source, self._console, self._named = source, console, set[int]()

    def name(self, index: int, consequence: str) -> None:
        text = f"{self._source.name(index)}: unreadable; {consequence}"
        if index not in self._named and collectives.first_to_say(text):
            self._console.warn(text)
        self._named.add(index)


class Evaluator:
    """Called with parameters, evaluates them on one split; loader processes and compiled code live as long as this."""

    def __init__(self, session: Session, model: pcpvt.PCPVT, source: sources.Dataset, local_batch: int):
        config, world = session.config, session.world
        self.session, self.source = session, source
        self.unreadable = Unreadable(source, Console(world.is_main))
        batches = EvalBatches(
            source, session.size, config.eval.crop, local_batch, world.rank, world.size, config.data.on_error
        )
        self.loader = Loader(
            batches,
            range(len(batches)),
            sessions.workers(session, source),
            start=session.device.worker_start,
            pin=session.device.pins_memory,
        )
        self.predict = session.predictor(model)

    def __call__(self, params: dict[str, Tensor], observe: Observe | None = None) -> dict[str, float]:
        """See `measure`; `observe` is called with each batch and its logits, on the device."""
        weights = self.session.inference(params)

        def outputs(batch: dict[str, Tensor]) -> list[Tensor]:
            logits = self.predict(weights, batch["image"])
            if observe is not None:
                observe(batch, logits)
            return [logits]

        return self.measure(outputs, 1)[0]

    def measure(self, outputs: Callable[[dict[str, Tensor]], list[Tensor]], count: int) -> list[dict[str, float]]:
        """One pass over the split, for `count` sets of logits at once.

        Args:
            outputs: a batch on the device to `count` tensors `[b, classes]`.

        Returns:
            For each of them `acc1`, `acc5`, `loss`, `seen`, and `unreadable` when samples were skipped.

        Raises:
            AssertionError: when not every sample was seen exactly once.
        """
        totals = [dict.fromkeys(("seen", "top1", "top5", "loss"), 0.0) for _ in range(count)]
        skipped = 0.0
        for batch in self.session.device.prefetch(self.loader):
            for total, logits in zip(totals, outputs(batch), strict=True):
                for name, value in metrics.sums(logits, batch["label"], batch["valid"]).items():
                    total[name] += value.item()
            for index, valid in zip(batch["id"].tolist(), batch["valid"].tolist(), strict=True):
                if index >= 0 and not valid:
                    self.unreadable.name(index, "left out of the evaluation")
                    skipped += 1
        unreadable = int(collectives.sum_numbers([skipped])[0])
        summaries = []
        for total in totals:
            total = dict(zip(total, collectives.sum_numbers(list(total.values())), strict=True))
            assert int(total["seen"]) + unreadable == len(self.source), (total["seen"], unreadable, len(self.source))
            summaries.append(metrics.summarize(total) | ({"unreadable": unreadable} if unreadable else {}))
        return summaries


def epochs(picked: LoadedModel) -> float | None:
    """How long the weights were trained, where the file says so."""
    meta = picked.meta
    batch, examples = meta.get("config", {}).get("batch_size"), meta.get("examples")
    return meta["step"] * batch / examples if batch and examples else None


def write_result(session: Session, model: pcpvt.PCPVT, figures: dict[str, Any], seconds: float) -> None:
    """`result-eval.json`, by the main process; and `result.json` where no training has left one."""
    path = session.workdir / "result-eval.json"
    result = {
        "mode": "eval",
        **figures,
        "images": figures["seen"],
        "images_per_sec": round(figures["seen"] / seconds, 2),
        "seconds": round(seconds, 2),
        "n_parameters": pcpvt.n_parameters(model),
    }
    if session.world.is_main:
        records.write_json(path, result)
        training = session.workdir / "result.json"
        if not training.exists() or stored.read_config(training).get("mode") != "train":
            records.write_json(training, result)
    Console(session.world.is_main).say(f"{figures['seen']} images in {duration(seconds)}; written to {path}")


def report(summary: dict[str, float]) -> str:
    """The figures as one line, alike in training and evaluation."""
    text = f"top-1 {summary['acc1']:.3f} %   top-5 {summary['acc5']:.3f} %   loss {summary['loss']:.6f}"
    return text + (f"   unreadable {summary['unreadable']}" if summary.get("unreadable") else "")
