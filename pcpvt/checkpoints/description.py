"""What a weights file says about itself: model, image size, crop, normalisation, class names, task.

Checkpoints of pcpvt say it in their JSON, files of `--mode=export` for timm in their metadata, and timm's models in
their pretrained config. `--mode=eval`, `predict`, `export`, fine-tuning and the Python API believe it; what the command
line gives wins, with a note. A value that cannot be (a file may hold any JSON) is as if it were missing.
"""

import itertools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pcpvt.functional.objective import normalisation
from pcpvt.models import pcpvt

FIRST = "patch_embeds.0.proj"  # the layer that sees the image


class Description(NamedTuple):
    """What a file says about itself; None or empty where it says nothing."""

    model: str = ""  # a name of `models.pcpvt.SPECS`
    size: tuple[int, int] | None = None  # (height, width) of the images that it is evaluated with
    crop: float | None = None  # side of the evaluation crop over the resized short side
    classes: list[str] | None = None  # names of the outputs
    mean: tuple[float, ...] | None = None  # per channel, for values in 0..1
    std: tuple[float, ...] | None = None
    interpolation: str = ""
    channels: int | None = None  # of the images
    value_range: tuple[float, float] | None = None  # of images of more than 8 bits
    task: str = ""  # how the outputs are read, as `config.task`

    def fields(self) -> dict[str, Any]:
        """The config fields that it settles, by dotted name."""
        found: dict[str, Any] = {"model.name": self.model} if self.model else {}
        if self.size is not None:
            height, width = self.size
            found |= {"image_size": height, "image_width": None if width == height else width}
        others: dict[str, Any] = {
            "eval.crop": self.crop,
            "model.in_chans": self.channels,
            "data.value_range": self.value_range,
        }
        others["task"] = self.task or None
        return found | {name: value for name, value in others.items() if value is not None}


def from_export(value: Any) -> Description:
    """The description that `export.run` writes into its files."""
    if not isinstance(value, Mapping):
        return Description()
    model = value.get("model")
    return Description(
        model if isinstance(model, str) and model in pcpvt.SPECS else "",
        _size(value.get("image_size")), _crop(value.get("crop")), class_list(value.get("classes")),
        _numbers(value.get("mean")), _numbers(value.get("std")), _text(value.get("interpolation")),
        _count(value.get("in_chans")), _range(value.get("value_range")),
        task if (task := value.get("task")) in ("classes", "multilabel") else "",
    )  # fmt: skip


def from_checkpoint(meta: Mapping[str, Any]) -> Description:
    """What the JSON of a checkpoint of pcpvt says."""
    config = meta.get("config", {})
    named = {"crop": "eval.crop", "in_chans": "model.in_chans", "value_range": "data.value_range", "task": "task"}
    found = {name: config.get(field) for name, field in named.items()} if isinstance(config, Mapping) else {}
    return from_export({**meta, **found})


def from_timm(cfg: Mapping[str, Any]) -> Description:
    """What the pretrained config of a timm model says: `architecture`, `input_size`, `crop_pct`, `mean`, `std`, ..."""
    models = {theirs: ours for ours, theirs in pcpvt.TIMM_NAMES.items()}
    size = cfg.get("test_input_size") or cfg.get("input_size")
    return from_export({
        "model": models.get(str(cfg.get("architecture")).partition(".")[0], ""),
        "image_size": list(size)[-2:] if isinstance(size, list | tuple) else None,
        "crop": cfg.get("test_crop_pct") or cfg.get("crop_pct"), "classes": cfg.get("label_names"),
        "in_chans": size[0] if isinstance(size, list | tuple) and len(size) == 3 and size[0] != 3 else None,
        **{name: cfg.get(name) for name in ("mean", "std", "interpolation")},
    })  # fmt: skip


def renormalise(params: pcpvt.Params, said: Description) -> tuple[pcpvt.Params, list[str]]:
    """Parameters for images that are normalised as here, of a model whose images were normalised as `said`.

    Normalisation is affine, as is the first layer, so it goes into that layer's weight and bias: (pixel - mean) / std
    there is a * x + b of the x here, a = std_here / std and b = (mean_here - mean) / std. Computed in float64. Zeros
    that pad an image whose sides the first patch does not divide stand for the mean here, not for the mean there.

    Returns:
        The params, the same where the normalisation is, and notes for the log.
    """
    notes = []
    if said.interpolation not in ("", "bicubic", "random"):
        notes.append(f"interpolation: {said.interpolation} in the file, bicubic here")
    weight, bias = params.get(f"{FIRST}.weight"), params.get(f"{FIRST}.bias")
    here_mean, here_std = normalisation(weight.shape[1] if weight is not None and weight.ndim == 4 else 3)
    mean, std = said.mean or here_mean, said.std or here_std
    pairs = itertools.zip_longest((*mean, *std), (*here_mean, *here_std), fillvalue=math.inf)
    if all(math.isclose(*pair, abs_tol=1e-6) for pair in pairs):
        return params, notes
    fits = weight is not None and bias is not None and weight.ndim == 4 and weight.shape[1] == len(mean) == len(std)
    if not fits or min(std) <= 0:
        return params, [*notes, f"normalisation: mean {mean} and std {std} of the file are not used: no such channels"]
    assert weight is not None and bias is not None
    own_mean, own_std, new_mean, new_std = (_double(v) for v in (mean, std, here_mean, here_std))
    shift = (weight.double() * ((new_mean - own_mean) / own_std)[:, None, None]).sum((1, 2, 3))
    changed = {
        f"{FIRST}.weight": (weight.double() * (new_std / own_std)[:, None, None]).to(weight.dtype),
        f"{FIRST}.bias": (bias.double() + shift).to(bias.dtype),
    }
    notes.append(f"normalisation: mean {_listed(mean)} and std {_listed(std)} of the file went into the first layer")
    return {**params, **changed}, notes


def class_list(value: Any) -> list[str] | None:
    """A list of distinct names, or None for anything else."""
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        return None
    return list(value) if value and len(set(value)) == len(value) else None


def _double(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _listed(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _size(value: Any) -> tuple[int, int] | None:
    if isinstance(value, list | tuple) and len(value) == 2 and all(type(side) is int and side > 0 for side in value):
        return value[0], value[1]
    return None


def _crop(value: Any) -> float | None:
    return float(value) if _is_number(value) and 0.05 <= value <= 1 else None


def _numbers(value: Any) -> tuple[float, ...] | None:
    if isinstance(value, list | tuple) and value and all(_is_number(n) and 0 <= n <= 1 for n in value):
        return tuple(float(number) for number in value)
    return None


def _count(value: Any) -> int | None:
    return value if type(value) is int and value > 0 else None


def _range(value: Any) -> tuple[float, float] | None:
    """A range of values, low before high."""
    if isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_number, value)) and value[0] < value[1]:
        return float(value[0]), float(value[1])
    return None


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
