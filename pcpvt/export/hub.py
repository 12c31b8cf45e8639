"""`config.export.format=hub`: a folder that timm and Transformers load, as they load a model from the Hugging Face hub.

    timm.create_model("local-dir:FOLDER", pretrained=True)
    transformers.TimmWrapperForImageClassification.from_pretrained("FOLDER")

It holds `config.json` (architecture, classes, preprocessing, as `timm.models.save_for_hf` writes them),
`model.safetensors` and a model card.
"""

import json
from pathlib import Path
from typing import Any

from pcpvt.checkpoints import foreign
from pcpvt.checkpoints.hub import CONFIG, WEIGHTS
from pcpvt.config import licences
from pcpvt.errors import UserError, suppress_logging
from pcpvt.export import card
from pcpvt.export.formats import Format, Network, Request, Written, compare
from pcpvt.models import pcpvt


def write(request: Request, path: Path) -> Written:
    """Writes the folder; compared with the model that timm makes of it."""
    session, model = request.session, request.loaded.model
    name, (height, width) = pcpvt.TIMM_NAMES.get(session.config.model.name), session.size
    if name is None:
        raise UserError(
            f"config.model.name: timm has no model like {session.config.model.name}: use another config.export.format"
        )
    if height % pcpvt.STRIDE or width % pcpvt.STRIDE:
        raise UserError(
            f"config.image_size: {height}x{width} px: timm's model computes other logits at sides that {pcpvt.STRIDE} "
            "does not divide: give others, and evaluate with them first"
        )
    path.mkdir()
    foreign.write_timm(request.params, path / WEIGHTS, {foreign.DESCRIPTION: json.dumps(request.description)})
    text = json.dumps(describe(request, name), indent=2, ensure_ascii=False)
    (path / CONFIG).write_text(text + "\n", encoding="utf-8")
    (path / "README.md").write_text(card.text(request, name), encoding="utf-8")
    from pcpvt import torchvision_compat  # noqa: F401 - before timm
    import timm  # isort: skip

    with suppress_logging():
        network: Network = timm.create_model(f"local-dir:{path}", pretrained=True).eval()
    cases = compare(model, request.params, [session.size], network, "folder for timm")
    usage = f'timm.create_model("local-dir:{request.output}", pretrained=True)'
    return Written(cases, [usage, f"to upload it: hf upload OWNER/NAME {request.output}"])


def describe(request: Request, architecture: str) -> dict[str, Any]:
    """The `config.json`; where training named the classes it has a name for every output, as Transformers needs."""
    about, model = request.description, request.loaded.model
    licence = licences.parse(request.session.config.export.license)
    pretrained = {
        "input_size": [model.in_chans, *about["image_size"]], "fixed_input_size": True,
        "interpolation": about["interpolation"], "crop_pct": about["crop"], "crop_mode": "center",
        "mean": about["mean"], "std": about["std"], "num_classes": model.num_classes, "custom_load": False,
        "pool_size": None, "first_conv": "patch_embeds.0.proj", "classifier": "head",
        **({"license": licence.name or licence.identifier} if licence else {}),
    }  # fmt: skip
    return {
        "architecture": architecture, "num_classes": model.num_classes,
        "num_features": model.spec.dims[-1], "global_pool": "avg",
        **({"label_names": about["labels"]} if about["classes"] else {}),
        **({} if model.in_chans == 3 else {"model_args": {"in_chans": model.in_chans}}),
        "pretrained_cfg": pretrained,
    }  # fmt: skip


FORMAT = Format("", write, False, multilabel=False, tag="-hub")  # timm and Transformers would read one label
