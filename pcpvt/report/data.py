"""The files of a workdir, read for the report: either the config or the metrics must exist, the rest is optional."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from pcpvt.config import fields, stored
from pcpvt.errors import UserError
from pcpvt.runtime import environment, records

POINTS = 300  # of a curve: more cannot be seen at this size, and ImageNet's 100 epochs write 6,000 records


class RunData(NamedTuple):
    """One workdir."""

    name: str
    config: dict[str, Any]  # flat
    metrics: list[dict[str, Any]]
    result: dict[str, Any]
    environment: dict[str, Any]
    details: dict[str, Any]

    def best(self) -> dict[str, Any]:
        """The best evaluation so far, by the rule that chooses checkpoints: higher top-1, then later."""
        evaluations = [entry for entry in self.metrics if entry.get("kind") == "eval" and _number(entry.get("acc1"))]
        return max(evaluations, key=lambda entry: (entry["acc1"], entry["step"]), default={})

    def curve(self, kind: str, name: str) -> list[tuple[float, float]]:
        """(epoch, value) of one number of the records of a kind, at most `POINTS` of them: means of equal parts."""
        points = [
            (float(entry["epoch"]), float(entry[name]))
            for entry in self.metrics
            if entry.get("kind") == kind and _number(entry.get("epoch")) and _number(entry.get(name))
        ]
        size = math.ceil(len(points) / POINTS)
        return [_mean(points[i : i + size]) for i in range(0, len(points), max(size, 1))]


def load(workdir: Path, name: str, field: str = "--workdir") -> RunData:
    """Reads one workdir, which the report calls `name`.

    Raises:
        UserError: when it holds no run; `field` is what named it.
    """
    metrics = records.read_metrics(workdir / "metrics.jsonl")
    config = _object(workdir / "config.json")
    if not metrics and not config:
        raise UserError(f"{field}: {workdir} holds no run (neither config.json nor metrics.jsonl): name another folder")
    result = _object(workdir / "result.json")
    # It may be that of an evaluation, or of a training that was extended since.
    ended = result.get("mode") == "train" and (not metrics or result.get("steps") == metrics[-1]["step"])
    return RunData(
        name=name,
        config=stored.flat(config),
        metrics=metrics,
        result=result if ended else {},
        environment=_object(workdir / environment.FILE),
        details=_object(workdir / records.DETAILS),
    )


def defaults() -> dict[str, Any]:
    """The fields at their defaults, as a config file has them."""
    return stored.flat(fields.base())


def _object(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one for a file that is missing or damaged."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _mean(points: list[tuple[float, float]]) -> tuple[float, float]:
    return points[-1][0], sum(y for _, y in points) / len(points)
