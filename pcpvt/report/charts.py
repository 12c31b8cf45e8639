"""Curves as inline SVG: axes with round numbers, colours from the page's CSS, and the points for its tooltip."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from typing import NamedTuple

WIDTH, HEIGHT = 520, 230
LEFT, RIGHT, TOP, BOTTOM = 56, 10, 10, 30  # of the plot area to the edges


class Series(NamedTuple):
    """One curve: `color` is a number of the page's palette, `faint` draws it thinner behind the others."""

    name: str
    points: Sequence[tuple[float, float]]
    color: int = 0
    faint: bool = False


class Axis(NamedTuple):
    """Values low..high to 0..1."""

    low: float
    high: float
    log: bool = False

    def __call__(self, value: float) -> float:
        if self.log:
            return math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def chart(
    title: str, series: Sequence[Series], *, x: str = "epoch", zero: bool = False, log: bool | None = False
) -> str:
    """A figure with its legend; nothing when no series has points.

    Args:
        x: what the horizontal axis, which starts at 0, counts.
        zero: the vertical axis starts at 0.
        log: logarithmic; None: when the largest value is over 20 times the median.
    """
    series = [s for s in series if s.points]
    if not series:
        return ""
    ys = sorted(y for s in series for _, y in s.points)
    if log is None:
        log = ys[0] > 0 and ys[-1] > 20 * ys[len(ys) // 2]
    y_axis = scale(ys[0], ys[-1], zero=zero, log=log and ys[0] > 0)
    xs = [point[0] for s in series for point in s.points]
    x_axis = Axis(min(0.0, *xs), max(xs) if max(xs) > min(0.0, *xs) else 1.0)
    body = [_grid(x_axis, y_axis)]
    for s in sorted(series, key=lambda s: not s.faint):
        style = f"stroke: var(--c{s.color})"
        if len(s.points) == 1:
            left, top = _place(x_axis, y_axis, *s.points[0])
            body.append(f'<circle class="dot" cx="{left}" cy="{top}" r="3.5" style="fill: var(--c{s.color})"/>')
            continue
        path = " ".join("{},{}".format(*_place(x_axis, y_axis, *point)) for point in s.points)
        body.append(f'<polyline class="line{" faint" if s.faint else ""}" style="{style}" points="{path}"/>')
    legend = "".join(
        f'<li{" class=faint" if s.faint else ""}><i style="background: var(--c{s.color})"></i>{html.escape(s.name)} '
        f"<b>{short(s.points[-1][1])}</b></li>"
        for s in series
    )
    hover = [
        {"n": s.name, "c": s.color, "p": [[*_place(x_axis, y_axis, *p), *map(short, p)] for p in s.points]}
        for s in series
    ]
    data = html.escape(json.dumps(hover, separators=(",", ":")))
    return (
        f'<figure class="chart" data-x="{html.escape(x)}" data-series="{data}">'
        f"<figcaption><h3>{html.escape(title)}</h3><ul>{legend}</ul></figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">{"".join(body)}'
        f'<line class="cross" y1="{TOP}" y2="{HEIGHT - BOTTOM}" visibility="hidden"/></svg></figure>'
    )


def scale(low: float, high: float, *, zero: bool = False, log: bool = False) -> Axis:
    """An axis that contains low..high and has some room."""
    if log:
        return Axis(low / 1.1, high * 1.1, True)
    if zero:
        low = min(low, 0.0)
    if low == high:
        low, high = (0.0, high * 1.1) if high > 0 else (low if zero else low - 1.0, high + 1.0)
    room = 0.06 * (high - low)
    return Axis(low if zero and low == 0 else low - room, high + room)


def ticks(axis: Axis, count: int = 5) -> list[float]:
    """Round numbers inside an axis, about `count` of them: 1, 2 or 5 times a power of ten apart."""
    if axis.log:
        decades = range(math.floor(math.log10(axis.low)), math.ceil(math.log10(axis.high)) + 1)
        wide = axis.high / axis.low > 100
        found = [m * 10.0**d for d in decades for m in ((1,) if wide else (1, 2, 5))]
    else:
        rough = (axis.high - axis.low) / count
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
        first = math.ceil(axis.low / step - 1e-9)
        found = [i * step for i in range(first, first + 3 * count) if i * step <= axis.high + 1e-9 * step]
    return [value for value in found if axis.low * (1 - 1e-12) <= value <= axis.high * (1 + 1e-12)]


def short(value: float) -> str:
    """A number in four significant digits, without an exponent where that is readable."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        digits = max(0, 3 - (math.floor(math.log10(abs(value))) if value else 3))
        text = f"{value:,.{digits}f}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def _place(x_axis: Axis, y_axis: Axis, x: float, y: float) -> tuple[float, float]:
    return (
        round(LEFT + x_axis(x) * (WIDTH - LEFT - RIGHT), 1),
        round(HEIGHT - BOTTOM - y_axis(y) * (HEIGHT - TOP - BOTTOM), 1),
    )


def _grid(x_axis: Axis, y_axis: Axis) -> str:
    parts = []
    for value in ticks(y_axis):
        _, y = _place(x_axis, y_axis, x_axis.low, value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{short(value)}</text>')
    for value in ticks(x_axis, 6):
        x, _ = _place(x_axis, y_axis, value, y_axis.low)
        parts.append(f'<text x="{x}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{short(value)}</text>')
    base = HEIGHT - BOTTOM
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>')
    return "".join(parts)
