"""`--mode=report`, and the end of a training: `report.html` from the files of a workdir, readable offline."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pcpvt.checkpoints.atomic import write_atomically
from pcpvt.config import fields, stored
from pcpvt.report import data, multilabel
from pcpvt.report.charts import EDGES, SIZE, Mark, Series, chart, short
from pcpvt.report.data import RunData
from pcpvt.runtime.console import Console, duration
from pcpvt.runtime.session import Session

FILE = "report.html"
COLORS = 6  # of the palette in report.css; with more runs they repeat


def run(session: Session) -> int:
    """Writes the report from the files of the workdirs; uses no device, data or checkpoint."""
    if session.world.is_main:
        names = [name.strip() for name in session.config.report.compare.split(",")]
        path = write(session.workdir, [Path(os.path.expanduser(name)) for name in names if name])
        Console().say(f"written: {path} ({path.stat().st_size / 1024:.0f} kB)")
    return 0


def at_end(session: Session, console: Console) -> None:
    """Writes the report of a training that has just ended, in the main process; a failure is only a warning."""
    if not session.world.is_main:
        return
    try:
        console.say(f"report: {write(session.workdir)}")
    except Exception as error:  # of any kind: the training has succeeded
        console.warn(f"{session.workdir / FILE} is not written ({type(error).__name__}: {error})")


def write(workdir: Path, compared: Sequence[Path] = ()) -> Path:
    """Writes the report of a workdir, other runs beside its own; UserError for a folder without a run, or OSError."""
    folders = list(dict.fromkeys(folder.resolve() for folder in (workdir, *compared)))
    named_by = ["--workdir", *["config.report.compare"] * (len(folders) - 1)]
    text = render_report(list(map(data.load, folders, distinct_names(folders), named_by)))
    path = workdir / FILE
    # A file name may hold bytes that are not valid text.
    write_atomically(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8", errors="replace"))
    return path


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of different paths, equally long, that tell them apart."""
    parts = 1
    while len(set(names := [str(Path(*folder.parts[-parts:])) for folder in folders])) < len(folders):
        parts += 1
    return names


def render_report(runs: Sequence[RunData]) -> str:
    """The report of the first run, in which the others are compared with it."""
    main, more = runs[0], len(runs) - 1
    title = f"{main.config.get('model.name', 'pcpvt')}: {main.name}"
    figures, defaults = [_figures(run) for run in runs], stored.flat(fields.base())
    recipe = {name: [run.config.get(name) for run in runs] for name in sorted({n for run in runs for n in run.config})}
    return render(
        f"{title} and {more} more" if more else title, _charts(runs), "report.html",
        subtitle=_subtitle(main), runs=runs, figures=figures,
        columns=list(dict.fromkeys(name for texts in figures for name in texts)),
        classes=data.summarize_classes(main.details), answers=multilabel.summarize_answers(main.details),
        recipe=recipe, restarts=[(run.name, *restart) for run in runs for restart in run.restarts()],
        shown_restarts=data.LISTED,
        differing={name: values for name, values in recipe.items() if any(value != values[0] for value in values)},
        changed={n: value for n, value in main.config.items() if n not in defaults or defaults[n] != value},
    )  # fmt: skip


def render(title: str, charts: Sequence[dict[str, Any]], template: str = "page.html", **values: Any) -> str:
    """A page of charts (see `charts.chart`), and what the template makes of the `values`."""
    import jinja2  # here, because only a process that writes a page needs it

    loader = jinja2.PackageLoader("pcpvt.report")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["shown"] = _shown
    values |= {"title": title, "charts": charts, "size": SIZE, "edges": EDGES, "colors": COLORS}
    return environment.get_template(template).render(values)


def _shown(value: Any) -> str:
    """The value of a config field as text."""
    if value is None:
        return "not set"
    if isinstance(value, float):
        return short(value)
    return '""' if value == "" else str(value)


