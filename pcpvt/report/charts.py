"""Curves as data for the charts' template: positions in the SVG, axes with round numbers, and labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

SIZE = (520, 230)  # of the SVG
LEFT, RIGHT, TOP, BOTTOM = EDGES = (56, 510, 10, 200)  # of the plot area in it


class Series(NamedTuple):
    """One curve: `color` is a number of the page's palette, `faint` draws it thinner behind the others."""

    name: str
    points: Sequence[tuple[float, float]]
    color: int = 0
    faint: bool = False


class Axis(NamedTuple):
    """Maps the values low..high to 0..1."""

    low: float
    high: float
    log: bool = False

    def __call__(self, value: float) -> float:
        if self.log:
            return math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def chart(
    title: str, series: Sequence[Series], *, x: str = "epoch", zero: bool = False, log: bool | None = False
) -> dict[str, Any]:
    """What `charts.html` draws; empty when no series has points.

    Args:
        x: what the horizontal axis, which starts at 0, counts.
        zero: the vertical axis starts at 0.
        log: logarithmic; None: when the largest value is over 20 times the median.

    Returns:
        `title`, `x`; `x_ticks` and `y_ticks`, each (position in the SVG, text); `curves`, the series as dicts whose
        points are (position of x, x as text, position of y, y as text).
    """
    series = [s for s in series if s.points]
    if not series:
        return {}
    xs, ys = zip(*(point for s in series for point in s.points), strict=True)
    low, high, first, last = min(ys), max(ys), min(0.0, *xs), max(xs)
    if log is None:
        log = high > 20 * sorted(ys)[len(ys) // 2]
    x_axis = Axis(first, last if last > first else 1.0)
    y_axis = scale(low, high, zero=zero, log=log and low > 0)

    def place_x(value: float) -> tuple[float, str]:
        return round(LEFT + x_axis(value) * (RIGHT - LEFT), 1), short(value)

    def place_y(value: float) -> tuple[float, str]:
        return round(BOTTOM - y_axis(value) * (BOTTOM - TOP), 1), short(value)

    return {
        "title": title,
        "x": x,
        "x_ticks": list(map(place_x, ticks(x_axis, 6))),
        "y_ticks": list(map(place_y, ticks(y_axis, 5))),
        "curves": [s._asdict() | {"points": [place_x(x) + place_y(y) for x, y in s.points]} for s in series],
    }


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


def ticks(axis: Axis, count: int) -> list[float]:
    """Round numbers inside an axis, about `count` of them: 1, 2 or 5 times a power of ten apart."""
    if axis.log:
        decades = range(math.floor(math.log10(axis.low)), math.ceil(math.log10(axis.high)) + 1)
        steps = (1,) if axis.high / axis.low > 100 else (1, 2, 5)
        values = [step * 10.0**decade for decade in decades for step in steps]
    else:
        rough = (axis.high - axis.low) / count
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
        first = math.ceil(axis.low / step - 1e-9)
        values = [i * step for i in range(first, first + 3 * count)]
    return [value for value in values if axis.low * (1 - 1e-12) <= value <= axis.high * (1 + 1e-12)]


def short(value: float) -> str:
    """A number in four significant digits, without an exponent where that is readable."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:,.0f}" if abs(value) >= 1e3 else f"{value:,.4g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"
