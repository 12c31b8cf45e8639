"""Bit depth: values of more than 8 bits, scaled to 8 bits by the range that the user or the file gives.

The range is `config.data.value_range`, where it is set; else a TIFF's SMinSampleValue and SMaxSampleValue; else what
its bits per sample hold (12 bits: 0 to 4095). Files that say nothing: 0 to 65535 for integers, 0 to 255 for floats.
"""

import math
import sys
from typing import Any

import numpy as np
from PIL import Image

Range = tuple[float, float]  # of values; the first becomes 0 and the second 255

MOST_UNUSED = 0.25  # at most this share of the range used: 14 bits in 16 are 0.25
BITS_PER_SAMPLE, SAMPLE_FORMAT, SMIN, SMAX = 258, 339, 340, 341  # TIFF tags
SIGNED = 2  # of SAMPLE_FORMAT
_SWAPPED = {"L": "B", "B": "L", "N": "B" if sys.byteorder == "little" else "L"}
_WIDE = ("RGB", "RGBA", "RGBX", "CMYK")  # with 16 bits a band, of which Pillow keeps the upper 8


class Scaling:
    """Scales the values of one image to 8 bits, by the range that is given or else known; 8 bits stay as they are.

    Args:
        name: the image's, in messages.
        limits: `config.data.value_range`, or None.

    Attributes:
        seen: (smallest, largest) value so far, as shares of the range; None before there were any of more than 8 bits.
    """

    def __init__(self, name: str, limits: Range | None = None):
        self.name, self.limits = name, limits
        self.seen: Range | None = None
        self._range = (0.0, 0.0)

    def to_8_bits(self, array: np.ndarray, limits: Range | None = None) -> np.ndarray:
        """Numbers as uint8; `limits` are those of the file. ValueError for other things than numbers."""
        if array.dtype == np.uint8:
            return array
        if array.dtype.kind not in "uif":
            raise ValueError(f"values of type {array.dtype}")
        limits = self.limits or limits or _by_type(array)
        self.measure(array, limits)
        return scale(array, limits)

    def of_image(self, image: Image.Image) -> np.ndarray:
        """A deep image, loaded, as uint8 `[h, w]`."""
        return self.to_8_bits(_values(image), _declared(image) or _by_bits(image))

    def of_wide(self, image: Image.Image, wide: np.ndarray | None) -> Image.Image:
        """An image with bands of 16 bits (see `wide_rawmode`), whose values are `wide` unless they cannot be had."""
        limits = self.limits or _declared(image)
        if wide is not None and limits:
            return Image.fromarray(self.to_8_bits(wide, limits), image.mode)
        self.measure(np.asarray(image)[..., :3], (0, 255))  # the upper bytes
        return image

    def measure(self, array: np.ndarray, limits: Range) -> None:
        """Notes which part of the range an image's values are in."""
        finite = array[np.isfinite(array)] if array.dtype.kind == "f" else array
        if finite.size:
            low, high = limits
            self._range = limits
            first, last = ((float(value) - low) / (high - low) for value in (finite.min(), finite.max()))
            self.add((first, last))

    def add(self, seen: Range) -> None:
        """Adds the part of the range that other values are in."""
        self.seen = seen if self.seen is None else (min(self.seen[0], seen[0]), max(self.seen[1], seen[1]))

    @property
    def unused(self) -> str:
        """What to tell the user where most of a range that nobody gave is unused; else empty."""
        if self.limits is not None or self.seen is None or (used := self.seen[1] - self.seen[0]) > MOST_UNUSED:
            return ""
        low, high = self._range
        return (
            f"{self.name}: the values span {used:.2%} of the range {low:g} to {high:g}, and become as few of the "
            "256 levels: set config.data.value_range=LOW,HIGH to the range of the data"
        )