def _subtitle(run: RunData) -> str:
    config, started = run.config, run.environment.get("started")
    sizes = config.keys() >= {"image_size", "batch_size"}
    parts = [
        " ".join(str(config[name]) for name in ("data.name", "data.path") if config.get(name)),
        f"{config['image_size']} px, batch {config['batch_size']}" if sizes else "",
        run.device(),
        f"started {started[:16].replace('T', ' ')} UTC" if started else "",
        "" if run.result else "not finished",
    ]
    return " · ".join(part for part in parts if part)


def _figures(run: RunData) -> dict[str, str]:
    """The headline figures; those that are not known are left out."""
    best, result, last = run.best(), run.result, run.metrics[-1] if run.metrics else {}
    speeds = sorted(speed for _, speed in run.curve("train", "images_per_sec"))
    speed = result.get("images_per_sec") or (speeds[len(speeds) // 2] if speeds else None)
    figures = {
        "mAP": f"{best['map']:.2f} %" if data.is_number(best.get("map")) else "",
        "micro F1": f"{best['micro_f1']:.2f} %" if data.is_number(best.get("micro_f1")) else "",
        "top-1 accuracy": f"{best['acc1']:.2f} %" if data.is_number(best.get("acc1")) else "",
        "top-5 accuracy": f"{best['acc5']:.2f} %" if best.get("acc5") is not None else "",
        "balanced accuracy": f"{best['balanced_acc']:.2f} %" if data.is_number(best.get("balanced_acc")) else "",
        "macro F1": f"{best['macro_f1']:.2f} %" if data.is_number(best.get("macro_f1")) else "",
        "validation loss": short(best["loss"]) if best.get("loss") is not None else "",
        "images/s": short(speed) if speed else "",
        "epochs": short(round(float(last["epoch"]), 2)) if last.get("epoch") else "",
        "duration": duration(result["seconds"]) if result.get("seconds") else "",
        "parameters": f"{result['n_parameters'] / 1e6:.3g} M" if result.get("n_parameters") else "",
    }
    return {name: text for name, text in figures.items() if text}


def _charts(runs: Sequence[RunData]) -> list[dict[str, Any]]:
    """The curves of one run have a colour each; with several runs the colour is the run's."""
    several = len(runs) > 1
    marks = [
        Mark(epoch, f"restart at step {step}: {reason}", i % COLORS if several else None)
        for i, run in enumerate(runs)
        for epoch, step, reason in run.restarts()
    ]

    def draw(title: str, *curves: tuple[str, str, str], **options: Any) -> dict[str, Any]:
        """A chart of all runs' curves, each given as (kind of record, its number, label)."""
        series = []
        for i, run in enumerate(runs):
            for j, (kind, number, label) in enumerate(curves):
                name = (run.name if len(curves) == 1 else f"{run.name} {label}") if several else label
                behind = kind == "train" and len(curves) > 1  # training, noisy, behind evaluation
                series.append(Series(name, run.curve(kind, number), (i if several else j) % COLORS, behind))
        return chart(title, series, marks=marks, **options)

    top1, top5 = ("eval", "acc1", "top-1"), ("eval", "acc5", "top-5")
    speeds = [speed for run in runs for _, speed in run.curve("train", "images_per_sec")]
    apart = bool(speeds) and 0 < 20 * min(speeds) < max(speeds)
    charts = [
        draw("Loss", ("eval", "loss", "validation"), ("train", "loss", "training"), log=None),
        draw("Top-1 accuracy in %", top1) if several else draw("Accuracy in %", top1, top5),
        draw("Mean average precision in %", ("eval", "map", "mAP")),
        draw("Learning rate", ("train", "lr", ""), zero=True),
        draw("Image height in training, in pixels", ("train", "image_size", ""), zero=True),
        draw("Images/s", ("train", "images_per_sec", ""), zero=True, log=apart),
        draw("Gradient norm, before clipping", ("train", "grad_norm", ""), zero=True, log=None),
        draw("Share of time waiting for data", ("train", "waiting", ""), zero=True),
    ]
    charts.append(draw("Slowest process: own time over the median's", ("train", "slowness", "")))
    if not several:
        curves = [Series(name, points, color) for color, (name, points) in enumerate(runs[0].times().items())]
        charts.append(chart("Share of time by rank, last part of the run", curves, x="rank", zero=True))
    return [drawn for drawn in charts if drawn]
