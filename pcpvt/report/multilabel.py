"""What `answers.html` shows of an evaluation with several labels per image."""

import os
from typing import Any

from pcpvt.report.data import LISTED, MATRIX


def summarize_answers(details: dict[str, Any]) -> dict[str, Any]:
    """The classes and the wrong answers of `details.json` (see `evaluate.scores`); empty if missing or damaged."""
    try:
        names, images, precisions = details["classes"], details["images"], details["precisions"]
        rows = []
        figures = zip(names, images, details["right"], details["predicted"], precisions, strict=True)
        for name, count, right, predicted, precision in figures:
            f1 = 2 * right / (count + predicted) if count + predicted else None
            shares = (f1, right / count if count else None, right / predicted if predicted else None)
            shown = [_percent(precision), *(_percent(share if share is None else 100 * share) for share in shares)]
            rows.append((-1.0 if precision is None else float(precision), str(name), *shown, int(count)))
        rows.sort()
        listed = rows if len(rows) <= MATRIX else rows[:LISTED]
        step, split = details.get("step"), details.get("split", "validation")
        checkpoint = "" if step is None else f", the checkpoint of step {step}"
        answers = [
            {"name": answer["name"], "picture": answer["picture"], "file": os.path.basename(answer["name"])}
            | {"class": names[answer["class"]], "label": bool(answer["label"])}
            | {"probability": f"{100 * answer['probability']:.1f}"}
            for answer in details["answers"]
        ]
        return {
            "about": f"{details['seen']:,} {split} images, {len(names)} classes{checkpoint}",
            "threshold": f"{details['threshold']:g}",
            "order": "Lowest first" if listed is rows else f"The {LISTED} lowest of {len(rows)}",
            "rows": [row[1:] for row in listed],
            "answers": answers,
        }
    except (LookupError, TypeError, ValueError, AttributeError):  # valid JSON of another form
        return {}


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"