class RangeWatch:
    """How the images of the first batch with more than 8 bits use their range together, in one process."""

    def __init__(self) -> None:
        self._together: Scaling | None = None
        self._done = False

    def see(self, scaling: Scaling) -> None:
        if scaling.seen is None or self._done:
            return
        if self._together is None:
            self._together = scaling
        else:
            self._together.add(scaling.seen)

    def warning(self) -> str:
        """Asked after each batch: what to tell the user of the first one where most of the range is unused."""
        if self._done or self._together is None:
            return ""
        self._done = True
        return self._together.unused


def is_deep(image: Image.Image) -> bool:
    """Whether an image has one band of more than 8 bits."""
    return image.mode.startswith("I") or image.mode == "F"


def _values(image: Image.Image) -> np.ndarray:
    """The values of a deep image `[h, w]`; Pillow reads unsigned 32-bit integers as signed ones."""
    found = np.asarray(image)
    tags = getattr(image, "tag_v2", {})
    unsigned = _first(tags.get(BITS_PER_SAMPLE)) == 32 and _first(tags.get(SAMPLE_FORMAT)) != SIGNED
    return found.view(np.uint32) if unsigned and found.dtype == np.int32 else found


def _declared(image: Image.Image) -> Range | None:
    """SMinSampleValue and SMaxSampleValue of a TIFF, over its bands; None where they are missing or no range."""
    tags = getattr(image, "tag_v2", {})
    lows, highs = _numbers(tags.get(SMIN)), _numbers(tags.get(SMAX))
    low, high = min(lows, default=0.0), max(highs, default=-math.inf)
    return (low, high) if low < high else None


def _by_bits(image: Image.Image) -> Range:
    """The range of an image's bits per sample."""
    if image.mode == "F":
        return 0.0, 255.0
    tags = getattr(image, "tag_v2", {})
    bits = int(_first(tags.get(BITS_PER_SAMPLE)) or 16)
    if _first(tags.get(SAMPLE_FORMAT)) == SIGNED:
        return -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1
    return 0.0, 2.0**bits - 1


def _by_type(array: np.ndarray) -> Range:
    """The range of an array's type; 0 to 255 for floats."""
    if array.dtype.kind == "f":
        return 0.0, 255.0
    limits = np.iinfo(array.dtype)
    return float(limits.min), float(limits.max)


def scale(array: np.ndarray, limits: Range) -> np.ndarray:
    """Values to uint8, rounded; what is outside the range is clipped, and nan is its lower end."""
    low, high = limits
    scaled = np.floor((array.astype(np.float64) - low) * 255 / (high - low) + 0.5)
    return np.nan_to_num(np.clip(scaled, 0, 255), copy=False, nan=0.0).astype(np.uint8)


def wide_rawmode(image: Image.Image) -> str:
    """How the bands of an image that is not loaded yet are stored, where they have 16 bits each; else empty."""
    tiles = getattr(image, "tile", None) or [()]
    args = tiles[0][3] if len(tiles[0]) > 3 else ""
    rawmode = args if isinstance(args, str) else str(args[0]) if args else ""
    name, _, order = rawmode.partition(";16")
    return rawmode if name in _WIDE and order in _SWAPPED else ""


def wide_values(again: Any, loaded: Image.Image) -> np.ndarray:
    """The 16-bit values of an image with several bands, uint16 `[h, w, bands]`, from the image opened `again`.

    Pillow has `loaded` the upper byte of each. As if the bytes were stored in the other order, it loads the lower.
    """
    again.tile = [(*tile[:3], _swap(tile[3])) for tile in again.tile]
    again.load()
    return np.asarray(loaded).astype(np.uint16) * 256 + np.asarray(again)


def _swap(args: Any) -> Any:
    if isinstance(args, str):
        return args[:-1] + _SWAPPED[args[-1]]
    return (_swap(args[0]), *args[1:])


def _numbers(value: Any) -> list[float]:
    found = value if isinstance(value, tuple) else () if value is None else (value,)
    return [float(n) for n in found if isinstance(n, int | float) and math.isfinite(n)]


def _first(value: Any) -> float | None:
    return next(iter(_numbers(value)), None)
