"""`--mode=eval`: one checkpoint or an ensemble on the validation split."""

from __future__ import annotations

import time

from pcpvt.checkpoints.load import check_labels, load_configured
from pcpvt.config.plan import eval_batch
from pcpvt.evaluate import ensemble
from pcpvt.evaluate.evaluator import Evaluator, epochs, report, write_result
from pcpvt.runtime import session as sessions
from pcpvt.runtime.console import Console
from pcpvt.runtime.session import Session


def run(session: Session) -> int:
    """Evaluates one checkpoint, or an ensemble, and writes `result-eval.json`; returns the exit code."""
    began = time.perf_counter()
    config = session.config
    if config.eval.ensemble:
        return ensemble.run(session)
    console = Console(session.world.is_main)
    picked = load_configured(config, session.workdir)
    source = sessions.open_data(session, "val")
    check_labels(picked, source.classes, config.num_classes)
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
