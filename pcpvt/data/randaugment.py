"""timm's RandAugment and 3-Augment with random numbers from a given generator and with faster shears and translations.

The policy, its magnitudes and its operations are timm's (`timm.data.auto_augment`), with two differences:
- posterizing keeps at least one bit. timm asks for 0 bits in 0.15 % of the images under `rand-m9-mstd0.5-inc1`, which
  makes them black, and which Pillow refuses from version 13 on;
- bicubic shears and translations are computed along the one axis in which they move pixels: 4 times as fast as Pillow's
  general transform, and equal to it up to rounding (at most one level, in 1 % of the pixels).
"""

import contextlib
import functools
import importlib.util
import random
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image

MAGNITUDE = 10  # timm's, where a policy names none
THREE = "3a"  # timm's name of 3-Augment
_GLOBAL_RANDOM = threading.Lock()


def rand_augment(
    pixels: np.ndarray, policy: str, interpolation: str, fill: tuple[int, int, int], rng: np.random.Generator
) -> np.ndarray:
    """The image after the operations of one random draw.

    Args:
        pixels: uint8 `[height, width, 3]`; not written to.
        policy: timm's notation, e.g. `rand-m9-mstd0.5-inc1`, or `3a`: one of greyscale, solarization and blur (H.
            Touvron et al., "DeiT III", 2022). `config.checks.randaugment` refuses unknown sections, which timm ignores.
        interpolation: `bicubic` or `bilinear`, of the geometric operations.
        fill: the colour of pixels from outside the image; timm uses the dataset's mean.
    """
    transform = _policy(policy, min(pixels.shape[:2]), interpolation, fill)
    if policy.startswith(THREE):
        operations = transform.policy[rng.integers(len(transform.policy))]
    else:
        weights = transform.choice_weights
        indices = rng.choice(len(transform.ops), transform.num_layers, replace=weights is None, p=weights)
        operations = [transform.ops[i] for i in indices]
    for op in operations:
        if rng.random() < op.prob:
            arguments = _arguments(op, rng)
            with _global_random(rng) if op.name == "GaussianBlurRand" else contextlib.nullcontext():  # draws its radius
                pixels = _apply(op, arguments, pixels, fast=interpolation == "bicubic")
    return pixels


def at_share(policy: str, share: float) -> str:
    """A RandAugment policy with a share of its magnitude, which timm takes as a whole number; 3-Augment has none."""
    if not policy or policy.startswith(THREE):
        return policy
    magnitudes = re.findall(r"-m(\d+)", policy)
    magnitude = round(share * int(magnitudes[-1] if magnitudes else MAGNITUDE))
    return re.sub(r"-m\d+", f"-m{magnitude}", policy) if magnitudes else f"{policy}-m{magnitude}"


@functools.lru_cache(maxsize=16)
def _policy(policy: str, side: int, interpolation: str, fill: tuple[int, int, int]) -> Any:
    hparams = {
        "translate_const": int(side * 0.45),  # as timm's create_transform sets it
        "img_mean": fill,
        "interpolation": Image.Resampling[interpolation.upper()],
    }
    timm = _timm()
    return (timm.auto_augment_transform if policy.startswith(THREE) else timm.rand_augment_transform)(policy, hparams)


@functools.cache
def _timm() -> ModuleType:
    """The module `timm.data.auto_augment`, without the rest of timm, which it does not need.

    `import timm` also imports torchvision and parts of torch's compiler: 1.3 s and 110 MB for every loader process.
    """
    spec = importlib.util.find_spec("timm")
    for folder in (spec.submodule_search_locations if spec else None) or ():
        file = importlib.util.spec_from_file_location("timm_auto_augment", Path(folder) / "data" / "auto_augment.py")
        if file and file.loader:
            module = importlib.util.module_from_spec(file)
            with contextlib.suppress(ImportError, OSError):  # another version may have moved it, or need the rest
                file.loader.exec_module(module)
                return module
    from pcpvt import torchvision_compat  # noqa: F401 - before timm

    return importlib.import_module("timm.data.auto_augment")


