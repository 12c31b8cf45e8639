"""Runs to one HTML page that needs nothing else: no network, no library, no file beside it."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import Any

from pcpvt.report import classes as report_classes
from pcpvt.report.charts import Series, chart, short
from pcpvt.report.data import RunData, defaults
from pcpvt.report.style import CSS, JS
from pcpvt.runtime.console import duration

COLORS = 6  # of the palette; with more runs they repeat


def page(runs: Sequence[RunData]) -> str:
    """The report of the first run, beside which the others are compared."""
    main = runs[0]
    what = main.config.get("model.name", "pcpvt")
    title = f"{what}: {main.name}" if len(runs) == 1 else f"{what}: {main.name} and {len(runs) - 1} more"
    body = [
        f"<h1>{_text(title)}</h1>",
        f'<p class="soft">{_text(_subtitle(main))}</p>',
        _tiles(main) if len(runs) == 1 else _comparison(runs),
        _section("Curves, by epoch", _charts(runs), "grid"),
        report_classes.sections(main.details, main.name if len(runs) > 1 else ""),
        _section("Recipe", _recipe(main) if len(runs) == 1 else _differences(runs), "card"),
        _section("Surroundings", _surroundings(main), "card"),
    ]
    return document(title, "".join(body))


def document(title: str, body: str) -> str:
    """A self-contained page in the report's style around HTML that is already escaped."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{CSS}</style></head>"
        f"<body><main>{body}</main><script>{JS}</script></body></html>\n"
    )


def _section(title: str, content: str, style: str) -> str:
    return f'<section><h2>{title}</h2><div class="{style}">{content}</div></section>' if content else ""


def _subtitle(run: RunData) -> str:
    config, surroundings = run.config, run.environment
    parts = [
        " ".join(str(config[name]) for name in ("data.name", "data.path") if config.get(name)),
        f"{config['image_size']} px, batch {config['batch_size']}"
        if {"image_size", "batch_size"} <= config.keys()
        else "",
        _device(run),
        f"started {surroundings['started'][:16].replace('T', ' ')} UTC" if surroundings.get("started") else "",
        "" if run.result else "not finished",
    ]
    return " · ".join(part for part in parts if part)


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
        "top-1 accuracy": f"{best['acc1']:.2f} %" if best else None,
        "top-5 accuracy": f"{best['acc5']:.2f} %" if best.get("acc5") is not None else None,
        "validation loss": short(best["loss"]) if best.get("loss") is not None else None,
        "images/s": short(speed) if speed else None,
        "epochs": short(round(float(last["epoch"]), 2)) if last.get("epoch") else None,
        "duration": duration(result["seconds"]) if result.get("seconds") else None,
        "parameters": f"{result['n_parameters'] / 1e6:.3g} M" if result.get("n_parameters") else None,
    }
    return {name: value for name, value in figures.items() if value is not None}


def _tiles(run: RunData) -> str:
    tiles = "".join(
        f'<div class="card"><b>{_text(v)}</b><span>{_text(n)}</span></div>' for n, v in _figures(run).items()
    )
    return f'<div class="tiles">{tiles}</div>'


def _comparison(runs: Sequence[RunData]) -> str:
    figures = [_figures(run) for run in runs]
    names = list(dict.fromkeys(name for one in figures for name in one))
    rows = [
        [
            f'<i class="spot" style="background: var(--c{i % COLORS})"></i>{_text(run.name)}',
            *(_text(one.get(name, "–")) for name in names),
            _text(_device(run)),
        ]
        for i, (run, one) in enumerate(zip(runs, figures, strict=True))
    ]
    return f'<div class="card scroll figures" style="margin-top: 18px">{_table(["run", *names, "device"], rows)}</div>'


def _charts(runs: Sequence[RunData]) -> str:
    """The curves of one run have a colour each; with several runs the colour is the run's."""
    several = len(runs) > 1

    def series(*wanted: tuple[str, str, str]) -> list[Series]:
        found = []
        for i, run in enumerate(runs):
            for j, (kind, name, label) in enumerate(wanted):
                text = f"{run.name} {label}".strip() if several and len(wanted) > 1 else run.name if several else label
                faint = kind == "train" and any(k == "eval" for k, _, _ in wanted)
                found.append(Series(text, run.curve(kind, name), (i if several else j) % COLORS, faint))
        return found

    speeds = [y for run in runs for _, y in run.curve("train", "images_per_sec")]
    apart = bool(speeds) and 0 < 20 * min(speeds) < max(speeds)
    accuracy = [("eval", "acc1", "top-1")] if several else [("eval", "acc1", "top-1"), ("eval", "acc5", "top-5")]
    return "".join(
        (
            chart("Loss", series(("eval", "loss", "validation"), ("train", "loss", "training")), log=None),
            chart("Top-1 accuracy in %" if several else "Accuracy in %", series(*accuracy)),
            chart("Learning rate", series(("train", "lr", "")), zero=True),
            chart("Images/s", series(("train", "images_per_sec", "")), zero=True, log=apart),
            chart("Gradient norm, before clipping", series(("train", "grad_norm", "")), zero=True, log=None),
            chart("Share of time waiting for data", series(("train", "waiting", "")), zero=True),
        )
    )


def _recipe(run: RunData) -> str:
    """What differs from the defaults, and behind a click the rest."""
    usual = defaults()
    changed = {n: v for n, v in run.config.items() if n not in usual or usual[n] != v}
    rest = {n: v for n, v in run.config.items() if n not in changed}
    if not run.config:
        return ""
    return (
        f'<p class="soft">Fields that differ from the defaults (--help lists those):</p>{_list(changed.items())}'
        f"<details><summary>The other {len(rest)} fields, at their defaults</summary>{_list(rest.items())}</details>"
    )


def _differences(runs: Sequence[RunData]) -> str:
    names = sorted({name for run in runs for name in run.config})
    rows = []
    for name in names:
        values = [run.config.get(name) for run in runs]
        if any(value != values[0] for value in values):
            rows.append([f"<code>{_text(name)}</code>", *(_text(_value(value)) for value in values)])
    if not rows:
        return "<p>The configs are equal.</p>"
    equal = len(names) - len(rows)
    return f'<div class="scroll">{_table(["field", *(_text(run.name) for run in runs)], rows)}</div>' + (
        f'<p class="soft">{equal} fields are equal.</p>'
    )


def _surroundings(run: RunData) -> str:
    found = {n: v for n, v in run.environment.items() if n not in ("versions", "device", "processes")}
    versions = run.environment.get("versions") or {}
    items = {"device": _device(run), **found, **{f"{name} version": value for name, value in versions.items()}}
    return _list((name, value) for name, value in items.items() if value)


def _list(items: Iterable[tuple[str, Any]]) -> str:
    return "<dl>" + "".join(f"<div><dt>{_text(n)}</dt><dd>{_text(_value(v))}</dd></div>" for n, v in items) + "</dl>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML."""
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<table class="wide"><tr>{"".join(f"<th>{cell}</th>" for cell in head)}</tr>{body}</table>'


def _value(value: Any) -> str:
    if value is None:
        return "not set"
    if isinstance(value, float):
        return short(value)
    return '""' if value == "" else str(value)


def _text(value: Any) -> str:
    return html.escape(str(value))
