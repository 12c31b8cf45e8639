"""What `--mode=eval` leaves in the workdir: `result-eval.json`, `details-eval.json` and `report-eval.html`."""

from typing import Any, NamedTuple

from pcpvt.data.sources import Dataset
from pcpvt.evaluate import mistakes
from pcpvt.evaluate.evaluator import Evaluation, per_class, split_name
from pcpvt.report import data
from pcpvt.report import evaluation as page
from pcpvt.runtime import records
from pcpvt.runtime.console import Console, duration
from pcpvt.runtime.session import Session


class Evaluated(NamedTuple):
    """One evaluation of a model or an ensemble."""

    dataset: Dataset
    left_out: dict[str, int]  # images of each class that the model does not know
    evaluation: Evaluation
    figures: dict[str, Any]  # what else belongs into the result: `checkpoint`, `precision`, `epochs`, ...


def write(session: Session, done: Evaluated, seconds: float) -> None:
    """Write the files on the main process; `result.json` too unless a training has left one. All must call this."""
    config, console, metrics = session.config, Console(session.world.is_main), done.evaluation.metrics
    path = session.workdir / "result-eval.json"
    by_class = per_class(done.evaluation, done.dataset.classes)
    assert done.evaluation.log is not None  # it is of the first model
    result = {
        "mode": "eval", **metrics, **done.figures, "images": metrics["seen"],
        "data": config.data.path or config.data.name, "split": split_name(done.dataset),
        **({"left_out": done.left_out} if done.left_out else {}),
        "image_size": list(session.size), "crop": config.eval.crop,
        "images_per_sec": round(metrics["seen"] / seconds, 2), "seconds": round(seconds, 2),
        "device": session.device.describe(), **by_class,
    }  # fmt: skip
    about = {name: result[name] for name in ("data", "split", "checkpoint", "weights")}
    mistakes.write(session, done.evaluation.log, done.dataset, about, console.warn, records.EVAL_DETAILS)
    if session.world.is_main:
        records.write_json(path, result)
        training = session.workdir / "result.json"
        if data.read_object(training).get("mode") != "train":  # or it is missing, or damaged
            records.write_json(training, result)
    console.say(f"{metrics['seen']} images in {duration(seconds)}; written to {path}")
    if session.world.is_main:
        try:
            console.say(f"report: {page.write(session.workdir)}")
        except OSError as error:
            console.warn(f"{session.workdir / page.FILE} is not written ({error.strerror or error})")
