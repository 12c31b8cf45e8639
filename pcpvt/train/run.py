"""`--mode=train`: prepare a run, check it, train, and write its result and report."""

import contextlib
import json
from pathlib import Path
from typing import Any

import torch

from pcpvt.checkpoints import checkpoint
from pcpvt.checkpoints.writer import Saver
from pcpvt.config import stored
from pcpvt.distributed import collectives, restart, signals
from pcpvt.errors import UserError
from pcpvt.evaluate.evaluator import report as metrics_line
from pcpvt.functional.state import TrainState
from pcpvt.models import pcpvt
from pcpvt.nodes import check
from pcpvt.report import run as report
from pcpvt.runtime import records
from pcpvt.runtime.console import duration
from pcpvt.runtime.session import Session
from pcpvt.train import history as histories
from pcpvt.train import loop, preflight, writers
from pcpvt.train.history import History
from pcpvt.train.next_commands import next_commands
from pcpvt.train.setup import TrainSetup, elapsed, prepare

LISTED = 8  # sample ids in the message about a run that diverged; `nonfinite.json` has them all


def run(session: Session) -> int:
    """Train to the end of the plan, or to a signal; returns the exit code."""
    setup, state, history = prepare(session)
    plan, say, step = setup.plan, setup.console.say, int(state.step)
    preflight.announce_run(session, plan, setup.model, len(setup.split.dataset), say)
    say(f"splits: {setup.batches.dataset.split} to train on, {setup.split.dataset.split} to evaluate on")
    for note in setup.notes:
        say(f"note: {note}")
    check.before_start(session, setup.batches.dataset, setup.split.dataset, say)
    if setup.resumed_from is not None:
        say(f"resumed: step {step} of {plan.steps}, from {setup.resumed_from}")
    if loop.finished(plan, history, step, session.config.patience):
        why = f", and {_lost_patience(session, history)}" if step < plan.steps else ""
        say(f"nothing to do: {session.workdir} is at step {step} of {plan.steps}{why}")
        _conclude(setup, state, history)
        _propose(setup)
        return 0
    preflight.check_disk(session, plan, state, say)
    if session.world.is_main:
        records.write_json(session.workdir / "config.json", session.config.to_dict())
        if session.command and step == 0:
            records.write_command(session.workdir, session.command.line())
    with contextlib.ExitStack() as stack:
        outputs, history = writers.open_writers(session, plan, history, step, setup.console)
        for writer in outputs:
            stack.callback(writer.close)
        saver = Saver(
            session.checkpoints, session.config.keep, setup.console.warn, before=[writer.sync for writer in outputs],
            saved=step, writes=session.world.is_main, passed=setup.audit.passed,
        )  # fmt: skip
        stack.callback(saver.finish)
        if again := restart.restarted():
            entry = histories.restart_record(plan, step, *again)
            history = history._replace(records=history.records + 1)
            for writer in outputs:
                writer.record(entry)
        state, history = loop.train(setup, state, history, outputs, saver)
        if history.diverged(session.config.max_skipped):
            raise _divergence_error(setup, history, saver.last_good())
        signals.ignore_from_now()  # all is saved: a launcher's signals from here on must not change the exit code
        step = int(state.step)
        if not loop.finished(plan, history, step, session.config.patience):
            collectives.await_all(signals.SAVE_LIMIT)  # the first process to leave makes the launcher stop the others
            if signals.stopped_by_launcher():
                say(f"stopped by the launcher at step {step}; saved")
            else:
                say(f"stopped by a signal at step {step}; saved. The same command goes on from there.")
            return signals.code_of_stop()
        if step < plan.steps:
            say(f"ended at step {step} of {plan.steps}: {_lost_patience(session, history)}")
        _conclude(setup, state, history)
        report.at_end(session, setup.console)
        _propose(setup)
    return 0


