"""`--mode=train`: prepare a run, check it, train, and write its result and report."""

from __future__ import annotations

import json
from contextlib import ExitStack
from typing import Any

from pcpvt.checkpoints import checkpoint
from pcpvt.checkpoints.writer import Saver
from pcpvt.distributed import collectives, signals
from pcpvt.evaluate.evaluator import report as metrics_line
from pcpvt.functional.state import TrainState
from pcpvt.models import pcpvt
from pcpvt.report import run as report
from pcpvt.runtime import records
from pcpvt.runtime.console import Console, duration
from pcpvt.runtime.session import Session
from pcpvt.train import loop, preflight, writers
from pcpvt.train.divergence import divergence_error
from pcpvt.train.history import History
from pcpvt.train.setup import TrainSetup, elapsed, prepare


def run(session: Session) -> int:
    """Train to the end of the plan, or to a signal; returns the exit code."""
    console = Console(session.world.is_main)
    setup, state, history = prepare(session, console)
    plan, step = setup.plan, int(state.step)
    preflight.announce_run(setup, step, console.say)
    if loop.finished(plan, history, step):
        console.say(f"nothing to do: {session.workdir} is at step {step} of {plan.steps}")
        _conclude(setup, state, history, console)
        return 0
    preflight.check_disk(session, plan, state, console.say)
    if session.world.is_main:
        records.write_json(session.workdir / "config.json", session.config.to_dict())
    with ExitStack() as stack:
        outputs, history = writers.open_writers(session, plan, history, step, console)
        for writer in outputs:
            stack.callback(writer.close)
        saver = Saver(
            session.checkpoints, session.config.keep, console.warn, before=[writer.sync for writer in outputs],
            saved=step, last_good=setup.resumed_from, writes=session.world.is_main,
        )  # fmt: skip
        stack.callback(saver.finish)
        state, history = loop.train(setup, state, history, outputs, saver, console)
        if history.diverged(session.config.max_skipped):
            raise divergence_error(session, plan, setup.train_data, history.streak, saver.last_good)
        signals.ignore()  # all is saved: a launcher's signals from here on must not change the exit code
        if not loop.finished(plan, history, int(state.step)):
            collectives.barrier()  # the first process to leave makes the launcher stop the others
            console.say(f"stopped by a signal at step {int(state.step)}; saved. The same command goes on from there.")
            return signals.PREEMPTED
        _conclude(setup, state, history, console)
        report.at_end(session, console)
    return 0


def _conclude(setup: TrainSetup, state: TrainState, history: History, console: Console) -> None:
    """Write `result.json`, with the metrics of the best checkpoint, which `--mode=eval` reproduces; print it."""
    session, say = setup.session, console.say
    result = _result(setup, int(state.step), history)
    if setup.resumed_from is not None:
        result = _earlier_result(session, result) or result
    if session.world.is_main:
        records.write_json(session.workdir / "result.json", result)
    say("")
    if result["acc1"] is not None:
        say(f"final accuracy: {metrics_line(result)} (best, step {result['best_step']})")
    time = duration(result["seconds"])
    say(f"final images/s: {result['images_per_sec']:.1f}   end-to-end duration: {time}")
    say(f"written to {session.workdir}: result.json, metrics.jsonl, config.json, checkpoints/")


def _result(setup: TrainSetup, step: int, history: History) -> dict[str, Any]:
    session, plan, best = setup.session, setup.plan, history.best or {}
    best_step = best.get("step", step)
    # Validation images that were left out, and draws of training images that were replaced.
    counts = {"unreadable": best.get("unreadable"), "replaced": history.replaced}
    return {
        "mode": "train",
        "acc1": best.get("acc1"),
        "acc5": best.get("acc5"),
        "loss": best.get("loss"),
        "best_step": best_step,
        "images": step * plan.batch,
        "images_per_sec": round(history.images_per_sec(plan.batch), 2),
        "epochs": plan.epochs,
        "steps": step,
        "seconds": round(elapsed(setup, history), 2),
        "n_parameters": pcpvt.n_parameters(setup.model),
        "checkpoint": str(session.checkpoints / checkpoint.name_of(best_step)),
        "last": history.metrics,
        "device": session.device.describe(),
        "processes": session.world.size,
        **{name: count for name, count in counts.items() if count},
    }


def _earlier_result(session: Session, result: dict[str, Any]) -> dict[str, Any] | None:
    """The result that an earlier part of the run wrote for the same state, if there is one: its times are the run's."""
    try:
        earlier = json.loads((session.workdir / "result.json").read_text())
        same = earlier.keys() == result.keys() and all(earlier[k] == result[k] for k in ("steps", "last", "best_step"))
        return earlier if same else None
    except (OSError, ValueError, AttributeError):
        return None
