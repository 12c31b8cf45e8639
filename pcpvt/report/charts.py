"""Curves as data for the charts' template: positions in the SVG, axes with round numbers, and labels."""

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


class Mark(NamedTuple):
    """A vertical line at a value of the horizontal axis; `color` is a number of the page's palette, None: neutral."""

    x: float
    text: str
    color: int | None = None


class Axis(NamedTuple):
    """Maps the values low..high to the positions start..end in the SVG; the default is vertical."""

    low: float
    high: float
    log: bool = False
    start: float = BOTTOM
    end: float = TOP

    def place(self, value: float) -> tuple[float, str]:
        """The position of a value, and the value as text."""
        share = (value - self.low) / (self.high - self.low)
        if self.log:
            share = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        return round(self.start + share * (self.end - self.start), 1), short(value)


def chart(
    title: str, series: Sequence[Series], *, x: str = "epoch", zero: bool = False, log: bool | None = False,
    marks: Sequence[Mark] = (),
) -> dict[str, Any]:  # fmt: skip
    """What `charts.html` draws of the series that have points; empty when none has.

    The horizontal axis counts `x` and starts at 0, the vertical one does with `zero`. It is logarithmic with `log`, or
    for None when the largest value is over 20 times the median. Ticks are as `Axis.place` gives them; the points of
    `curves`, the series as dicts, are (position of x, x as text, position of y, y as text); of `marks`, those that are
    on the axis are kept, with x as its position.
    """
    series = [s for s in series if s.points]
    if not series:
        return {}
    xs, ys = zip(*(point for s in series for point in s.points), strict=True)
    low, high, first, last = min(ys), max(ys), min(0.0, *xs), max(xs)
    if log is None:
        log = high > 20 * sorted(ys)[len(ys) // 2]
    x_axis = Axis(first, last if last > first else 1.0, False, LEFT, RIGHT)
    y_axis = scale(low, high, zero=zero, log=log and low > 0)
    curves = [s._asdict() | {"points": [x_axis.place(x) + y_axis.place(y) for x, y in s.points]} for s in series]
    x_ticks, y_ticks = (list(map(axis.place, ticks(axis, count))) for axis, count in ((x_axis, 6), (y_axis, 5)))
    lines = [mark._replace(x=x_axis.place(mark.x)[0]) for mark in marks if x_axis.low <= mark.x <= x_axis.high]
    return {"title": title, "x": x, "x_ticks": x_ticks, "y_ticks": y_ticks, "curves": curves, "marks": lines}


def scale(low: float, high: float, *, zero: bool = False, log: bool = False) -> Axis:
    """A vertical axis that contains low..high and has some room."""
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
