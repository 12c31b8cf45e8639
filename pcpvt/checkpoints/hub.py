"""Models of timm: `timm:NAME`, `hf-hub:OWNER/NAME[@REVISION]` on the Hugging Face hub, or a folder as it is there."""

import json
from pathlib import Path
from typing import Any

from pcpvt.checkpoints import description
from pcpvt.checkpoints.description import Description
from pcpvt.errors import UserError, one_line, suppress_logging

TIMM, HUB = "timm:", ("hf-hub:", "hf_hub:")  # what such names begin with
CONFIG, WEIGHTS = "config.json", "model.safetensors"  # in a folder
_FILES = (WEIGHTS, "pytorch_model.bin")


def is_name(path_or_name: object) -> bool:
    """Whether weights are given by a model's name, not by a path."""
    return str(path_or_name).startswith((TIMM, *HUB))


def describe(name: str) -> Description:
    """What a model says about itself, without its weights; UserError when it cannot be found."""
    if name.startswith(HUB):
        return _hub_description(name)
    model_name = _timm_name(name)
    import timm

    cfg = timm.get_pretrained_cfg(model_name)
    return description.from_timm(cfg.to_dict() if cfg else {})


def fetch_timm(name: str) -> tuple[dict[str, Any], Description]:
    """The state dict of `timm:NAME`, and what timm says about it; UserError when it cannot be fetched."""
    model_name = _timm_name(name)
    import timm

    try:
        with suppress_logging():
            model = timm.create_model(model_name, pretrained=True)
    except Exception as error:  # whatever the network, the hub or timm raise
        raise unfetched(name, error) from None
    return model.state_dict(), description.from_timm(getattr(model, "pretrained_cfg", None) or {})


def fetch(name: str) -> tuple[str, Description]:
    """The local file of `hf-hub:OWNER/NAME`, and what the repository says about it; UserError when there is none.

    The caller reads the file: timm itself would unpickle one that is not safetensors.
    """
    said = _hub_description(name)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    repository, _, revision = name.partition(":")[2].partition("@")
    reason: Exception = FileNotFoundError(f"it has neither {' nor '.join(_FILES)}")
    for file in _FILES:
        try:
            return hf_hub_download(repository, file, revision=revision or None), said
        except EntryNotFoundError as error:
            reason = error
        except Exception as error:  # whatever the network or the hub raise
            raise unfetched(name, error) from None
    raise unfetched(name, reason)


def is_folder(path: Path) -> bool:
    """Whether a folder's `config.json` describes a model of timm; that of a workdir does not."""
    return "architecture" in _folder_config(path)


def describe_folder(path: Path) -> Description:
    """What the `config.json` of a folder says; UserError when it is another model."""
    config = _folder_config(path)
    given = config.get("pretrained_cfg")
    cfg = given if isinstance(given, dict) else config  # older ones are not nested
    named: dict[str, Any] = {name: config[name] for name in ("architecture", "label_names") if name in config}
    said = description.from_timm({**cfg, **named})
    if not said.model:
        raise UserError(
            f"{path}: is {one_line(config['architecture'])}, no Twins-PCPVT: give a folder with a model of that family"
        )
    return said


def folder_weights(path: Path) -> Path:
    """The weights file of a folder; UserError when there is none."""
    found = next((path / file for file in _FILES if (path / file).is_file()), None)
    if found is None:
        raise UserError(f"{path}: holds {CONFIG}, but neither {' nor '.join(_FILES)}: get the folder again")
    return found


def _folder_config(path: Path) -> dict[str, Any]:
    try:
        value = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _timm_name(name: str) -> str:
    """The model's name for timm; UserError when timm has no such model."""
    from pcpvt import torchvision_compat  # noqa: F401, I001  # before timm
    import timm

    model_name = name.removeprefix(TIMM)
    # is_model also refuses timm's own schemes (local-dir:, hf-hub:), which may name any file or model.
    if not timm.is_model(model_name):
        known = ", ".join(f"timm:{model}" for model in timm.list_models("twins_pcpvt_*"))
        raise UserError(f"{one_line(name)}: timm has no such model: use one of {known}")
    return model_name


def _hub_description(name: str) -> Description:
    from pcpvt import torchvision_compat  # noqa: F401, I001  # before timm
    from timm.models import load_model_config_from_hf

    try:
        cfg, model_name, *_ = load_model_config_from_hf(name.partition(":")[2])
    except Exception as error:  # whatever the network, the hub or timm raise
        raise unfetched(name, error) from None
    said = description.from_timm({**cfg, "architecture": model_name})
    if not said.model:
        raise UserError(f"{one_line(name)}: is {one_line(model_name)}, no Twins-PCPVT: name a model of that family")
    return said


def unfetched(name: str, error: Exception) -> UserError:
    """The error for a model that timm could not fetch."""
    return UserError(
        f"{one_line(name)}: timm could not fetch it ({type(error).__name__}: {one_line(error)}): try again with a "
        "network, or download the file elsewhere and give its path"
    )
