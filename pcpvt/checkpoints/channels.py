"""Weights of models for RGB images, adapted to other channels."""

import math

from pcpvt.errors import UserError
from pcpvt.models import pcpvt

FIRST = "patch_embeds.0.proj.weight"  # [out, channels, k, k]: of the layer that sees the image


def adapt_channels(params: pcpvt.Params, channels: int, path: object) -> tuple[pcpvt.Params, list[str]]:
    """The weights for images of so many channels, and notes for the log; as `timm.create_model(in_chans=...)` adapts.

    For one channel the first layer's weights of R, G and B are added up: a grey image then gives what three equal
    channels gave. For others they are repeated, R, G, B, R, ..., and multiplied by 3 / channels, so that the sum over
    channels keeps its size.

    Raises:
        UserError: the weights are for other channels than these or RGB.
    """
    weight = params.get(FIRST)
    if weight is None or weight.ndim != 4 or weight.shape[1] == channels:
        return params, []
    if weight.shape[1] != 3:
        raise UserError(
            f"{path}: its images have {weight.shape[1]} channels and config.model.in_chans is {channels}: "
            f"use config.model.in_chans={weight.shape[1]}"
        )
    wide = weight.float()
    if channels == 1:
        adapted, how = wide.sum(1, keepdim=True), "added up"
    else:
        adapted = wide.repeat(1, math.ceil(channels / 3), 1, 1)[:, :channels] * (3 / channels)
        how = f"repeated and multiplied by 3/{channels}"
    note = f"channels: 3 in the file, {channels} here: the first layer's weights are {how}"
    return {**params, FIRST: adapted.to(weight.dtype)}, [note]
