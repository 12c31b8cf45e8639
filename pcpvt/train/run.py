"""`--mode=train`: the story of a run, from its data to its summary."""

from __future__ import annotations

import json
from typing import Any

from pcpvt.checkpoints import checkpoint
from pcpvt.distributed import collectives, signals
from pcpvt.evaluate import evaluator
from pcpvt.models import pcpvt
from pcpvt.report import run as report
from pcpvt.runtime import records
from pcpvt.runtime.console import Console, duration
from pcpvt.runtime.session import Session
from pcpvt.train import preflight
from pcpvt.train.loop import Trainer


def run(session: Session) -> int:
    """Trains to the end of the plan, or to a signal; returns the exit code."""
    console = Console(session.world.is_main)
    trainer = Trainer(session, console)  # data, model, and the state: new, fine-tuned, or the newest checkpoint's
    preflight.announce(trainer)
    if trainer.finished:
        console.say(f"nothing to do: {session.workdir} is at step {trainer.now} of {trainer.plan.steps}")
        summarize(trainer)
        return 0
    preflight.check(trainer)
    if session.world.is_main:
        records.write_json(session.workdir / "config.json", session.config.to_dict())
    trainer.recorder.open()
    try:
        completed = trainer.train()
        signals.ignore_from_now()  # all is saved: what a launcher sends now must not spoil the exit code
        if not completed:
            collectives.barrier()  # the first process to leave makes the launcher stop the others
            console.say(f"stopped by a signal at step {trainer.now}; saved. The same command goes on from there.")
            return signals.PREEMPTED
        summarize(trainer)
        report.at_end(session, console)
        return 0
    finally:
        trainer.close()


def summarize(trainer: Trainer) -> None:
    """The last lines, and `result.json`: the figures of the best checkpoint, which `--mode=eval` reproduces."""
    session, say = trainer.session, trainer.console.say
    result = _written(trainer) or _result(trainer)
    if session.world.is_main:
        records.write_json(session.workdir / "result.json", result)
    say("")
    if result["acc1"] is not None:
        say(f"final accuracy: {evaluator.report(result)} (best, step {result['best_step']})")
    time = duration(result["seconds"])
    say(f"final images/s: {result['images_per_sec']:.1f}   end-to-end duration: {time}")
    say(f"written to {session.workdir}: result.json, metrics.jsonl, config.json, checkpoints/")


def _result(trainer: Trainer) -> dict[str, Any]:
    session, plan, best = trainer.session, trainer.plan, trainer.best or {}
    step = best.get("step", trainer.now)
    # Validation images that count nowhere, and draws of training images that others took the place of.
    skipped = {"unreadable": best.get("unreadable"), "replaced": trainer.recorder.replaced}
    return {
        "mode": "train",
        "acc1": best.get("acc1"),
        "acc5": best.get("acc5"),
        "loss": best.get("loss"),
        "best_step": step,
        "images": trainer.now * plan.batch,
        "images_per_sec": round(trainer.recorder.images_per_sec, 2),
        "epochs": plan.epochs,
        "steps": trainer.now,
        "seconds": round(trainer.recorder.elapsed, 2),
        "n_parameters": pcpvt.n_parameters(trainer.model),
        "checkpoint": str(session.checkpoints / checkpoint.name_of(step)),
        "last": trainer.metrics,
        "device": session.device.describe(),
        "processes": session.world.size,
        **{name: count for name, count in skipped.items() if count},
    }


def _written(trainer: Trainer) -> dict[str, Any] | None:
    """The result that a finished run wrote before, of this very state."""
    try:
        result = json.loads((trainer.session.workdir / "result.json").read_text())
        known = _result(trainer)
        same = result.keys() == known.keys() and all(result[k] == known[k] for k in ("steps", "last", "best_step"))
        return result if trainer.resumed and trainer.finished and same else None
    except (OSError, ValueError, AttributeError):
        return None
