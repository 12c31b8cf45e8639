"""The report about classes, as data: confusion matrix, accuracy of each class, most confident mistakes."""

from __future__ import annotations

import os
from typing import Any

MATRIX = 40  # classes up to which the whole matrix is drawn; above it the most frequent confusions are listed
NUMBERS = 16  # classes up to which its cells have numbers
LISTED = 25  # rows of a list


def summarize(details: dict[str, Any]) -> dict[str, Any]:
    """What the template shows of `details.json` (see `evaluate.mistakes`); empty if that is empty or damaged."""
    try:
        return _summarize(details) if details.get("classes") else {}
    except (LookupError, TypeError, ValueError, AttributeError):  # valid JSON, but not of this form
        return {}


def _summarize(details: dict[str, Any]) -> dict[str, Any]:
    names, images = details["classes"], details["images"]
    if not all(isinstance(name, str) for name in names):
        raise TypeError("classes are named by strings")
    about = f"{sum(images):,} validation images, {len(names)} classes"
    if details.get("step") is not None:
        about += f", the checkpoint of step {details['step']}"
    accuracies = sorted((r / n, i, r, n) for i, (r, n) in enumerate(zip(details["right"], images, strict=True)) if n)
    shown = accuracies if len(accuracies) <= MATRIX else accuracies[:LISTED]
    return {
        "about": about,
        "numbers": len(names) <= NUMBERS,
        # A matrix with numbers and a list of as many classes have equal heights.
        "beside": len(names) <= NUMBERS or len(names) > MATRIX,
        "matrix": _matrix(details) if len(names) <= MATRIX else [],
        "pairs": [
            (names[i], names[j], n, _percent(n / max(images[i], 1))) for i, j, n in details["confusions"][:LISTED]
        ],
        "order": "Lowest first" if len(shown) == len(accuracies) else f"The {LISTED} lowest of {len(accuracies)}",
        "accuracies": [(names[i], _percent(share), right, count) for share, i, right, count in shown],
        "mistakes": [
            {
                "picture": mistake["picture"],
                "name": mistake["name"],
                "file": os.path.basename(mistake["name"]),
                "predicted": names[mistake["predicted"]],
                "confidence": _percent(mistake["confidence"]),
                "label": names[mistake["label"]],
                "own": _percent(mistake["own"]),
            }
            for mistake in details["mistakes"]
        ],
    }


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
        style = ["diagonal"] * (i == j) + ["deep"] * (depth > 0.6)
        pair = names[i] if i == j else f"{names[i]} taken for {names[j]}"
        title = f"{pair}: {count} of {images[i]}"
        return {"style": " ".join(style), "depth": f"{depth:.2f}", "title": title, "count": count}

    return [(name, [cell(i, j) for j in range(len(names))]) for i, name in enumerate(names)]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
