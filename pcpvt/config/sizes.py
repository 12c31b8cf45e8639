"""`config.size_schedule`: its notation, its checks, and the steps at which its sizes begin."""

import math
import re
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

from ml_collections import ConfigDict

from pcpvt.config.checks import parse_duration
from pcpvt.errors import UserError
from pcpvt.functional.sizes import Size, SizeSchedule, constant

RUN = "run"  # the unit of starts that are fractions of the run
NOTATION = (
    "write SIZE@START by comma, like 128@0,160@0.3,224@0.6; a START is a fraction of the run, or like '30 epochs' or "
    "'5000 steps', and a SIZE that is not square is HEIGHTxWIDTH"
)


class Entry(NamedTuple):
    """One size and its start."""

    text: str
    size: Size
    amount: float
    unit: str  # RUN, epochs, steps or examples


def parse(text: str) -> list[Entry]:
    """The entries of a schedule, none for an empty text; ValueError for one that has no such notation."""
    return [_entry(part.strip()) for part in text.split(",")] if text.strip() else []


def _entry(text: str) -> Entry:
    match = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?\s*@\s*(.+)", text)
    if match is None:
        raise ValueError(text)
    size = int(match[1]), int(match[2] or match[1])
    if re.fullmatch(r"\d*\.?\d+", match[3]):
        return Entry(text, size, float(match[3]), RUN)
    start = parse_duration(match[3])
    if start is None:
        raise ValueError(text)
    return Entry(text, size, *start)


def check(text: str) -> str:
    """What is wrong with a schedule by itself; empty if nothing is."""
    try:
        entries = parse(text)
    except ValueError as error:
        return f"{str(error)!r} is no size with a start: {NOTATION}"
    if not entries:
        return ""
    if entries[0].amount:
        return f"{entries[0].text!r} comes first and does not start at 0: let it, or put a size that does before it"
    for entry in entries:
        if entry.unit == RUN and entry.amount >= 1:
            return f"{entry.text!r} starts at the end of the run or later: give a fraction below 1, or a unit"
        if min(entry.size) < 1:
            return f"{entry.text!r} has no pixels: give a size of at least 1"
    for before, after in pairwise(entries):
        if before.unit == after.unit and before.amount >= after.amount:
            return _unsorted(before, after)
        if before.size == after.size or any(a > b for a, b in zip(before.size, after.size, strict=True)):
            return f"{after.text!r} is not larger than {before.text!r} before it: let the sizes grow"
    return ""


def _unsorted(before: Entry, after: Entry) -> str:
    return f"{after.text!r} does not start after {before.text!r} before it: sort them by their starts"


def check_sizes(config: ConfigDict, size: Size, stride: int) -> None:
    """Raises UserError unless the last size is that of evaluation, and the model takes all of them."""
    entries = parse(config.size_schedule)
    if config.augment.by_size and not entries:
        raise UserError(
            "config.augment.by_size: True but config.size_schedule is empty: set it, or leave augment.by_size out"
        )
    for entry in entries:
        if config.model.pad == "error" and any(side % stride for side in entry.size):
            raise UserError(
                f"config.size_schedule: {entry.text!r} is not divisible by {stride}: use sizes that are or "
                "config.model.pad=pad"
            )
    if entries and entries[-1].size != size:
        height, width = size
        said = f"config.image_size={height}" + (f" and config.image_width={width}" if width != height else "")
        raise UserError(
            f"config.size_schedule: {entries[-1].text!r} comes last and {said}, the size of evaluation: make them equal"
        )


def make(
    text: str, size: Size, steps: int, in_steps: Callable[[float, str], int], operations: Callable[[Size], float]
) -> SizeSchedule:
    """The sizes of a run.

    Args:
        text: of the field, checked.
        size: of all steps where there is no schedule.
        steps: of the run.
        in_steps: an amount and its unit in steps.
        operations: of an image of a size; only ratios count.

    Raises:
        UserError: for a size that would start after the run, or not after the one before it.
    """
    entries = parse(text)
    if not entries:
        return constant(size)
    starts = []
    for entry in entries:
        whole = math.ceil(round(entry.amount * steps, 6)) if entry.unit == RUN else in_steps(entry.amount, entry.unit)
        starts.append(whole)
        if whole >= steps:
            raise UserError(
                f"config.size_schedule: {entry.text!r} starts after {whole} steps and the run has {steps}: "
                "let it start earlier, train longer, or leave it out"
            )
    for i, (before, after) in enumerate(pairwise(starts)):
        if before >= after:
            raise UserError(
                f"config.size_schedule: {_unsorted(entries[i], entries[i + 1])}; here {before} and {after} steps of "
                f"{steps}"
            )
    counts = [operations(entry.size) for entry in entries]
    return SizeSchedule(
        tuple(starts), tuple(entry.size for entry in entries), tuple(count / counts[-1] for count in counts)
    )
