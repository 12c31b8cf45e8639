"""The HTML pages: their data, and rendering with the templates into one file that loads nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pcpvt.report import classes
from pcpvt.report.charts import PLOT, Chart, Series, chart, short
from pcpvt.report.data import RunData, defaults
from pcpvt.runtime.console import duration

COLORS = 6  # of the palette in report.css; with more runs they repeat


def render_report(runs: Sequence[RunData]) -> str:
    """The report of the first run, in which the others are compared with it."""
    main, usual = runs[0], defaults()
    figures = [_figures(run) for run in runs]
    values = {name: [run.config.get(name) for run in runs] for name in sorted({n for run in runs for n in run.config})}
    differences = {name: row for name, row in values.items() if any(value != row[0] for value in row)}
    changed = {name: value for name, value in main.config.items() if name not in usual or usual[name] != value}
    return _render(
        "report.html",
        title=f"{main.config.get('model.name', 'pcpvt')}: {main.name}" + f" and {len(runs) - 1} more" * (len(runs) > 1),
        subtitle=_subtitle(main),
        runs=[
            {"name": run.name, "color": i % COLORS, "figures": figures[i], "device": _device(run)}
            for i, run in enumerate(runs)
        ],
        figures=list(dict.fromkeys(name for one in figures for name in one)),
        charts=_charts(runs),
        classes=classes.summarize(main.details),
        differences=differences,
        equal=len(values) - len(differences),
        changed=changed,
        unchanged={name: value for name, value in main.config.items() if name not in changed},
        surroundings=_surroundings(main),
    )


def render_charts(title: str, charts: Sequence[Chart | None], table: str = "") -> str:
    """A page of charts, and below them a table as text."""
    return _render("page.html", title=title, charts=list(filter(None, charts)), table=table)


def _render(template: str, **values: Any) -> str:
    import jinja2  # only a process that writes a page pays for it

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pcpvt.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["shown"] = _shown
    return environment.get_template(template).render(values, plot=PLOT)


def _subtitle(run: RunData) -> str:
    config, started = run.config, run.environment.get("started")
    parts = [
        " ".join(str(config[name]) for name in ("data.name", "data.path") if config.get(name)),
        f"{config['image_size']} px, batch {config['batch_size']}"
        if config.keys() >= {"image_size", "batch_size"}
        else "",
        _device(run),
        f"started {started[:16].replace('T', ' ')} UTC" if started else "",
        "" if run.result else "not finished",
    ]
    return " · ".join(filter(None, parts))


def _device(run: RunData) -> str:
    name = run.environment.get("device") or run.result.get("device") or ""
    count = run.environment.get("processes") or run.result.get("processes") or 1
    return f"{count} x {name}" if name and count != 1 else str(name)


def _figures(run: RunData) -> dict[str, str]:
    """The headline figures; those that are not known are left out."""
    best, result, last = run.best(), run.result, run.metrics[-1] if run.metrics else {}
    speeds = sorted(y for _, y in run.curve("train", "images_per_sec"))
    speed = result.get("images_per_sec") or (speeds[len(speeds) // 2] if speeds else None)
    figures = {
        "top-1 accuracy": f"{best['acc1']:.2f} %" if best else "",
        "top-5 accuracy": f"{best['acc5']:.2f} %" if best.get("acc5") is not None else "",
        "validation loss": short(best["loss"]) if best.get("loss") is not None else "",
        "images/s": short(speed) if speed else "",
        "epochs": short(round(float(last["epoch"]), 2)) if last.get("epoch") else "",
        "duration": duration(result["seconds"]) if result.get("seconds") else "",
        "parameters": f"{result['n_parameters'] / 1e6:.3g} M" if result.get("n_parameters") else "",
    }
    return {name: text for name, text in figures.items() if text}


def _charts(runs: Sequence[RunData]) -> list[Chart]:
    """The curves of one run have a colour each; with several runs the colour is the run's."""
    several = len(runs) > 1

    def curves(*wanted: tuple[str, str, str]) -> list[Series]:
        """The curve of each (kind of record, its number, label), of every run; training is drawn behind evaluation."""
        return [
            Series(
                (run.name if len(wanted) == 1 else f"{run.name} {label}") if several else label,
                run.curve(kind, number),
                (i if several else j) % COLORS,
                faint=kind == "train" and len(wanted) > 1,
            )
            for i, run in enumerate(runs)
            for j, (kind, number, label) in enumerate(wanted)
        ]

    speeds = [y for run in runs for _, y in run.curve("train", "images_per_sec")]
    apart = bool(speeds) and 0 < 20 * min(speeds) < max(speeds)
    accuracies = [("eval", "acc1", "top-1"), ("eval", "acc5", "top-5")][: 1 if several else 2]
    charts = [
        chart("Loss", curves(("eval", "loss", "validation"), ("train", "loss", "training")), log=None),
        chart("Top-1 accuracy in %" if several else "Accuracy in %", curves(*accuracies)),
        chart("Learning rate", curves(("train", "lr", "")), zero=True),
        chart("Images/s", curves(("train", "images_per_sec", "")), zero=True, log=apart),
        chart("Gradient norm, before clipping", curves(("train", "grad_norm", "")), zero=True, log=None),
        chart("Share of time waiting for data", curves(("train", "waiting", "")), zero=True),
    ]
    return [drawn for drawn in charts if drawn]


def _surroundings(run: RunData) -> dict[str, Any]:
    other = {n: v for n, v in run.environment.items() if n not in ("versions", "device", "processes")}
    versions = {f"{n} version": v for n, v in (run.environment.get("versions") or {}).items()}
    return {n: v for n, v in {"device": _device(run), **other, **versions}.items() if v}


def _shown(value: Any) -> str:
    """The value of a config field as text."""
    if value is None:
        return "not set"
    if isinstance(value, float):
        return short(value)
    return '""' if value == "" else str(value)
