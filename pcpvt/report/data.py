"""The files of a workdir, read for the report: either the config or the metrics must exist, the rest is optional."""

import contextlib
import math
import os
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from pcpvt.config import stored
from pcpvt.errors import UserError
from pcpvt.functional.metrics import score
from pcpvt.runtime import environment, records

POINTS = 300  # of a curve: more cannot be seen at this size, and ImageNet's 100 epochs write 6,000 records
MATRIX = 40  # classes up to which the whole matrix is drawn; above it the most frequent confusions are listed
NUMBERS = 16  # classes up to which its cells have numbers
LISTED = 25  # rows of a list


class RunData(NamedTuple):
    """One workdir: `config` is flat (`{"model.name": ...}`), the others are as in their files, empty where missing."""

    name: str
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    result: dict[str, Any]
    environment: dict[str, Any]
    details: dict[str, Any]
    ranks: dict[str, Any] = {}  # noqa: RUF012 - constant

    def device(self) -> str:
        """The device, with the number of processes when there are several; empty when it is not known."""
        name = self.environment.get("device") or self.result.get("device") or ""
        count = self.environment.get("processes") or self.result.get("processes") or 1
        return f"{count} x {name}" if name and count != 1 else str(name)

    def best(self) -> dict[str, Any]:
        """The best evaluation so far, by the rule that chooses checkpoints."""
        evaluations = [
            entry for entry in self.metrics
            if entry.get("kind") == "eval" and any(is_number(entry.get(name)) for name in ("acc1", "map"))
        ]  # fmt: skip
        by = self.config.get("best", "acc1")
        return max(evaluations, key=lambda entry: (score(entry, by), entry["step"]), default={})

    def times(self) -> dict[str, list[tuple[float, float]]]:
        """By rank, the share of its time that a process spends computing, reading and waiting for others."""
        shares: dict[str, list[tuple[float, float]]] = {"computing": [], "reading": [], "waiting for others": []}
        with contextlib.suppress(LookupError, TypeError, ValueError, ZeroDivisionError):  # damaged
            for each in self.ranks.get("ranks", []):
                parts = [float(each[name]) for name in ("computing", "reading", "waiting")]
                for points, part in zip(shares.values(), parts, strict=True):
                    points.append((float(each["rank"]), part / sum(parts)))
        return shares

    def restarts(self) -> list[tuple[float, int, str]]:
        """(epoch, step, reason) of each time that the processes were started again after a failure."""
        entries = [entry for entry in self.metrics if entry.get("kind") == "restart" and is_number(entry.get("epoch"))]
        return [(float(entry["epoch"]), entry["step"], str(entry.get("reason", ""))) for entry in entries]

    def curve(self, kind: str, name: str) -> list[tuple[float, float]]:
        """(epoch, value) of one number of the records of a kind, at most `POINTS` of them: means of equal parts."""
        entries = ([entry.get("epoch"), entry.get(name)] for entry in self.metrics if entry.get("kind") == kind)
        points = [(float(x), float(y)) for x, y in entries if is_number(x) and is_number(y)]
        size = max(math.ceil(len(points) / POINTS), 1)
        parts = [points[i : i + size] for i in range(0, len(points), size)]
        return [(part[-1][0], sum(value for _, value in part) / len(part)) for part in parts]


def load(workdir: Path, name: str, field: str = "--workdir") -> RunData:
    """Reads one workdir, which the report calls `name`; UserError when it holds no run, with the `field` it is from."""
    metrics = records.read_metrics(workdir / "metrics.jsonl")
    config = read_object(workdir / "config.json")
    if not metrics and not config:
        raise UserError(f"{field}: {workdir} holds no run (neither config.json nor metrics.jsonl): name another folder")
    result = read_object(workdir / "result.json")
    # It may be the result of an evaluation, or of a training that was extended since.
    if result.get("mode") != "train" or (metrics and result.get("steps") != metrics[-1]["step"]):
        result = {}
    files = (read_object(workdir / file) for file in (environment.FILE, records.DETAILS, records.RANKS))
    return RunData(name, stored.flat(config), metrics, result, *files)


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one for a file that is missing or damaged."""
    try:
        return stored.read_config(path)
    except UserError:
        return {}


def is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def summarize_classes(details: dict[str, Any]) -> dict[str, Any]:
    """What `classes.html` shows of `details.json` (see `evaluate.mistakes`); empty if that is missing or damaged."""
    try:
        names, images, step = details["classes"], details["images"], details.get("step")
        predicted = details.get("predicted") or [0] * len(names)  # earlier versions did not count it
        if not names or not all(isinstance(name, str) for name in names):
            return {}
        rights = enumerate(zip(details["right"], images, strict=True))
        accuracies = sorted((right / count, i, right, count) for i, (right, count) in rights if count)
        shown = accuracies if len(accuracies) <= MATRIX else accuracies[:LISTED]
        checkpoint = "" if step is None else f", the checkpoint of step {step}"
        split = details.get("split", "validation")
        confusions = [(names[i], names[j], n, _percent(n / max(images[i], 1))) for i, j, n in details["confusions"]]
        mistakes = [
            {"name": mistake["name"], "picture": mistake["picture"], "file": os.path.basename(mistake["name"])}
            | {name: names[mistake[name]] for name in ("label", "predicted")}
            | {name: _percent(mistake[name]) for name in ("confidence", "own")}
            for mistake in details["mistakes"]
        ]
        return {
            "about": f"{sum(images):,} {split} images, {len(names)} classes{checkpoint}",
            "numbers": len(names) <= NUMBERS,
            # A matrix with numbers and a list of as many classes have equal heights.
            "beside": len(names) <= NUMBERS or len(names) > MATRIX,
            "matrix": _matrix(details) if len(names) <= MATRIX else [],
            "pairs": confusions[:LISTED],
            "order": "Lowest first" if shown is accuracies else f"The {LISTED} lowest of {len(accuracies)}",
            "accuracies": [
                (names[i], _percent(share), right, count, _percent(right / predicted[i]) if predicted[i] else "–")
                for share, i, right, count in shown
            ],
            "mistakes": mistakes,
        }
    except (LookupError, TypeError, ValueError, AttributeError):  # valid JSON of another form
        return {}


def _matrix(details: dict[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """(label, cells) of every class; a cell without images is empty."""
    names, images = details["classes"], details["images"]
    counts = {(i, j): count for i, j, count in details["confusions"]}
    counts |= {(i, i): count for i, count in enumerate(details["right"])}

    def cell(i: int, j: int) -> dict[str, Any]:
        count = counts.get((i, j), 0)
        if not count:
            return {}
        share = count / max(images[i], 1)
        # A mistake is seldom more than a tenth of its class: its colour is stretched, or none would be seen.
        depth = share if i == j else min(1.0, share * 4)
        style = ("diagonal " if i == j else "") + ("deep" if depth > 0.6 else "")
        pair = names[i] if i == j else f"{names[i]} taken for {names[j]}"
        return {"count": count, "title": f"{pair}: {count} of {images[i]}", "style": style, "depth": f"{depth:.2f}"}

    return [(name, [cell(i, j) for j in range(len(names))]) for i, name in enumerate(names)]


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"
