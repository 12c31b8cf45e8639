"""Models of timm of any architecture: `timm:NAME`, `hf-hub:OWNER/NAME`, or a folder as it is on the hub.

timm builds the model and reads the weights, of which it unpickles nothing but tensors.
"""

import difflib
import os
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from pcpvt.checkpoints import description, hub
from pcpvt.checkpoints.description import Description
from pcpvt.errors import UserError, one_line, suppress_logging


class TimmModel(NamedTuple):
    """A classifier of images `[b, channels, h, w]`, on the host, in evaluation mode."""

    module: nn.Module
    outputs: int
    said: Description  # its size is that of the training


def is_timm(name: str) -> bool:
    """Whether a name or a path means a model that timm builds; `timm:twins_pcpvt_*` is for `checkpoints.load`."""
    if name.startswith(hub.TIMM):
        return not name.removeprefix(hub.TIMM).startswith("twins_pcpvt")
    return name.startswith(hub.HUB) or hub.is_folder(Path(os.path.expanduser(name)))


def read(name: str) -> TimmModel:
    """One model with its weights; UserError when there is none, or timm cannot read it."""
    from pcpvt import torchvision_compat  # noqa: F401, I001  # before timm
    import timm

    source = name.removeprefix(hub.TIMM)
    if name.startswith(hub.TIMM) and not timm.is_model(source):  # which also refuses other schemes, as hf-hub:
        near = difflib.get_close_matches(source, timm.list_models(), 3, 0.3)
        raise UserError(
            f"{one_line(name)}: timm has no such model: give a name of timm.list_models(pretrained=True)"
            f"{f', such as timm:{near[0]}' if near else ''}"
        )
    if not name.startswith((hub.TIMM, *hub.HUB)):
        source = f"local-dir:{os.path.expanduser(name)}"
    try:
        with suppress_logging():
            model = timm.create_model(source, pretrained=True).eval().requires_grad_(False)
    except Exception as error:  # whatever the network, the hub or timm raise
        if source.startswith("local-dir:"):
            raise UserError(
                f"{name}: timm cannot read it ({type(error).__name__}: {one_line(error)}): write the folder anew with "
                "timm.models.save_for_hf"
            ) from None
        raise hub.unfetched(name, error) from None
    cfg = dict(getattr(model, "pretrained_cfg", None) or {})
    said = description.from_timm({**cfg, "test_input_size": None})
    outputs: Any = model.num_classes
    return TimmModel(model, outputs, said)
