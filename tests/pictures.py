"""Helpers of the image transform tests: test pictures, timm's transforms, and a comparison of distributions."""

from __future__ import annotations

import functools

import numpy as np
from PIL import Image

from pcpvt import torchvision_compat  # noqa: F401 - before timm
from pcpvt.rng import generator

POLICY = "rand-m9-mstd0.5-inc1"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def agree(ours, theirs) -> bool:
    """Whether means and variances are equal, within 4.5 standard errors of their difference.

    The standard error of a mean is sqrt(variance / n); the variance is the mean of squared deviations, so its own error
    follows the same formula. Seeds are fixed. Over all comparisons of the tests a correct implementation fails at 4.5
    with a probability of about 1e-3; a wrong alpha, for example, is off by 10 or more.
    """
    ours, theirs = np.asarray(ours, float), np.asarray(theirs, float)
    for a, b in ((ours, theirs), ((ours - ours.mean(0)) ** 2, (theirs - theirs.mean(0)) ** 2)):
        error = np.sqrt(a.var(0) / len(a) + b.var(0) / len(b))
        if (np.abs(a.mean(0) - b.mean(0)) > 4.5 * error + 1e-9).any():
            return False
    return True


@functools.cache
def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Large shapes with some noise, as in photographs."""
    draws = generator(seed, "picture")
    coarse = Image.fromarray(draws.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(float)
    return np.clip(smooth + draws.normal(0, 8, smooth.shape), 0, 255).astype(np.uint8)


def timm_transform(**options):
    from timm.data import create_transform

    return create_transform(interpolation="bicubic", use_prefetcher=True, **options)
