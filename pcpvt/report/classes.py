"""The report about classes, as data: confusion matrix, accuracy of each class, most confident mistakes."""

from __future__ import annotations

import os
from typing import Any

MATRIX = 40  # classes up to which the whole matrix is drawn; above it the most frequent confusions are listed
NUMBERS = 16  # classes up to which its cells have numbers
LISTED = 25  # rows of a list


def summarize(details: dict[str, Any]) -> dict[str, Any]:
    """What `classes.html` shows of `details.json` (see `evaluate.mistakes`); empty if that is missing or damaged."""
    try:
        names, images, step = details["classes"], details["images"], details.get("step")
        if not names or not all(isinstance(name, str) for name in names):
            return {}
        rights = enumerate(zip(details["right"], images, strict=True))
        accuracies = sorted((right / count, i, right, count) for i, (right, count) in rights if count)
        shown = accuracies if len(accuracies) <= MATRIX else accuracies[:LISTED]
        checkpoint = "" if step is None else f", the checkpoint of step {step}"
        return {
            "about": f"{sum(images):,} validation images, {len(names)} classes{checkpoint}",
            "numbers": len(names) <= NUMBERS,
            # A matrix with numbers and a list of as many classes have equal heights.
            "beside": len(names) <= NUMBERS or len(names) > MATRIX,
            "matrix": _matrix(details) if len(names) <= MATRIX else [],
            "pairs": [
                (names[i], names[j], count, _percent(count / max(images[i], 1)))
                for i, j, count in details["confusions"][:LISTED]
            ],
            "order": "Lowest first" if shown is accuracies else f"The {LISTED} lowest of {len(accuracies)}",
            "accuracies": [(names[i], _percent(share), right, count) for share, i, right, count in shown],
            "mistakes": [
                {name: mistake[name] for name in ("name", "picture")}
                | {name: names[mistake[name]] for name in ("label", "predicted")}
                | {name: _percent(mistake[name]) for name in ("confidence", "own")}
                | {"file": os.path.basename(mistake["name"])}
                for mistake in details["mistakes"]
            ],
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
