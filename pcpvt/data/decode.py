"""Decoding of images of any format to upright 8-bit RGB, or other channels; a `DecodeError` names the file.

Conversion to RGB:
- alpha and palette transparency are dropped, not composited, as in timm and torchvision;
- more than 8 bits are scaled to 8 (see `depth`; Pillow's own conversion clips nearly everything to white);
- EXIF orientation is applied; timm and torchvision ignore it, so rotated photographs differ from theirs;
- of an animation the first frame is used.

One channel is the luminance of that RGB. Other numbers are bands as they are stored: those of RGBA and CMYK images, the
pages of a TIFF, the last axis of a NumPy file.

Only the header is read until pixels are requested, so that a JPEG can be decoded at the scale its crop needs. With
simplejpeg (installed where it has wheels), full-scale JPEGs decode 1.2 times as fast, to the same pixels.
"""

import contextlib
import errno
import io
import os
import re
import stat
import warnings
from collections.abc import Iterator
from typing import IO, NamedTuple, TypeAlias

import numpy as np
from PIL import Image, UnidentifiedImageError, features
from PIL.JpegImagePlugin import JpegImageFile

from pcpvt.errors import UserError
from pcpvt.images import bands, depth

try:
    import simplejpeg
except ImportError:  # optional, for speed only
    simplejpeg = None
try:
    import pillow_heif
except ImportError:  # the extra `heic`
    pillow_heif = None
else:
    pillow_heif.register_heif_opener()

# What Pillow may decode: some of its other decoders run a program (EPS: Ghostscript) or are rarely tested.
FORMATS = ["BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP"]
FORMATS += ["AVIF"] * ("avif" in features.get_supported_modules()) + ["HEIF"] * (pillow_heif is not None)
MAX_PIXELS = 89_478_485  # 256 MiB of RGB; for larger images Pillow warns of a decompression bomb
LIMITS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
MAX_BYTES = 1 << 30  # of a file; more than MAX_PIXELS take in any format

