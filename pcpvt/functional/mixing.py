"""Normalisation of uint8 images, random erasing, mixup and cutmix as pure functions of given random draws.

The draws have the distribution of timm's `Mixup` (mixup: Zhang et al. 2018; cutmix: Yun et al. 2019). Sample 2i mixes
with sample 2i + 1. The order of samples is random, so this is equivalent to timm's pairing of first with last, and it
does not depend on how a batch is split into even parts. Shapes do not depend on data: one compiled graph serves all.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# Random erasing writes noise n into the image as the code clip(round(NOISE_SCALE * n) + NOISE_ZERO, 0, 255).
NOISE_SCALE = 32
NOISE_ZERO = 128


class MixSpec(NamedTuple):
    """How batches are mixed."""

    mixup: float = 0.8  # alpha of mixup's Beta(alpha, alpha); 0: no mixup
    cutmix: float = 1.0  # alpha of cutmix's Beta(alpha, alpha); 0: no cutmix
    prob: float = 1.0  # probability that a draw mixes at all
    switch_prob: float = 0.5  # probability of cutmix when both are on
    mode: str = "batch"  # the samples that share one draw: `batch`, `pair` or `elem`


def mixing_draws(
    rng: np.random.Generator, batch: int, size: tuple[int, int], spec: MixSpec
) -> tuple[np.ndarray, np.ndarray]:
    """The draws for a (global) batch.

    Args:
        batch: samples; even.
        size: (height, width) of the images.

    Returns:
        lam: float32 `[batch]`, each sample's own weight; its partner has 1 - lam. For cutmix, 1 - the exact share of
            the image that the box covers after clipping at the borders.
        box: int32 `[batch, 4]` (top, bottom, left, right), which cutmix takes from the partner; empty for mixup.
    """
    assert batch % 2 == 0, f"mixing pairs samples: {batch} is odd"
    draws = {"batch": 1, "pair": batch // 2, "elem": batch}[spec.mode]
    height, width = size
    if spec.mixup > 0 and spec.cutmix > 0:
        cut = rng.random(draws) < spec.switch_prob
    else:
        cut = np.full(draws, spec.cutmix > 0)
    ones = np.ones(draws)
    mixup = rng.beta(spec.mixup, spec.mixup, draws) if spec.mixup > 0 else ones
    cutmix = rng.beta(spec.cutmix, spec.cutmix, draws) if spec.cutmix > 0 else ones
    lam = np.where(rng.random(draws) < spec.prob, np.where(cut, cutmix, mixup), ones)

    side = np.sqrt(1 - lam)
    spans = []
    for length in (height, width):
        extent = (length * side).astype(np.int64)
        centre = rng.integers(0, length, draws)
        spans += [np.maximum(centre - extent // 2, 0), np.minimum(centre + (extent + 1) // 2, length)]
    box = np.where(cut[:, None], np.stack(spans, axis=1), 0)
    area = (box[:, 1] - box[:, 0]) * (box[:, 3] - box[:, 2])
    box[area == 0] = 0
    lam = np.where(cut, 1 - area / (height * width), lam)
    repeats = batch // draws
    return np.repeat(lam, repeats).astype(np.float32), np.repeat(box, repeats, axis=0).astype(np.int32)


def decode_images(image: Tensor, erase: Tensor | None, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalised images, with the noise of random erasing decoded inside the erasing boxes.

    Args:
        image: uint8 `[B, H, W, C]`.
        erase: int32 `[B, 4]` (top, bottom, left, right), or None. See `data.augment.erase` for the codes.
        mean, std: per channel, for values in 0..1.

    Returns:
        float32 `[B, H, W, C]`.
    """
    pixels = image.float()
    normalised = (pixels - 255 * channels(mean, pixels)) / (255 * channels(std, pixels))
    if erase is None:
        return normalised
    return torch.where(_inside(erase, image.shape), (pixels - NOISE_ZERO) / NOISE_SCALE, normalised)


def mix_images(x: Tensor, lam: Tensor, box: Tensor) -> Tensor:
    """Mixed images `[B, H, W, C]`: cutmix where a sample's box is not empty, mixup by lam elsewhere.

    A sample with lam 1 and an empty box is returned bit for bit.
    """
    own = torch.where(_inside(box, x.shape), 0.0, 1.0)
    has_box = (box[:, 1] > box[:, 0])[:, None, None, None]
    own = torch.where(has_box, own, lam[:, None, None, None]).to(x.dtype)
    return x * own + _partners(x) * (1 - own)


def mix_targets(
    target: Tensor, lam: Tensor | None, num_classes: int, smoothing: float = 0.0, dtype: torch.dtype = torch.float32,
    answers: int | None = None,
) -> Tensor:  # fmt: skip
    """Soft targets `[B, num_classes]` in `dtype`; each row of a distribution sums to 1 up to rounding.

    Args:
        target: labels, int64 `[B]`, or distributions over classes, or multi-hot rows, `[B, num_classes]`.
        lam: float32 `[B]` from `mixing_draws`, or None for no mixing.
        smoothing: probability mass spread over all answers.
        answers: of one question: None for all classes, 2 where each class is a question of its own.
    """
    if target.ndim == 1:
        # A comparison: F.one_hot does not work under torch.func on NPUs.
        target = target[:, None] == torch.arange(num_classes, device=target.device)
    soft = target.to(dtype) * (1 - smoothing) + smoothing / (answers or num_classes)
    if lam is None:
        return soft
    own = lam[:, None].to(dtype)
    return soft * own + _partners(soft) * (1 - own)


def channels(values: Sequence[float], like: Tensor) -> Tensor:
    """`[C]`, filled on the device: a copy from the host would synchronize, and break graph capture."""
    return torch.cat([torch.full((1,), value, device=like.device, dtype=like.dtype) for value in values])


def _partners(x: Tensor) -> Tensor:
    """`[B, ...]` with samples 2i and 2i + 1 exchanged."""
    assert x.shape[0] % 2 == 0, f"mixing pairs samples: {x.shape[0]} is odd"
    return x.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def _inside(box: Tensor, shape: torch.Size) -> Tensor:
    """bool `[B, H, W, 1]`: which pixels of images of this shape `[B, H, W, ...]` lie in the boxes."""
    rows = torch.arange(shape[1], device=box.device, dtype=box.dtype)
    columns = torch.arange(shape[2], device=box.device, dtype=box.dtype)
    top, bottom, left, right = box[:, :, None].unbind(1)
    inside_rows = (rows >= top) & (rows < bottom)
    inside_columns = (columns >= left) & (columns < right)
    return (inside_rows[:, :, None] & inside_columns[:, None, :])[..., None]
