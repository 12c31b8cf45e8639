"""`report-eval.html`: the page of one `--mode=eval`, from `result-eval.json` and `details-eval.json` of a workdir."""

from pathlib import Path
from typing import Any

from pcpvt.checkpoints.atomic import write_atomically
from pcpvt.report import data, multilabel
from pcpvt.report.charts import short
from pcpvt.report.run import render
from pcpvt.runtime import records
from pcpvt.runtime.console import duration

FILE = "report-eval.html"
_TILES = {
    "map": "mAP", "micro_f1": "micro F1",
    "acc1": "top-1 accuracy", "acc5": "top-5 accuracy", "balanced_acc": "balanced accuracy", "macro_f1": "macro F1",
}  # fmt: skip
_MAIN = {"acc1": "top-1", "map": "mAP"}
_ABOUT = (
    "checkpoint", "weights", "data", "split", "image_size", "crop", "precision", "device", "threshold", "unreadable",
    "left_out",
)  # fmt: skip


def write(workdir: Path) -> Path:
    """Writes the page; OSError as the file system gives it."""
    result = data.read_object(workdir / "result-eval.json")
    text = render_evaluation(result, data.read_object(workdir / records.EVAL_DETAILS))
    path = workdir / FILE
    # A file name may hold bytes that are not valid text.
    write_atomically(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8", errors="replace"))
    return path


def render_evaluation(result: dict[str, Any], details: dict[str, Any]) -> str:
    """The page of an evaluation's result and details; both may lack anything."""
    figures = {label: f"{result[name]:.2f} %" for name, label in _TILES.items() if data.is_number(result.get(name))}
    if data.is_number(result.get("loss")):
        figures["loss"] = short(result["loss"])
    if data.is_number(result.get("images_per_sec")):
        figures["images/s"] = short(result["images_per_sec"])
    if data.is_number(result.get("seconds")):
        figures["duration"] = duration(result["seconds"])
    about = {name.replace("_", " "): result[name] for name in _ABOUT if result.get(name) not in (None, "")}
    ensemble, main = result.get("ensemble"), "map" if "map" in result else "acc1"
    members = [
        {**member, "figure": _fixed(member.get(main), 2, " %"), "loss": _fixed(member.get("loss"), 4)}
        for member in (ensemble.get("members", []) if isinstance(ensemble, dict) else [])
    ]
    title = f"Evaluation of {Path(str(result.get('checkpoint', ''))).name}"
    classes, answers = data.summarize_classes(details), multilabel.summarize_answers(details)
    values = {"members": members, "main": _MAIN[main], "classes": classes, "answers": answers, "of": ""}
    return render(title, [], "evaluation.html", figures=figures, about=about, **values)


def _fixed(value: Any, digits: int, unit: str = "") -> str:
    """A number with so many digits after the point; a dash for none, such as the loss of weights that diverged."""
    return f"{value:.{digits}f}{unit}" if data.is_number(value) else "–"
