"""Checks of one field's value: functions from a value to what is wrong with it, or to an empty string."""

import difflib
import re
from collections.abc import Callable
from typing import Any

Check = Callable[[Any], str]

LARGEST = 1e9  # of most numbers in a config, so that nothing that is computed from them overflows
# Stricter than timm, which skips sections that it does not know.
RANDAUGMENT = re.compile(r"rand(-(m|n|mmax|inc)\d{1,3}|-(p|mstd)\d{1,3}(\.\d+)?|-t(weights|3a|3aw))*")
WEIGHTED = {"weights": 15, "3aw": 14}  # timm's operations that are drawn by weight, each once


def anything(value: Any) -> str:
    """Accepts every value of the field's type."""
    return ""


def between(low: float, high: float, limit: str = "at most") -> Check:
    """A number from `low` to `high`, or "below" `high`."""

    def check(value: float) -> str:
        if low <= value < high or (value == high and limit == "at most"):
            return ""
        upper = "" if value < low and high >= LARGEST else f" and {limit} {high:g}"
        return f"{value} is out of range: give at least {low:g}{upper}"

    return check


def at_least(low: float) -> Check:
    return between(low, LARGEST)


def below(high: float) -> Check:
    return between(0, high, "below")


def one_of(*choices: str) -> Check:
    def check(value: str) -> str:
        if value in choices:
            return ""
        near = difflib.get_close_matches(value, choices, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(choices)}"
        return f"{value!r} is not known: {hint}"

    return check


def listed_of(*choices: str, endings: tuple[str, ...]) -> Check:
    """Different words of these, or file names with one of the endings, by comma; or nothing."""

    def check(value: str) -> str:
        words = value.split(",") if value else []
        faults = [one_of(*choices)(word) for word in words if not word.endswith(endings)]
        faults += [f"{value!r} names one twice: leave it out"] if len(set(words)) < len(words) else []
        return next(filter(None, faults), "")

    return check


def counts(value: str) -> str:
    """Different whole numbers from 1 to 4096, by comma."""
    words = value.split(",")
    whole = all(re.fullmatch(r"[1-9][0-9]{0,3}", word) and int(word) <= 4096 for word in words)
    if whole and len(set(words)) == len(words):
        return ""
    return f"{value!r} is no list of different whole numbers up to 4096: write like 1,16"


def model(value: str) -> str:
    from pcpvt.models.pcpvt import SPECS

    return one_of(*SPECS)(value)


def precision(value: str) -> str:
    from pcpvt.functional.precision import parse

    try:
        parse("float32" if value == "auto" else value)
    except ValueError as error:
        return str(error)
    return ""


def regex(value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        return f"{value!r} is no regular expression ({error}): correct it"
    return ""


def interval(value: tuple) -> str:
    """(low, high) of positive numbers."""
    numbers = len(value) == 2 and all(isinstance(n, int | float) for n in value)
    if numbers and 1 / LARGEST <= value[0] <= value[1] <= LARGEST:
        return ""
    return f"{value} is no range: give (low, high) with {1 / LARGEST:g} <= low <= high <= {LARGEST:g}"


def value_range(value: tuple) -> str:
    """(low, high) of values."""
    numbers = len(value) == 2 and all(isinstance(n, int | float) for n in value)
    if numbers and -1e38 <= value[0] < value[1] <= 1e38:
        return ""
    return f"{value} is no range: give low,high with low < high, such as 0,4095"


def area(value: tuple) -> str:
    """(low, high) as shares of an image's area."""
    return interval(value) or (f"{value} exceeds the image: give (low, high) up to 1" if value[1] > 1 else "")


def randaugment(value: str) -> str:
    if re.fullmatch(r"3a(-mstd\d+(\.\d+)?)?", value):
        return ""
    if value and not RANDAUGMENT.fullmatch(value):
        return f"{value!r} is not timm's notation: try rand-m9-mstd0.5-inc1, or 3a"
    layers, sets = re.findall(r"-n(\d+)", value), re.findall(r"-t(\w+)", value)
    most = WEIGHTED.get(sets[0], LARGEST) if sets else LARGEST
    if layers and int(layers[-1]) > most:
        return f"{value!r} draws {layers[-1]} of {most} operations without replacement: give at most n{most}"
    return ""


def parse_duration(text: str) -> tuple[float, str] | None:
    """`500 steps` as (500.0, "steps"), `0` as (0.0, "steps"), other text as None."""
    if text.strip() == "0":
        return 0.0, "steps"
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(epoch|step|example)s?", text.strip())
    return (float(match[1]), match[2] + "s") if match and 0 < float(match[1]) <= LARGEST else None


def duration(value: str) -> str:
    return "" if parse_duration(value) else f"{value!r} is no duration: write like '1 epoch', '500 steps' or '0'"
