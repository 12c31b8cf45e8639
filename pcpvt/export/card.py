"""The model card of `config.export.format=hub`: what the checkpoint says about its data, recipe and metrics.

Paths of this machine are not written: of a folder or a file only the name.
"""

import json
import os
from pathlib import Path
from typing import Any

from pcpvt.checkpoints import hub
from pcpvt.config import licences
from pcpvt.config.fields import FIELDS, RECIPE, Rule
from pcpvt.config.stored import flat
from pcpvt.export.formats import Request
from pcpvt.models import pcpvt

_METRICS = {
    "acc1": "top-1 accuracy, %", "acc5": "top-5 accuracy, %", "balanced_acc": "balanced accuracy, %",
    "macro_f1": "macro F1, %", "loss": "loss",
}  # fmt: skip
_OTHER_GROUPS = ("data", "eval", "export", "predict", "report", "bench")


def text(request: Request, architecture: str) -> str:
    """The card, Markdown with the YAML header of the hub."""
    about, loaded = request.description, request.loaded
    height, width = about["image_size"]
    config = flat(loaded.meta.get("config", {}))
    sections = [
        f"# {architecture}\n\n"
        "A Twins-PCPVT image classifier (Chu et al. 2021, arXiv:2104.13840), trained with pcpvt: "
        f"{loaded.model.num_classes} classes, {pcpvt.n_parameters(loaded.model) / 1e6:.1f} million parameters.",
        _usage(),
        "## Preprocessing\n\n"
        f"Resize bicubically so that the image just covers {height} x {width} px divided by {about['crop']:g}, crop "
        f"the centre of {height} x {width} px, divide by 255, subtract {about['mean']}, divide by {about['std']}.",
        _data(config, loaded.meta, about["classes"]),
        _recipe(config, loaded.meta),
        _metrics(metrics(request)),
        f"## Licence\n\n{_licence(request)}",
    ]
    return _header(request, config) + "\n\n".join(sections) + "\n"


def metrics(request: Request) -> dict[str, float]:
    """The validation metrics of the exported weights, as the checkpoint says them; empty where it does not."""
    found = request.loaded.meta.get("metrics") or {}
    if request.loaded.which == "params" and "acc1_raw" in found:  # the others are those of the averaged weights
        found = {"acc1": found["acc1_raw"], "loss": found["loss_raw"]}
    return {name: found[name] for name in _METRICS if name in found}


def _header(request: Request, config: dict[str, Any]) -> str:
    licence, data = licences.parse(request.session.config.export.license), config.get("data.name") or ""
    lines = ["tags:", "- image-classification", "- timm", "- transformers", "- twins-pcpvt"]
    lines += ["library_name: timm", "pipeline_tag: image-classification"]
    if licence:
        named = {"license": licence.identifier, "license_name": licence.name, "license_link": licence.link}
        lines += [f"{name}: {json.dumps(value)}" for name, value in named.items() if value]
    if data.startswith("hfds/"):
        lines += ["datasets:", f"- {json.dumps(data.removeprefix('hfds/'))}"]
    return "\n".join(["---", *lines, "---", "", ""])


def _usage() -> str:
    return """## Use

```python
import timm, torch
from PIL import Image

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()  # or "hf-hub:OWNER/NAME"
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
with torch.no_grad():
    probabilities = model(transform(Image.open("photo.jpg").convert("RGB"))[None]).softmax(-1)
```

```python
from transformers import pipeline

print(pipeline("image-classification", model="FOLDER")("photo.jpg"))
```"""


def _data(config: dict[str, Any], meta: dict[str, Any], classes: list[str] | None) -> str:
    path = str(config.get("data.path") or "")
    name = Path(path).name or str(config.get("data.name") or "")
    if str(config.get("data.name") or "").startswith(("hfds/", "torch/")):
        name = config["data.name"]
    lines = [f"Trained on {name}." if name else "The weights do not say what they were trained on."]
    if meta.get("examples"):
        lines.append(f"{meta['examples']} training images.")
    if classes:
        listed = ", ".join(f"`{name}`" for name in classes[:20])
        lines.append(f"{len(classes)} classes: {listed}{', ... (see `config.json`)' if len(classes) > 20 else ''}.")
    return "## Data\n\n" + " ".join(lines)


def _recipe(config: dict[str, Any], meta: dict[str, Any]) -> str:
    if not config:
        return "## Recipe\n\nThe weights do not say how they were trained."
    rows = [
        f"{name}: {_public(value)}"
        for name, value in config.items()
        if value not in (None, "") and name in FIELDS and _matters(name)
    ]
    optimizer = "Muon and AdamW" if config.get("optimizer") == "muon" else "AdamW"
    steps = f"Step {meta['step']} of a training with {optimizer}:" if "step" in meta else f"Trained with {optimizer}:"
    return "\n".join(["## Recipe", "", steps, "", "```", *rows, "```"])


def _matters(name: str) -> bool:
    """Whether a field says what was trained, not how it was computed or what was written down."""
    rule: Rule = FIELDS[name].rule
    return name.partition(".")[0] not in _OTHER_GROUPS and (RECIPE in rule or Rule.FREE not in rule)


def _public(value: Any) -> Any:
    """A field's value without the folders of a path."""
    is_path = isinstance(value, str) and os.sep in value and not hub.is_name(value)
    return Path(value).name if is_path else value


def _metrics(found: dict[str, float]) -> str:
    if not found:
        return "## Metrics\n\nThe weights come without metrics."
    rows = [f"| {label} | {found[name]:.4g} |" for name, label in _METRICS.items() if name in found]
    return "\n".join(["## Metrics", "", "On the validation data of the training.", "", "| | |", "|---|---|", *rows])


def _licence(request: Request) -> str:
    licence = licences.parse(request.session.config.export.license)
    if licence is None:
        return "Not stated."
    return f"[{licence.name}]({licence.link})" if licence.link else licence.identifier
