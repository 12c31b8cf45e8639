"""`--mode=eval`: one checkpoint or an ensemble on the validation split."""

import time

from pcpvt.checkpoints.labels import match
from pcpvt.config.plan import eval_batch
from pcpvt.evaluate import ensemble
from pcpvt.evaluate.evaluator import evaluate_one, open_split, report, split_name
from pcpvt.evaluate.output import Evaluated, write
from pcpvt.runners.runner import open_configured
from pcpvt.runtime import session as sessions
from pcpvt.runtime.console import Console, warn_once
from pcpvt.runtime.session import Session


def run(session: Session) -> int:
    """Evaluate one checkpoint, or an ensemble, and write `result-eval.json`; returns the exit code."""
    began = time.perf_counter()
    config = session.config
    if config.eval.ensemble:
        return ensemble.run(session)
    console = Console(session.world.is_main)
    runner = open_configured(session)
    matched = match(runner, sessions.open_data(session, "val"), config)
    dataset = matched.dataset
    for note in (*runner.notes, *matched.notes):
        console.say(f"note: {note}")
    for warning in matched.warnings:
        warn_once(warning)
    split = open_split(session, dataset, eval_batch(config))
    data = config.data.path or config.data.name
    console.say(
        f"evaluating {runner.name} on {len(dataset)} images of {data}, split {split_name(dataset)}: "
        f"{session.preprocessing(runner.precision)}"
    )
    evaluation = evaluate_one(session, split, runner.predict)
    console.say(report(evaluation.metrics))
    meta = runner.meta  # of our own checkpoints; empty for other files
    batch, examples = meta.get("config", {}).get("batch_size"), meta.get("examples")
    figures = {
        "epochs": meta["step"] * batch / examples if batch and examples else None,
        "checkpoint": runner.path,
        "weights": runner.which,
        "precision": runner.precision,
        "n_parameters": runner.n_parameters,
    }
    evaluated = Evaluated(dataset, matched.left_out, evaluation, figures)
    write(session, evaluated, time.perf_counter() - began)
    return 0