def _divergence_error(setup: TrainSetup, history: History, last_good: Path | None) -> UserError:
    """The error that ends a run; `nonfinite.json` lists the non-finite steps in a row with all their samples."""
    session, plan = setup.session, setup.plan
    steps: list[dict[str, Any]] = []
    for step, loss, grad_norm, _ in history.streak:
        draws = setup.batches.global_draws(step - 1)
        samples = [{"id": draw.index, "name": setup.batches.dataset.name(draw.index)} for draw in draws]
        steps.append({"step": step, "loss": str(loss), "grad_norm": str(grad_norm), "samples": samples})
    where = session.workdir / records.NONFINITE
    if session.world.is_main:
        with contextlib.suppress(OSError):  # the error matters more than the file
            records.write_json(where, {"steps": steps, "last_good": str(last_good)})
    remedies = [f"--config.lr={plan.lr / 2:.3g} (half)"]
    if session.policy.compute != torch.float32:
        remedies.append("--config.precision=float32")
    ids = [str(sample["id"]) for sample in steps[-1]["samples"]]
    more = f" and {len(ids) - LISTED} more" if len(ids) > LISTED else ""
    return UserError(
        f"config.max_skipped: the loss or gradient was not finite {len(steps)} times in a row, up to step "
        f"{steps[-1]['step']} (samples {', '.join(ids[:LISTED])}{more}; all of them in {where}): start the same "
        f"command again with {' or '.join(remedies)}; it goes on from {last_good or 'step 0: nothing was saved before'}"
    )


def _conclude(setup: TrainSetup, state: TrainState, history: History) -> None:
    """Write `result.json`, with the metrics of the best checkpoint, which `--mode=eval` reproduces; print it."""
    session, say, result = setup.session, setup.console.say, _result(setup, int(state.step), history)
    if setup.resumed_from is not None:
        result = _earlier_result(session, result) or result
    if session.world.is_main:
        records.write_json(session.workdir / "result.json", result)
    say("")
    if result[session.task.metrics[0]] is not None:
        say(f"final accuracy: {metrics_line(result)} (best in {session.config.best}, step {result['best_step']})")
    time = duration(result["seconds"])
    say(f"final images/s: {result['images_per_sec']:.1f}   end-to-end duration: {time}")
    say(f"written to {session.workdir}: result.json, metrics.jsonl, config.json, checkpoints/")


def _lost_patience(session: Session, history: History) -> str:
    config = session.config
    return f"{history.stale} evaluations in a row were not better in {config.best} (config.patience={config.patience})"


def _propose(setup: TrainSetup) -> None:
    """Print what to do next."""
    setup.console.say("next:")
    for line in next_commands(setup.session):
        setup.console.say(f"  {line}")


def _result(setup: TrainSetup, step: int, history: History) -> dict[str, Any]:
    session, plan, best, names = setup.session, setup.plan, history.best or {}, setup.session.task.metrics
    best_step = best.get("step", step)
    # Validation images that were left out, and draws of training images that were replaced.
    counts = {"unreadable": best.get("unreadable"), "replaced": history.replaced}
    return {
        "mode": "train",
        **{name: best.get(name) for name in names},
        **{name: best[name] for name in (f"{names[0]}_raw", "loss_raw") if name in best},
        "best_step": best_step, "images": step * plan.batch,
        "images_per_sec": round(history.images_per_sec(plan.batch), 2),
        "epochs": step * plan.batch / plan.examples, "steps": step,
        "seconds": round(elapsed(setup, history), 2), "n_parameters": pcpvt.n_parameters(setup.model),
        "checkpoint": str(session.checkpoints / checkpoint.name_of(best_step)), "last": history.metrics,
        "split": setup.split.dataset.split,
        "device": session.device.describe(), "processes": session.world.size, **_per_class(session, best_step),
        **{name: count for name, count in counts.items() if count},
    }  # fmt: skip


def _per_class(session: Session, best_step: int) -> dict[str, Any]:
    """The figures of each class at the best step, from the details of that evaluation; None where they are missing."""
    names, details = ["recall"], {}
    if session.config.task == "multilabel":
        names += ["f1", "average_precision"]
    with contextlib.suppress(UserError):
        details = stored.read_config(session.workdir / records.DETAILS)
    return {name: details.get(name) if details.get("step") == best_step else None for name in names}


def _earlier_result(session: Session, result: dict[str, Any]) -> dict[str, Any] | None:
    """The result that an earlier part of the run wrote for the same state, if there is one: its times are the run's."""
    try:
        earlier = json.loads((session.workdir / "result.json").read_text())
        same = earlier.keys() == result.keys() and all(earlier[k] == result[k] for k in ("steps", "last", "best_step"))
        return earlier if same else None
    except (OSError, ValueError, AttributeError):
        return None
