"""`--mode=eval`: one checkpoint or an ensemble on the validation split."""

import time

from pcpvt.checkpoints.labels import match
from pcpvt.checkpoints.load import load_configured
from pcpvt.config.plan import eval_batch
from pcpvt.evaluate import ensemble
from pcpvt.evaluate.evaluator import evaluate, open_split, report, split_name
from pcpvt.evaluate.output import Evaluated, write
from pcpvt.functional.step import make_eval_step
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
    loaded = load_configured(config, session.workdir)
    matched = match(loaded, sessions.open_data(session, "val"), config)
    dataset = matched.dataset
    for note in (*loaded.notes, *matched.notes):
        console.say(f"note: {note}")
    for warning in matched.warnings:
        warn_once(warning)
    split = open_split(session, dataset, eval_batch(config))
    data = config.data.path or config.data.name
    console.say(
        f"evaluating {loaded.path} ({loaded.which}) on {len(dataset)} images of {data}, split {split_name(dataset)}: "
        f"{session.preprocessing}"
    )
    eval_step = make_eval_step(session.predictor(loaded.model), session.task.sums)
    params = session.inference(loaded.params)
    found = evaluate(session, split, lambda batch: [eval_step(params, batch)])
    assert found is not None  # nothing stops it
    (evaluation,) = found
    console.say(report(evaluation.metrics))
    meta = loaded.meta  # of our own checkpoints; empty for other files
    batch, examples = meta.get("config", {}).get("batch_size"), meta.get("examples")
    figures = {
        "epochs": meta["step"] * batch / examples if batch and examples else None,
        "checkpoint": loaded.path,
        "weights": loaded.which,
    }
    evaluated = Evaluated(loaded.model, dataset, matched.left_out, evaluation, figures)
    write(session, evaluated, time.perf_counter() - began)
    return 0
