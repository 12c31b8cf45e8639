"""Predictions as a table, as JSON lines, or as CSV: `FORMATS[name](out, classes, results)` writes results."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Sequence
from typing import TextIO

from torch import Tensor

Result = tuple[str, list[tuple[int, float]]]  # (path, the best classes as (index, probability))


def best(probabilities: Tensor, top: int) -> list[tuple[int, float]]:
    """The `top` most probable of `[classes]` as (index, probability); all of them when there are fewer."""
    values, indices = probabilities.float().sort(descending=True, stable=True)  # of equal ones, lower index first
    return list(zip(indices[:top].tolist(), values[:top].tolist(), strict=True))


def table(out: TextIO, classes: Sequence[str], results: Iterable[Result]) -> None:
    """The path on one line, and below it a line per class."""
    for path, predictions in results:
        out.write(f"{path}\n")
        out.writelines(f"  {100 * probability:7.3f} %  {classes[index]}\n" for index, probability in predictions)


def json_lines(out: TextIO, classes: Sequence[str], results: Iterable[Result]) -> None:
    """`{"image": path, "predictions": [{"class": name, "index": i, "probability": p}, ...]}` per line."""
    for path, predictions in results:
        named = [{"class": classes[i], "index": i, "probability": round(p, 6)} for i, p in predictions]
        out.write(json.dumps({"image": path, "predictions": named}) + "\n")


def comma_separated(out: TextIO, classes: Sequence[str], results: Iterable[Result]) -> None:
    """`image,rank,class,index,probability`: a header, and one line per class."""
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("image", "rank", "class", "index", "probability"))
    for path, predictions in results:
        for rank, (index, probability) in enumerate(predictions, 1):
            writer.writerow((path, rank, classes[index], index, f"{probability:.6f}"))


FORMATS: dict[str, Callable[[TextIO, Sequence[str], Iterable[Result]], None]] = {
    "table": table,
    "jsonl": json_lines,
    "csv": comma_separated,
}
