"""Predictions as a table, as JSON lines, or as CSV: `FORMATS[name](out, classes, top)` gives a writer of rows."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from typing import TextIO

from torch import Tensor

Row = Callable[[str, Tensor], None]  # (path, probabilities [classes])


def best(probabilities: Tensor, top: int) -> list[tuple[int, float]]:
    """The `top` most probable classes as (index, probability); all of them when there are fewer."""
    values, indices = probabilities.float().sort(descending=True, stable=True)  # of equal ones, lower index first
    return list(zip(indices[:top].tolist(), values[:top].tolist(), strict=True))


def table(out: TextIO, classes: Sequence[str], top: int) -> Row:
    """The path on one line, and below it a line per class."""

    def write_row(path: str, probabilities: Tensor) -> None:
        out.write(f"{path}\n")
        for index, probability in best(probabilities, top):
            out.write(f"  {100 * probability:7.3f} %  {classes[index]}\n")

    return write_row


def json_lines(out: TextIO, classes: Sequence[str], top: int) -> Row:
    """`{"image": path, "predictions": [{"class": name, "index": i, "probability": p}, ...]}` per line."""

    def write_row(path: str, probabilities: Tensor) -> None:
        predictions = [
            {"class": classes[index], "index": index, "probability": round(probability, 6)}
            for index, probability in best(probabilities, top)
        ]
        out.write(json.dumps({"image": path, "predictions": predictions}) + "\n")

    return write_row


def comma_separated(out: TextIO, classes: Sequence[str], top: int) -> Row:
    """`image,rank,class,index,probability`: a header, and one line per class."""
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("image", "rank", "class", "index", "probability"))

    def write_row(path: str, probabilities: Tensor) -> None:
        for rank, (index, probability) in enumerate(best(probabilities, top), 1):
            writer.writerow((path, rank, classes[index], index, f"{probability:.6f}"))

    return write_row


FORMATS: dict[str, Callable[[TextIO, Sequence[str], int], Row]] = {
    "table": table,
    "jsonl": json_lines,
    "csv": comma_separated,
}
