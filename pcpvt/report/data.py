"""The files of a workdir, read for the report: either the config or the metrics must exist, the rest is optional."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from pcpvt.config import stored
from pcpvt.errors import UserError
from pcpvt.runtime import environment, records

POINTS = 300  # of a curve: more cannot be seen at this size, and ImageNet's 100 epochs write 6,000 records


class RunData(NamedTuple):
    """One workdir: `config` is flat (`{"model.name": ...}`), the others are as in their files, empty where missing."""

    name: str
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    result: dict[str, Any]
    environment: dict[str, Any]
    details: dict[str, Any]

    def device(self) -> str:
        """The device, with the number of processes when there are several; empty when it is not known."""
        name = self.environment.get("device") or self.result.get("device") or ""
        count = self.environment.get("processes") or self.result.get("processes") or 1
        return f"{count} x {name}" if name and count != 1 else str(name)

    def best(self) -> dict[str, Any]:
        """The best evaluation so far, by the rule that chooses checkpoints: higher top-1, then later."""
        evaluations = [entry for entry in self.metrics if entry.get("kind") == "eval" and _is_number(entry.get("acc1"))]
        return max(evaluations, key=lambda entry: (entry["acc1"], entry["step"]), default={})

    def curve(self, kind: str, name: str) -> list[tuple[float, float]]:
        """(epoch, value) of one number of the records of a kind, at most `POINTS` of them: means of equal parts."""
        points = [
            (float(entry["epoch"]), float(entry[name]))
            for entry in self.metrics
            if entry.get("kind") == kind and _is_number(entry.get("epoch")) and _is_number(entry.get(name))
        ]
        size = max(math.ceil(len(points) / POINTS), 1)
        parts = [points[i : i + size] for i in range(0, len(points), size)]
        return [(part[-1][0], sum(value for _, value in part) / len(part)) for part in parts]


def load(workdir: Path, name: str, field: str = "--workdir") -> RunData:
    """Reads one workdir, which the report calls `name`.

    Raises:
        UserError: when it holds no run; `field` is what named it.
    """
    metrics = records.read_metrics(workdir / "metrics.jsonl")
    config = _read_object(workdir / "config.json")
    if not metrics and not config:
        raise UserError(f"{field}: {workdir} holds no run (neither config.json nor metrics.jsonl): name another folder")
    result = _read_object(workdir / "result.json")
    # It may be the result of an evaluation, or of a training that was extended since.
    if result.get("mode") != "train" or (metrics and result.get("steps") != metrics[-1]["step"]):
        result = {}
    files = (_read_object(workdir / file) for file in (environment.FILE, records.DETAILS))
    return RunData(name, stored.flat(config), metrics, result, *files)


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one for a file that is missing or damaged."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
