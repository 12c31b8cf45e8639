"""Channels of images: the pages of a TIFF, NumPy files, and what becomes of other numbers than the model takes."""

import io
from collections.abc import Iterator

import numpy as np
from PIL import Image

NUMPY = b"\x93NUMPY"  # what such a file begins with


def pages(image: Image.Image) -> int:
    """The number of pages that are the bands of an image; 1 unless it is a TIFF of several pages."""
    return getattr(image, "n_frames", 1) if image.format == "TIFF" else 1


def each(image: Image.Image, count: int) -> Iterator[Image.Image]:
    """The pages one by one; ValueError for a page with several bands."""
    for page in range(count):
        image.seek(page)
        if len(image.getbands()) != 1 or image.mode == "P":
            raise ValueError(f"page {page + 1} of {count} has the bands {', '.join(image.getbands())} and not one")
        yield image


def fit(pixels: np.ndarray, channels: int) -> np.ndarray:
    """uint8 `[h, w(, bands)]` as `[h, w, channels]`: luminance of RGB for one channel, grey three times for RGB.

    Raises:
        ValueError: there are other bands.
    """
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    found = pixels.shape[-1] if pixels.ndim == 3 else 0
    if found == channels:
        return pixels
    if (found, channels) == (3, 1):
        return np.asarray(Image.fromarray(pixels).convert("L"))[..., None]
    if (found, channels) == (1, 3):
        return np.repeat(pixels, 3, -1)
    raise ValueError(f"shape {pixels.shape}, and config.model.in_chans is {channels}")


def shown(pixels: np.ndarray) -> np.ndarray:
    """uint8 `[h, w, channels]` as RGB to look at: RGB as it is, else the first channel in grey."""
    return pixels if pixels.shape[-1] == 3 else np.repeat(pixels[..., :1], 3, -1)


def parse(data: bytes) -> np.ndarray:
    """The array `[h, w]` or `[h, w, bands]` of numbers in a `.npy` file; nothing in it is ever run.

    Raises:
        ValueError: it holds other things, or less data than its header says.
    """
    file = io.BytesIO(data)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(file)
    if version not in read_header:
        raise ValueError(f"version {version} of the format")
    shape, by_columns, dtype = read_header[version](file)
    if len(shape) not in (2, 3) or 0 in shape or dtype.kind not in "uif":
        raise ValueError(f"an array {shape} of {dtype}, not numbers [height, width(, channels)]")
    array = np.frombuffer(data, dtype, offset=file.tell())[: int(np.prod(shape, dtype=object))]
    return array.reshape(shape, order="F" if by_columns else "C")
