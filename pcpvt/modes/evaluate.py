"""`--mode=eval` and the evaluation inside training: exact counts over a whole split at any world size."""

from __future__ import annotations

import time
from pathlib import Path

from torch import Tensor

from pcpvt.config.plan import eval_batch
from pcpvt.data import sources
from pcpvt.data.loader import EvalBatches, Loader
from pcpvt.devices import collectives
from pcpvt.devices.compilation import compiled
from pcpvt.errors import UserError
from pcpvt.functional import metrics
from pcpvt.functional.objective import make_predict
from pcpvt.models import pcpvt
from pcpvt.modes import session as sessions
from pcpvt.modes.console import Console, duration
from pcpvt.modes.session import Session
from pcpvt.store import checkpoint, records


class Evaluator:
    """Called with parameters, evaluates them on one split; loader processes and compiled code are kept between calls."""

    def __init__(self, session: Session, model: pcpvt.PCPVT, source: sources.Source, local_batch: int):
        config, world = session.config, session.world
        self.session, self.source = session, source
        batches = EvalBatches(
            source, session.size, config.eval.crop, local_batch, world.rank, world.size, config.data.on_error
        )
        self.loader = Loader(
            batches,
            range(len(batches)),
            sessions.workers(session, source),
            start=session.device.worker_start,
            pin=sessions.pins(session),
        )
        predict = make_predict(model, policy=session.policy, attend=session.device.attend(session.policy.compute))
        self.predict = compiled(predict, session.device, config.compile)

    def __call__(self, params: dict[str, Tensor]) -> dict[str, float]:
        """`acc1`, `acc5`, `loss`, `seen`, and `unreadable` when samples were skipped.

        Raises:
            AssertionError: when not every sample was seen exactly once.
        """
        weights = self.session.compute(params)
        total = dict.fromkeys(("seen", "top1", "top5", "loss", "unreadable"), 0.0)
        for batch in self.session.device.prefetch(self.loader):
            logits = self.predict(weights, batch["image"])
            sums = metrics.sums(logits, batch["label"], batch["valid"])
            for name, value in sums.items():
                total[name] += value.item()
            total["unreadable"] += int(((batch["id"] >= 0) & ~batch["valid"]).sum())
        total = dict(zip(total, collectives.sum_numbers(list(total.values())), strict=True))
        unreadable = int(total.pop("unreadable"))
        assert int(total["seen"]) + unreadable == len(self.source), (total["seen"], unreadable, len(self.source))
        summary = metrics.summarize(total)
        return {**summary, "unreadable": unreadable} if unreadable else summary


def select(session: Session) -> checkpoint.Checkpoint:
    """The checkpoint to evaluate: `config.checkpoint`, else the best of the workdir that is whole.

    Raises:
        CheckpointError: when there is none.
    """
    if session.config.checkpoint:
        return checkpoint.read(Path(session.config.checkpoint))
    for path in [*checkpoint.by_score(session.checkpoints), *reversed(checkpoint.steps(session.checkpoints).values())]:
        try:
            return checkpoint.read(path)
        except checkpoint.CheckpointError as error:
            Console().warn(f"{error}; trying the next best")
    raise checkpoint.CheckpointError(
        f"{session.checkpoints}: holds no usable checkpoint: train first, or give --config.checkpoint=FILE"
    )


def params_of(loaded: checkpoint.Checkpoint, model: pcpvt.PCPVT) -> dict[str, Tensor]:
    """The weights that training evaluated (the average where there is one), checked against the model.

    Raises:
        CheckpointError: when the checkpoint is of another model.
    """
    prefix = "ema/" if any(name.startswith("ema/") for name in loaded.tensors) else "params/"
    params = {n.removeprefix(prefix): v for n, v in loaded.tensors.items() if n.startswith(prefix)}
    if {n: v.shape for n, v in params.items()} != pcpvt.shapes(model):
        raise checkpoint.CheckpointError(
            f"{loaded.path}: holds {loaded.meta['model']} with {len(loaded.meta['classes'])} classes, and the config asks "
            "for another model or class count: use the config of that run"
        )
    return params


def run(session: Session) -> int:
    """Evaluates one checkpoint, prints the figures and writes `result-eval.json`; returns the exit code."""
    began = time.perf_counter()
    config = session.config
    console = Console(session.world.is_main)
    loaded = select(session)
    source = sessions.open_data(session, "val")
    if list(source.classes) != list(loaded.meta["classes"]):
        raise UserError(
            f"{loaded.path}: was trained on {len(loaded.meta['classes'])} classes and the data have "
            f"{len(source.classes)} or others: give the data it was trained on"
        )
    model = sessions.build_model(config, loaded.tensors["params/head.bias"].shape[0])
    evaluator = Evaluator(session, model, source, eval_batch(config))
    params = params_of(loaded, model)
    console.say(f"evaluating {loaded.path} on {len(source)} images of {config.data.path or config.data.name}")
    summary = evaluator(params)
    seconds = time.perf_counter() - began
    result = {
        "mode": "eval",
        **summary,
        "images": summary["seen"],
        "images_per_sec": round(summary["seen"] / seconds, 2),
        "epochs": loaded.meta["step"] * config.batch_size / max(loaded.meta["examples"], 1),
        "seconds": round(seconds, 2),
        "n_parameters": pcpvt.n_parameters(model),
        "checkpoint": str(loaded.path),
    }
    if session.world.is_main:
        records.write_json(session.workdir / "result-eval.json", result)
    console.say(report(summary))
    console.say(f"{summary['seen']} images in {duration(seconds)}; written to {session.workdir / 'result-eval.json'}")
    return 0


def report(summary: dict[str, float]) -> str:
    """The figures as one line, alike in training and evaluation."""
    text = f"top-1 {summary['acc1']:.3f} %   top-5 {summary['acc5']:.3f} %   loss {summary['loss']:.6f}"
    return text + (f"   unreadable {summary['unreadable']}" if summary.get("unreadable") else "")
