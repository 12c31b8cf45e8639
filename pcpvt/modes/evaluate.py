"""`--mode=eval` and the evaluation inside training: exact counts over a whole split at any world size."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from torch import Tensor

from pcpvt.config.plan import eval_batch
from pcpvt.data import sources
from pcpvt.data.loader import EvalBatches, Loader
from pcpvt.devices import collectives
from pcpvt.devices.compilation import compiled
from pcpvt.functional import metrics
from pcpvt.functional.objective import make_predict
from pcpvt.models import pcpvt
from pcpvt.modes import chosen
from pcpvt.modes import session as sessions
from pcpvt.modes.console import Console, duration
from pcpvt.modes.session import Session
from pcpvt.store import records

Observe = Callable[[dict[str, Tensor], Tensor], None]


class Unreadable:
    """Names the samples of a source that cannot be read: each once, by the first process that meets it."""

    def __init__(self, source: sources.Source, console: Console):
        self._source, self._console, self._named = source, console, set[int]()

    def name(self, index: int, consequence: str) -> None:
        text = f"{self._source.name(index)}: unreadable; {consequence}"
        if index not in self._named and collectives.first_to_say(text):
            self._console.warn(text)
        self._named.add(index)


class Evaluator:
    """Called with parameters, evaluates them on one split; loader processes and compiled code live as long as this."""

    def __init__(self, session: Session, model: pcpvt.PCPVT, source: sources.Source, local_batch: int):
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
            pin=session.device.pins,
        )
        predict = make_predict(model, policy=session.policy, kernels=sessions.kernels(session))
        self.predict = compiled(predict, session.device, config.compile)

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


def run(session: Session) -> int:
    """Evaluates one checkpoint, or an ensemble, and writes `result-eval.json`; returns the exit code."""
    began = time.perf_counter()
    config = session.config
    if config.eval.ensemble:
        from pcpvt.modes import ensemble

        return ensemble.run(session)
    console = Console(session.world.is_main)
    picked = chosen.choose(config, session.workdir)
    source = sessions.open_data(session, "val")
    chosen.check_classes(picked, source.classes, config.num_classes)
    for note in picked.notes:
        console.say(f"note: {note}")
    evaluator = Evaluator(session, picked.model, source, eval_batch(config))
    data = config.data.path or config.data.name
    console.say(f"evaluating {picked.path} ({picked.which}) on {len(source)} images of {data}")
    summary = evaluator(picked.params)
    console.say(report(summary))
    result = {"epochs": epochs(picked), "checkpoint": picked.path, "weights": picked.which}
    write_result(session, picked.model, {**summary, **result}, time.perf_counter() - began)
    return 0


def epochs(picked: chosen.Chosen) -> float | None:
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
        if not training.exists() or records.read_config(training).get("mode") != "train":
            records.write_json(training, result)
    Console(session.world.is_main).say(f"{figures['seen']} images in {duration(seconds)}; written to {path}")


def report(summary: dict[str, float]) -> str:
    """The figures as one line, alike in training and evaluation."""
    text = f"top-1 {summary['acc1']:.3f} %   top-5 {summary['acc5']:.3f} %   loss {summary['loss']:.6f}"
    return text + (f"   unreadable {summary['unreadable']}" if summary.get("unreadable") else "")