_ORIENTATION = 0x0112  # EXIF tag; 1 is upright
_TURNS = {  # orientation to the operation that turns the stored image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

ImageSource: TypeAlias = str | os.PathLike[str] | bytes | IO[bytes] | Image.Image | np.ndarray


class DecodeError(UserError):
    """An image that cannot be read; `config.data.on_error` says how to go on."""


class Reading(NamedTuple):
    """How an image becomes 8-bit channels."""

    channels: int = 3  # `config.model.in_chans`
    value_range: depth.Range | None = None  # `config.data.value_range`; None: as the file says


RGB = Reading()


class Picture:
    """An image whose size is known and whose pixels are decoded on demand.

    Args:
        source: a path, encoded bytes, an open binary file, a PIL image, or an array `[height, width(, bands)]`.
        name: its name in messages; by default the path, or the name of the open file.
        reading: how it becomes uint8 `[height, width, channels]`.

    Attributes:
        height, width: of the upright full-size image, in pixels.
        depth: how values of more than 8 bits have been scaled.

    Raises:
        DecodeError: the image is unreadable, has other channels, or has more than `MAX_PIXELS` pixels.
    """

    def __init__(self, source: ImageSource, name: str = "", reading: Reading = RGB):
        self.name, self.reading = name or _name(source), reading
        self.depth = depth.Scaling(self.name, reading.value_range)
        self._jpeg: JpegImageFile | None = None
        self._loaded = False
        self._data = b""
        with decode_errors(self.name):
            if isinstance(source, np.ndarray):
                self._pixels = self._fit(self.depth.to_8_bits(source))
            else:
                self._open(source)
        if self._jpeg is None:
            self.height, self.width = self._pixels.shape[:2]

    def _open(self, source: str | os.PathLike[str] | bytes | IO[bytes] | Image.Image) -> None:
        if isinstance(source, Image.Image):
            image = source
        else:
            self._data = _read(source)
            if self._data.startswith(bands.NUMPY):
                array = bands.parse(self._data)
                check_pixels(array.size, 1, self.name)
                self._pixels = self._fit(self.depth.to_8_bits(array))
                return
            image = open_image(self._data)
        width, height = image.size
        channels = self.reading.channels
        pages = bands.pages(image) if channels not in (1, 3) else 1
        check_pixels(height * pages, width, self.name)
        if not self._data or not isinstance(image, JpegImageFile) or channels not in (1, 3):
            if pages > 1:
                layers = [self._band(page) for page in bands.each(image, pages)]
                self._pixels = self._fit(np.stack(layers, -1))
                return
            self._pixels = self._fit(self._load(image))
            return
        self._jpeg = image
        self._orientation = _orientation(image)
        self.height, self.width = (width, height) if self._orientation >= 5 else (height, width)

    def _load(self, image: Image.Image) -> np.ndarray:
        """The upright pixels of an image, uint8 `[h, w, bands]`: RGB, or other bands where those are read."""
        rawmode = depth.wide_rawmode(image)
        # Pillow turns some formats (TIFF) upright while loading, so the orientation is read afterwards.
        image.load()
        turn, rgb = _TURNS.get(_orientation(image)), self.reading.channels in (1, 3)
        if depth.is_deep(image):
            image = Image.fromarray(self.depth.of_image(image))
        elif rawmode:
            wide = depth.wide_values(open_image(self._data), image) if self._data else None
            image = self.depth.of_wide(image, wide)
        upright = image if turn is None else image.transpose(turn)
        pixels = np.asarray(to_rgb(upright) if rgb else upright)
        return pixels[..., None] if pixels.ndim == 2 else pixels

    def _fit(self, pixels: np.ndarray) -> np.ndarray:
        return bands.fit(pixels, self.reading.channels)

    def _band(self, page: Image.Image) -> np.ndarray:
        """The pixels of a page with one band, uint8 `[h, w]`."""
        page.load()
        return self.depth.of_image(page) if depth.is_deep(page) else np.asarray(page.convert("L"))

    def crop(self, box: tuple[int, int, int, int] | None = None, at_least: tuple[int, int] | None = None) -> np.ndarray:
        """The pixels of a box, uint8 `[h, w, channels]`; they may share memory with the source: do not write to them.

        Args:
            box: (top, left, height, width) in full-size upright pixels; by default the whole image.
            at_least: (height, width) that the caller will reduce the box to. A JPEG may then be decoded at 1/2, 1/4 or
                1/8 scale, as long as the box keeps at least that many pixels. By default at full scale.

        Raises:
            DecodeError: the data are truncated or corrupt.
        """
        top, left, height, width = box or (0, 0, self.height, self.width)
        assert top >= 0 and left >= 0 and top + height <= self.height and left + width <= self.width, box
        if self._jpeg is None:
            return self._pixels[top : top + height, left : left + width]
        factor = scale_factor((height, width), at_least) if at_least else 1
        with decode_errors(self.name):
            # Crop before turning: of a side that the factor does not divide, the excess is at the end as stored.
            pixels = self._decode(self._stored_box((left, top, left + width, top + height)), factor)
            if self._orientation != 1:
                pixels = np.asarray(Image.fromarray(pixels).transpose(_TURNS[self._orientation]))
            return self._fit(pixels)

    def _stored_box(self, box: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
        """A box (left, top, right, bottom) of the upright image, in coordinates of the stored image."""
        left, top, right, bottom = box
        if self._orientation in (2, 3, 6, 7):
            left, right = self.width - right, self.width - left
        if self._orientation in (3, 4, 7, 8):
            top, bottom = self.height - bottom, self.height - top
        return (top, left, bottom, right) if self._orientation >= 5 else (left, top, right, bottom)

    def _decode(self, box: tuple[int, int, int, int], factor: int) -> np.ndarray:
        """A box (left, top, right, bottom) of the stored image, at 1 / factor of its scale."""
        assert self._jpeg is not None
        if simplejpeg and factor == 1 and self._jpeg.mode == "RGB":
            with contextlib.suppress(ValueError):  # it rejects minor defects that Pillow accepts: Pillow decides
                return simplejpeg.decode_jpeg(self._data)[box[1] : box[3], box[0] : box[2]]
        image: Image.Image = self._jpeg
        if self._loaded:  # an earlier crop may have had another scale
            image = open_image(self._data)
        self._loaded = True
        if factor > 1:
            image.draft("RGB", (image.width // factor, image.height // factor))
        image.load()
        # A reduced pixel covers factor x factor full-size ones: the box's edges move by at most half a reduced pixel.
        left, top, right, bottom = (round(edge / factor) for edge in box)
        image = image.crop((left, top, min(right, image.width), min(bottom, image.height)))
        return np.asarray(to_rgb(image))


def scale_factor(box: tuple[int, int], at_least: tuple[int, int]) -> int:
    """The largest of 8, 4, 2 and 1 by which a JPEG can be reduced so that a box (height, width) keeps `at_least`.

    With no pixel to spare, the image after bicubic reduction differs from the full-scale one by 33 dB, 3.4 levels of
    255 on average, while mean and contrast agree to 0.1 %: good for training, too coarse for evaluation.
    """
    for factor in (8, 4, 2):
        if box[0] >= factor * at_least[0] and box[1] >= factor * at_least[1]:
            return factor
    return 1


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of 8 bits in mode RGB, converted as the module docstring says."""
    mode = image.mode
    if mode == "RGB":
        return image
    if mode == "La":
        image = image.convert("LA")
    elif mode in ("PA", "RGBa") or (mode == "P" and "transparency" in image.info):
        image = image.convert("RGBA")  # directly to RGB, Pillow warns about the transparency it ignores
    return image.convert("RGB")


def open_image(data: bytes) -> Image.Image:
    """An image in one of the FORMATS, of which only the header is read; raises an error of Pillow."""
    return Image.open(io.BytesIO(data), formats=FORMATS)


def _orientation(image: Image.Image) -> int:
    """A key of `_TURNS`, or 1 for an upright image, also if its EXIF data are broken."""
    with contextlib.suppress(Exception):  # Pillow raises SyntaxError, struct.error, ...
        tag = image.getexif().get(_ORIENTATION)
        return tag if tag in _TURNS else 1
    return 1


def check_pixels(height: int, width: int, name: str) -> None:
    """Raises DecodeError for an image, or a resized image, of more than `MAX_PIXELS`."""
    if height * width > MAX_PIXELS:
        raise DecodeError(f"{name}: {width} x {height} pixels are over the limit of {MAX_PIXELS}: scale it down")


def _read(source: str | os.PathLike[str] | bytes | IO[bytes]) -> bytes:
    """All bytes of an encoded image; raises OSError for more than `MAX_BYTES` or a path that is no regular file."""
    if isinstance(source, bytes):
        return source
    if isinstance(source, (str, os.PathLike)):
        if not stat.S_ISREG(os.stat(source).st_mode):  # reading a pipe would wait, and a device has no end
            raise OSError("not a regular file")
        with open(source, "rb") as file:
            return _read(file)
    data = source.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise OSError(f"larger than the limit of {MAX_BYTES} bytes")
    return data


def _name(source: ImageSource) -> str:
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source)
    if isinstance(source, bytes):
        return f"<image of {len(source)} bytes>"
    return str(getattr(source, "filename", "") or getattr(source, "name", "") or f"<{type(source).__name__}>")


@contextlib.contextmanager
def decode_errors(name: str) -> Iterator[None]:
    """Turns any exception of a decoder (OSError, SyntaxError, struct.error, ...) into a DecodeError with a name.

    Decoders' warnings are suppressed: they name no file, and serious defects are errors. An error that says nothing
    about the image, because the system is out of memory or open files, passes: skipping the image would change results.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (DecodeError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in LIMITS:
            raise
        if isinstance(error, UnidentifiedImageError):
            reason = f"in none of the formats {', '.join(FORMATS)}"
        else:
            what = re.sub(r"<[^<>]* (?:object at 0x|name=)[^<>]*>", "the file", str(error))  # an open file's repr
            reason = " ".join(f"{type(error).__name__}: {what}".split())[:200]
        message = f"{name}: cannot be read as an image ({reason}): replace or remove the file"
        raise DecodeError(message) from error
