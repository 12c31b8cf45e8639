"""Hugging Face sets, `hfds/NAME`: a name on the Hub or a local folder, read by the package `datasets`.

Labels come from their column alone, without reading an image. The set is memory-mapped: a loader process gets the open
set and does not open it again.
"""

import contextlib
from typing import Any, NamedTuple

import numpy as np

from pcpvt.errors import UserError, one_line, suppress_logging
from pcpvt.readers.listing import checked_labels, name_label_sets, name_labels
from pcpvt.readers.manifest import Columns
from pcpvt.readers.splits import Splits, choose, missing_split

IMAGES, LABELS = ("image", "img"), ("label", "labels", "class")
LISTS = ("List", "Sequence", "LargeList", "list")  # types of a column of several labels


class HubSet:
    """One split of a set, as a dataset: an image is the bytes of its file, or its path.

    Args:
        name: with the prefix `hfds/`.
        cache: folder for downloads; empty: the package's own.
        split: "train" or "val"; see `Splits`. A literal name may be a part, such as `train[80%:]`.

    Raises:
        UserError: when the set cannot be opened, or has no such split or columns, with those that it has.
    """

    in_memory = False

    def __init__(self, name: str, cache: str, split: str, splits: Splits, columns: Columns):
        self.dataset_name = name
        rows, self.split, self.ranges = _open(name, cache or None, split, splits)
        if not len(rows):
            raise UserError(f"config.data.name: {name!r}: its {self.split} split holds no images: name another split")
        image, label = (_column(name, rows.features, *wanted) for wanted in (
            ("image_column", columns.image, IMAGES, ("Image",)),
            ("label_column", columns.label, LABELS, LISTS if columns.several else ("ClassLabel",)),
        ))  # fmt: skip
        values = rows.select_columns([label])[:][label]
        feature = rows.features[label]
        if columns.several:
            feature = feature[0] if isinstance(feature, list) else getattr(feature, "feature", feature)
        names = getattr(feature, "names", None)
        remedy = f"leave such samples out, or choose another split or config.data.label_column (it is {label!r})"
        if not columns.several and any(isinstance(value, list) for value in values):
            remedy = f"set config.task=multilabel for lists of labels, or {remedy}"
        self.labels: np.ndarray
        self.sets: list[tuple[int, ...]] | None = None
        if columns.several:
            self.classes, self.labels, self.sets = name_label_sets(values, self.name, remedy, names)
        elif names:
            self.classes = list(names)
            self.labels = checked_labels(values, len(names), self.name, remedy)
        else:
            self.classes, self.labels = name_labels(values, self.name, remedy)
        self.column = image
        try:
            import datasets

            self.rows = rows.select_columns([image]).cast_column(image, datasets.Image(decode=False))
        except Exception as error:  # of pyarrow
            raise UserError(
                f"config.data.image_column: {image!r} of {name!r} holds no images ({one_line(error)}): its columns are "
                f"{_described(rows.features)}: name another"
            ) from None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = self.rows[index][self.column] or {}
        # A sample without an image is reported as unreadable.
        return image.get("bytes") or image.get("path") or b"", int(self.labels[index])

    def name(self, index: int) -> str:
        return f"{self.dataset_name}/{self.split}[{index}]"

    def key(self, index: int) -> str:
        return str(index)

    def shared(self, other: "HubSet") -> int:
        """Samples that both splits hold."""
        pairs = [(a, b) for a in self.ranges for b in other.ranges if a[0] == b[0]]
        return sum(max(0, min(a[2], b[2]) - max(a[1], b[1])) for a, b in pairs)


class _Opened(NamedTuple):
    rows: Any  # `datasets.Dataset`
    split: str
    ranges: list[tuple[str, int, int]]  # (split, begin, end) of each part


def _open(name: str, cache: str | None, split: str, splits: Splits) -> _Opened:
    """The rows of a split, which may be a part of one or several together."""
    path, _, config = name.partition("/")[2].partition(":")
    names: list[str] = []
    try:
        import datasets

        with contextlib.redirect_stdout(None), suppress_logging():
            datasets.disable_progress_bars()
            found = datasets.load_dataset(path, config or None, cache_dir=cache)
            names = list(found)
            given = splits.given(split)
            wanted = "+".join(names) if given == "." else given or choose(names, split, splits)
            if wanted and {part.partition("[")[0].strip() for part in wanted.split("+")} <= set(names):
                sizes = {each: len(found[each]) for each in names}
                parts = datasets.ReadInstruction.from_spec(wanted).to_absolute(sizes)
                ranges = [(part.splitname, part.from_, part.to) for part in parts]
                rows = [found[each].select(range(begin, end)) for each, begin, end in ranges]
                return _Opened(datasets.concatenate_datasets(rows), wanted, ranges)
    except ModuleNotFoundError as error:
        raise UserError(f"config.data.name: {name!r}: needs {error.name}: pip install {error.name}") from None
    except (Exception, SystemExit) as error:  # of the package, of what it downloads, or of the network
        of = f" of its splits {', '.join(names)}" if names else ""
        raise UserError(
            f"config.data.name: {name!r}: cannot be opened ({one_line(error) or type(error).__name__}){of}: check the "
            f"name (hfds/NAME or hfds/NAME:CONFIGURATION), config.data.{split}_split and the connection"
        ) from None
    raise missing_split(repr(name), names, split, splits)


def _column(name: str, features: Any, field: str, given: str, usual: tuple[str, ...], kinds: tuple[str, ...]) -> str:
    """The column that a field names, or else one of the usual name, or the only one of some types."""
    if given in features or not given:
        if found := [given] if given else [column for column in usual if column in features]:
            return found[0]
        of_kind = [column for column, feature in features.items() if type(feature).__name__ in kinds]
        if len(of_kind) == 1:
            return of_kind[0]
    what = f"{given!r}: no such column in" if given else "which column it is cannot be told in"
    raise UserError(f"config.data.{field}: {what} {name!r}: its columns are {_described(features)}: name one of them")


def _described(features: Any) -> str:
    def kind(feature: Any) -> str:
        return str(getattr(feature, "dtype", "")) if type(feature).__name__ == "Value" else type(feature).__name__

    return ", ".join(f"{one_line(column)} ({kind(feature)})" for column, feature in features.items())