def _arguments(op: Any, rng: np.random.Generator) -> tuple:
    """The arguments of timm's operation: its magnitude, jittered, on the scale of the operation."""
    if op.level_fn is None:
        return ()
    magnitude = op.magnitude
    if op.magnitude_std == float("inf"):
        magnitude = rng.uniform(0, magnitude)
    elif op.magnitude_std > 0:
        magnitude = rng.normal(magnitude, op.magnitude_std)
    magnitude = max(0.0, min(magnitude, op.magnitude_max or 10.0))
    with _global_random(rng):  # of which timm draws the sign
        arguments = op.level_fn(magnitude, op.hparams)
    return (max(1, *arguments),) if op.name.startswith("Posterize") else arguments


@contextlib.contextmanager
def _global_random(rng: np.random.Generator) -> Iterator[None]:
    """Seeds Python's global generator, which timm uses, from `rng` in this block; restores its state afterwards."""
    with _GLOBAL_RANDOM:
        state = random.getstate()
        random.seed(int(rng.integers(2**63)))
        try:
            yield
        finally:
            random.setstate(state)


def _apply(op: Any, arguments: tuple, pixels: np.ndarray, fast: bool) -> np.ndarray:
    if fast and op.name in ("ShearX", "ShearY", "TranslateXRel", "TranslateYRel"):
        fill = op.kwargs["fillcolor"]
        vertical = "Y" in op.name
        if vertical:
            pixels = _transposed(pixels)
        height, width = pixels.shape[:2]
        if op.name.startswith("Shear"):
            shift = arguments[0] * (np.arange(height) + 0.5)
        else:
            shift = np.full(height, arguments[0] * width)
        pixels = shift_rows(pixels, shift, fill)
        return _transposed(pixels) if vertical else pixels
    return np.asarray(op.aug_fn(Image.fromarray(pixels), *arguments, **op.kwargs))


def _transposed(pixels: np.ndarray) -> np.ndarray:
    """Rows and columns exchanged: twice as fast as numpy's copy of 3-byte pixels."""
    return np.asarray(Image.fromarray(pixels).transpose(Image.Transpose.TRANSPOSE))


def shift_rows(pixels: np.ndarray, shift: np.ndarray, fill: tuple[int, int, int]) -> np.ndarray:
    """Shifts each row to the left by its own, fractional number of pixels, with bicubic interpolation.

    Pillow's transform in one dimension: the cubic kernel with a = -1, edge pixels repeated, the result truncated, and
    `fill` where the sampled point is outside the row.

    Args:
        pixels: uint8 `[height, width, 3]`.
        shift: float `[height]`, in pixels; output column x shows input column x + shift.
    """
    height, width, _ = pixels.shape
    row = 3 * width
    whole = np.floor(shift)
    d = (shift - whole).astype(np.float32)[:, None]
    start = np.clip(whole.astype(np.int64), -width, width)
    pad = int(np.abs(start).max()) + 3
    padded = np.zeros((height, width + 2 * pad, 3), np.uint8)  # two edge pixels are repeated; `fill` covers the rest
    padded[:, pad : pad + width] = pixels
    padded[:, pad - 2 : pad] = pixels[:, :1]
    padded[:, pad + width : pad + width + 2] = pixels[:, -1:]
    windows = sliding_window_view(padded.reshape(height, -1), row + 9, axis=1)
    taps = windows[np.arange(height), 3 * (pad + start - 1)].astype(np.float32)
    out = taps[:, 3 : 3 + row] * (1 - 2 * d**2 + d**3)
    for offset, weight in ((0, -d + 2 * d**2 - d**3), (6, d + d**2 - d**3), (9, d**3 - d**2)):
        out += taps[:, offset : offset + row] * weight
    out = np.clip(out, 0, 255, out=out).astype(np.uint8)
    # Masks are windows of one row of three widths (outside, inside, outside): 5 times as fast as a boolean index.
    inside = np.zeros((3 * width, 3), np.uint8)
    inside[width : 2 * width] = 255
    outside = np.tile(np.array(fill, np.uint8), (3 * width, 1))
    outside[width : 2 * width] = 0
    start = 3 * (width + np.clip(np.floor(shift + 0.5).astype(np.int64), -width, width))
    out &= sliding_window_view(inside.reshape(-1), row)[start]
    out |= sliding_window_view(outside.reshape(-1), row)[start]
    return out.reshape(pixels.shape)
