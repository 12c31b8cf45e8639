"""CSV manifests: a row per image with the columns `path`, `label` and, if it has splits, `split`.

With `config.task=multilabel` a label cell holds all labels of the image, separated by semicolons; empty: none.

Paths are relative to the manifest. Columns are separated by a comma, a semicolon or a tab: what the first line has.
Class names are the labels of all rows, sorted by bytes, so that every split has the same classes.
"""

import collections
import csv
import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pcpvt.errors import UserError, one_line
from pcpvt.readers.listing import Listing, name_label_sets, name_labels
from pcpvt.readers.splits import Splits, choose, missing_split

PATHS = ("path", "file", "filename", "image")  # names of the columns, the first one that there is
LABELS = ("label", "class", "labels")
SEPARATOR = ";"  # between the labels of an image


class Columns(NamedTuple):
    """Names of the columns for images and labels (`config.data.image_column`, `.label_column`); empty: found."""

    image: str = ""
    label: str = ""
    several: bool = False  # labels per image (`config.task`)


class Row(NamedTuple):
    path: str
    label: str
    split: str  # empty if the manifest has none


def read(file: str, split: str, splits: Splits, columns: Columns) -> tuple[Listing, str]:
    """The images of a split, in order of the rows, and the split's name.

    Args:
        split: "train" or "val".

    Raises:
        UserError: for a file that is no manifest, a row without path or label, or a file with two labels.
    """
    rows = read_rows(file, columns)
    classes, labels, sets, hint = _labels(file, rows, columns.several)
    known: dict[str, int] = {}
    for row, label in zip(rows, labels, strict=True):
        if known.setdefault(row.path, label) != label:
            remedy = "write all its labels into one row" if columns.several else "keep one of the rows"
            raise UserError(f"config.data.path: {file}: {row.path} has two labels: {remedy}")
    names = sorted({row.split for row in rows})
    chosen = choose(names, split, splits) if names != [""] else "." if splits.whole(split) else ""
    if not chosen:
        raise missing_split(file, [name for name in names if name], split, splits)
    selected = [i for i, row in enumerate(rows) if chosen in (".", row.split)]
    paths = [rows[i].path for i in selected]
    listing = Listing(classes, paths, np.array(labels)[selected], collections.Counter(), set(), sets=sets, hint=hint)
    return listing, chosen


def _labels(
    file: str, rows: Sequence[Row], several: bool
) -> tuple[list[str], np.ndarray, list[tuple[int, ...]] | None, str]:
    """Class names, the label or the number of the set of labels of each row, the sets, and a hint to the user."""
    remedy, cells = f"correct {file}", [row.label for row in rows]
    if several:
        lists = [[label for part in cell.split(SEPARATOR) if (label := part.strip())] for cell in cells]
        return *name_label_sets(lists, lambda i: rows[i].path, remedy), ""
    hint, doubtful = "", [cell for cell in cells if SEPARATOR in cell]
    if doubtful:
        hint = (
            f"config.data.path: {file}: {len(doubtful)} labels such as {doubtful[0]!r} are taken for one class each: "
            "for several labels per image set config.task=multilabel"
        )
    return *name_labels(cells, lambda i: rows[i].path, remedy), None, hint


def read_rows(file: str, columns: Columns) -> list[Row]:
    """All rows, with absolute paths; UserError for a file that cannot be read, or a row that is not complete."""
    try:
        with open(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
            first = lines.readline()
            lines.seek(0)
            reader = csv.reader(lines, delimiter=max(",;\t", key=first.count))
            header = [name.strip() for name in next(reader, [])]
            path, label, split = _columns(file, header, columns)
            folder, rows = os.path.dirname(os.path.abspath(file)), []
            for values in reader:
                if not any(value.strip() for value in values):
                    continue
                cells = {i: values[i].strip() if i < len(values) else "" for i in (path, label, split) if i is not None}
                needed = (path, split) if columns.several else cells
                if missing := [header[i] for i, cell in cells.items() if not cell and i in needed]:
                    raise UserError(f"config.data.path: {file}:{reader.line_num}: {missing[0]} is empty: complete it")
                place = os.path.join(folder, os.path.expanduser(cells[path]))
                rows.append(Row(place, cells[label], "" if split is None else cells[split]))
    except (OSError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else one_line(error)
        raise UserError(f"config.data.path: {file}: cannot be read ({reason}): check it") from None
    if not rows:
        raise UserError(f"config.data.path: {file}: has no rows below its header: add some")
    return rows


def _columns(file: str, header: list[str], columns: Columns) -> tuple[int, int, int | None]:
    """Positions of path, label and split."""
    places = {name.lower(): i for i, name in reversed(list(enumerate(header)))}
    found = []
    fields = (("image_column", columns.image, PATHS), ("label_column", columns.label, LABELS))
    for field, given, usual in fields:
        name = next((name for name in ([given] if given else usual) if name.lower() in places), None)
        if name is None:
            wanted = repr(given) if given else " or ".join(usual)
            raise UserError(
                f"config.data.{field}: {file} has no column {wanted}: its columns are "
                f"{', '.join(map(one_line, header)) or 'none'}: name one of them"
            )
        found.append(places[name.lower()])
    return found[0], found[1], places.get("split")
