"""The report about classes: confusion matrix, accuracy of each class, most confident mistakes (see `details`)."""

from __future__ import annotations

import html
import os
from typing import Any

MATRIX = 40  # classes up to which the whole matrix is drawn; above it the most frequent confusions are listed
NUMBERS = 16  # classes up to which its cells have numbers
LISTED = 25  # rows of a list


def sections(details: dict[str, Any], run: str = "") -> str:
    """HTML; empty without details, or with damaged ones. `run` names the run where the page has several."""
    try:
        return _sections(details, run) if details.get("classes") else ""
    except (LookupError, TypeError, ValueError, AttributeError):  # a file that is JSON, and yet not ours
        return ""


def _sections(details: dict[str, Any], run: str) -> str:
    of = f" of {html.escape(run)}" if run else ""
    about = f"{sum(details['images']):,} validation images, {len(details['classes'])} classes"
    if details.get("step") is not None:
        about += f", the checkpoint of step {html.escape(str(details['step']))}"
    if len(details["classes"]) <= MATRIX:
        pairs = f'<h2>Confusion matrix{of}</h2><p class="soft">{about}; rows are labels, columns predictions.</p>'
        pairs += _matrix(details)
    else:
        pairs = f'<h2>Most frequent confusions{of}</h2><p class="soft">{about}.</p>{_pairs(details)}'
    parts = f"<section>{pairs}</section>{_per_class(details, of)}"
    # A matrix with numbers and a list of as many classes are as high as each other.
    beside = len(details["classes"]) <= NUMBERS or len(details["classes"]) > MATRIX
    return (f'<div class="beside">{parts}</div>' if beside else parts) + _mistakes(details, of)


def _matrix(details: dict[str, Any]) -> str:
    names, images = details["classes"], details["images"]
    counts = {(i, j): c for i, j, c in details["confusions"]}
    counts |= {(i, i): c for i, c in enumerate(details["right"])}
    numbers = len(names) <= NUMBERS
    head = "".join(f"<th title={_quoted(name)}>{html.escape(name)}</th>" for name in names)
    rows = []
    for i, name in enumerate(names):
        cells = []
        for j, other in enumerate(names):
            count = counts.get((i, j), 0)
            if not count:
                cells.append("<td></td>")
                continue
            share = count / max(images[i], 1)
            # A mistake is seldom more than a tenth of its class: its colour is stretched, or none would be seen.
            depth = share if i == j else min(1.0, share * 4)
            style = " ".join(("diagonal" if i == j else "wrong", "deep" if depth > 0.6 else "")).strip()
            title = _quoted(
                f"{name} taken for {other}: {count} of {images[i]}" if i != j else f"{name}: {count} of {images[i]}"
            )
            cells.append(f'<td class="{style}" style="--v:{depth:.2f}" title={title}>{count if numbers else ""}</td>')
        rows.append(f"<tr><th title={_quoted(name)}>{html.escape(name)}</th>{''.join(cells)}</tr>")
    return (
        f'<div class="card scroll matrix{"" if numbers else " small"}"><table><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _pairs(details: dict[str, Any]) -> str:
    names, images = details["classes"], details["images"]
    rows = "".join(
        f"<tr><td>{html.escape(names[i])}</td><td>{html.escape(names[j])}</td><td class=number>{c}</td>"
        f"<td class=number>{100 * c / max(images[i], 1):.1f} %</td></tr>"
        for i, j, c in details["confusions"][:LISTED]
    )
    return (
        '<div class="card scroll"><table class="wide"><tr><th>label</th><th>predicted</th><th class=number>images</th>'
        f"<th class=number>of its class</th></tr>{rows}</table></div>"
    )


def _per_class(details: dict[str, Any], of: str) -> str:
    scores = [
        (right / images, i, right, images)
        for i, (right, images) in enumerate(zip(details["right"], details["images"], strict=True))
        if images
    ]
    scores.sort()
    shown = scores if len(scores) <= MATRIX else scores[:LISTED]
    which = "lowest first" if len(shown) == len(scores) else f"the {LISTED} lowest of {len(scores)}"
    rows = "".join(
        f"<tr><td>{html.escape(details['classes'][i])}</td><td class=number>{100 * share:.1f} %</td>"
        f'<td class="bar"><div><span style="width: calc({100 * share:.1f}%)"></span></div></td>'
        f'<td class="number soft">{right} of {images}</td></tr>'
        for share, i, right, images in shown
    )
    head = "<tr><th>class</th><th class=number>top-1</th><th></th><th class=number>right</th></tr>"
    return (
        f'<section><h2>Accuracy of each class{of}</h2><p class="soft">{which[0].upper()}{which[1:]}.</p>'
        f'<div class="card scroll"><table class="wide">{head}{rows}</table></div></section>'
    )


def _mistakes(details: dict[str, Any], of: str) -> str:
    if not details["mistakes"]:
        return f"<section><h2>Mistakes{of}</h2><p>None.</p></section>"
    names, figures = details["classes"], []
    for one in details["mistakes"]:
        label, predicted = html.escape(names[one["label"]]), html.escape(names[one["predicted"]])
        picture = f'<img src={_quoted(one["picture"])} alt="{label}" loading="lazy">' if one["picture"] else ""
        figures.append(
            f'<figure class="card">{picture}<figcaption><div>predicted <span class="is">{predicted}</span> '
            f'<span class="soft">{100 * one["confidence"]:.1f} %</span></div>'
            f'<div>label <b>{label}</b> <span class="soft">{100 * one["own"]:.1f} %</span></div>'
            f'<div class="name" title={_quoted(one["name"])}>{html.escape(os.path.basename(one["name"]))}</div>'
            "</figcaption></figure>"
        )
    return (
        f'<section><h2>Most confident mistakes{of}</h2><p class="soft">With the probabilities that the prediction '
        f'and the label got.</p><div class="pictures">{"".join(figures)}</div></section>'
    )


def _quoted(text: str) -> str:
    return f'"{html.escape(text)}"'
