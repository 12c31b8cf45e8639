"""Image transforms on the host, uint8 to uint8; all random numbers come from the generator that is passed in.

Training: crop, flip, RandAugment, colour jitter, random erasing, in timm's order and with timm's distributions.
Evaluation: resize of the short side, centre crop.

Images are resized with PyTorch's antialiased uint8 kernel: 5 times as fast as Pillow's, with the same filters. Both
round between their two passes, and Pillow chooses the order of the passes by version and shape, so single pixels can
differ.
"""

import functools
import math
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance

from pcpvt.data.decode import ImageSource, Picture, check_pixels
from pcpvt.data.randaugment import at_share, rand_augment
from pcpvt.functional.mixing import NOISE_SCALE, NOISE_ZERO

GREY_FILL = 114  # ImageNet's mean luminance, where `AugmentSpec.fill` has its mean colour


class AugmentSpec(NamedTuple):
    """How a training sample is augmented."""

    size: tuple[int, int]  # (height, width) of the result
    # Area range of the random resized crop, as a fraction of the image; empty: resize the short side, crop the centre.
    scale: tuple[float, ...] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # range of width / height of the random resized crop
    crop_padding: int = 0  # if not 0: pad by this many pixels and crop at random, instead of the random resized crop
    padding_mode: Literal["constant", "reflect"] = "constant"  # constant: black
    hflip: float = 0.5  # probability of a horizontal flip
    interpolation: str = "bicubic"  # or `bilinear`
    randaugment: str = ""  # timm's notation; empty: none
    # Brightness, contrast and saturation vary by factors in 1 +- this; 0: none. timm omits it with RandAugment; here
    # both apply when both are set.
    color_jitter: float = 0.0
    erase_prob: float = 0.0  # probability of random erasing with noise
    by_size: bool = False  # `at_size` also scales RandAugment's magnitude and `erase_prob`
    fill: tuple[int, int, int] = (124, 116, 104)  # of pixels from outside, in RandAugment: ImageNet's mean, as in timm


def at_size(spec: AugmentSpec, size: tuple[int, int]) -> AugmentSpec:
    """The spec for images of another size; the padding before a random crop stays the same share of the height."""
    if size == spec.size:
        return spec
    share = size[0] / spec.size[0]
    if spec.by_size:
        weaker = at_share(spec.randaugment, share)
        spec = spec._replace(randaugment=weaker, erase_prob=share * spec.erase_prob)
    padding = round(share * spec.crop_padding)
    return spec._replace(size=size, crop_padding=max(padding, min(1, spec.crop_padding)))


def train_sample(
    source: ImageSource | Picture, spec: AugmentSpec, rng: np.random.Generator, name: str = ""
) -> tuple[np.ndarray, np.ndarray]:
    """An augmented training image.

    Args:
        source: a `decode.Picture`, or what one is made from.
        rng: the sample's own generator.
        name: the source's name in messages.

    Returns:
        uint8 `[height, width, 3]`, which may share memory with an array source, and the random-erasing box, int32
        (top, bottom, left, right), all 0 if nothing was erased. Inside it the image holds noise codes, see `erase`.

    Raises:
        DecodeError: the source cannot be read.
    """
    picture = source if isinstance(source, Picture) else Picture(source, name)
    if spec.crop_padding or not spec.scale:
        pixels = _resized_centre(picture, spec.size, spec.size, spec.interpolation)
    else:
        box = random_crop_box(picture.height, picture.width, spec.scale, spec.ratio, rng)
        pixels = resize(picture.crop(box, spec.size), spec.size, spec.interpolation)
    if spec.crop_padding:
        pixels = pad_and_crop(pixels, spec.crop_padding, spec.padding_mode, rng)
    if spec.hflip and rng.random() < spec.hflip:
        pixels = _tensor(pixels).flip(1).numpy()
    if spec.randaugment:
        grey = pixels.shape[-1] == 1  # as an RGB image of equal bands, which the operations keep equal
        rgb, fill = (np.repeat(pixels, 3, -1), (GREY_FILL,) * 3) if grey else (pixels, spec.fill)
        rgb = rand_augment(rgb, spec.randaugment, spec.interpolation, fill, rng)
        pixels = rgb[..., :1] if grey else rgb
    if spec.color_jitter:
        pixels = jitter_colors(pixels, spec.color_jitter, rng)
    if spec.erase_prob and rng.random() < spec.erase_prob:
        return erase(pixels, rng)
    return pixels, np.zeros(4, np.int32)


def eval_sample(
    source: ImageSource | Picture, size: tuple[int, int], crop: float, name: str = "", *, exact: bool = False
) -> np.ndarray:
    """An evaluation image: resized bicubically in proportion, the centre cropped; JPEGs are decoded at full scale.

    Args:
        source, name: a `decode.Picture`, or what one is made from.
        size: (height, width) of the result.
        crop: the share of the resized image's short side that the result takes, at most 1; if `size` is not square,
            the resized image covers (height, width) / crop. Rounded as in timm.
        exact: resize with Pillow, to exactly the pixels of timm's and torchvision's transforms; 2 times as slow
            overall. Without it, on photographs, 0.3 % of the values differ, by one level and rarely two.

    Returns:
        uint8 `[height, width, 3]`, which may share memory with an array source.

    Raises:
        DecodeError: the source cannot be read, or is so elongated that it would exceed `MAX_PIXELS` when resized.
    """
    cover = max(size[0], int(size[0] / crop)), max(size[1], int(size[1] / crop))
    picture = source if isinstance(source, Picture) else Picture(source, name)
    return _resized_centre(picture, size, cover, "bicubic", exact)


def _resized_centre(
    picture: Picture, size: tuple[int, int], cover: tuple[int, int], interpolation: str, exact: bool = False
) -> np.ndarray:
    """The centre `size` of the picture, after resizing it in proportion so that it just covers `cover`."""
    height, width = picture.height, picture.width
    if cover[0] == cover[1]:  # torchvision's Resize, which rounds the longer side down
        short = min(height, width)
        resized = cover[0] * height // short, cover[0] * width // short
    else:  # timm's ResizeKeepRatio, which rounds it to the nearest
        ratio = min(height / cover[0], width / cover[1])
        resized = round(height / ratio), round(width / ratio)
    check_pixels(*resized, picture.name)
    pixels = resize(picture.crop(), resized, interpolation, exact)
    # Halves are rounded to even, as in torchvision.
    top, left = (round((n - m) / 2) for n, m in zip(resized, size, strict=True))
    return pixels[top : top + size[0], left : left + size[1]]


def resize(pixels: np.ndarray, size: tuple[int, int], interpolation: str, exact: bool = False) -> np.ndarray:
    """uint8 `[h, w, 3]` to uint8 `[height, width, 3]`, antialiased; `exact` as in `eval_sample`."""
    if pixels.shape[:2] == size:
        return pixels
    if exact:
        bands = np.split(pixels, pixels.shape[-1], -1) if pixels.shape[-1] != 3 else [pixels]
        how = Image.Resampling[interpolation.upper()]
        resized = [np.asarray(Image.fromarray(band.squeeze()).resize(size[::-1], how)) for band in bands]
        return resized[0] if len(resized) == 1 and pixels.shape[-1] == 3 else np.stack(resized, -1)
    # Contiguous and with a batch axis: otherwise PyTorch takes the layout for planar and is half as fast.
    channels_last = _tensor(pixels)[None].permute(0, 3, 1, 2)
    out = F.interpolate(channels_last, size, mode=interpolation, antialias=True)
    return np.ascontiguousarray(out.permute(0, 2, 3, 1)[0].numpy())


def random_crop_box(
    height: int, width: int, scale: tuple[float, ...], ratio: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """(top, left, height, width) as in torchvision's RandomResizedCrop: ten attempts, then a central crop."""
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area = height * width * rng.uniform(scale[0], scale[1])
        aspect = math.exp(rng.uniform(low, high))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1)), h, w
    w, h = width, height
    if width < ratio[0] * height:
        h = max(1, round(width / ratio[0]))
    elif width > ratio[1] * height:
        w = max(1, round(height * ratio[1]))
    return (height - h) // 2, (width - w) // 2, h, w


def pad_and_crop(
    pixels: np.ndarray, padding: int, mode: Literal["constant", "reflect"], rng: np.random.Generator
) -> np.ndarray:
    """Pads all sides and crops a window of the original size at a uniformly drawn position."""
    height, width = pixels.shape[:2]
    top, left = (int(n) for n in rng.integers(0, 2 * padding + 1, 2))
    padded = np.pad(pixels, ((padding, padding), (padding, padding), (0, 0)), mode=mode)
    return padded[top : top + height, left : left + width]


def jitter_colors(pixels: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """torchvision's ColorJitter: brightness, contrast, saturation, in random order, each by U(1 - s, 1 + s)."""
    grey = pixels.shape[-1] == 1
    image = Image.fromarray(np.repeat(pixels, 3, -1) if grey else pixels)
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for i in rng.permutation(3):
        image = enhancers[i](image).enhance(rng.uniform(max(0.0, 1 - strength), 1 + strength))
    return np.asarray(image)[..., :1] if grey else np.asarray(image)


def erase_box(height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) as in timm's RandomErasing: 2 % to a third of the area, aspect 0.3 to 1/0.3."""
    for _ in range(10):
        area = height * width * rng.uniform(0.02, 1 / 3)
        aspect = math.exp(rng.uniform(math.log(0.3), -math.log(0.3)))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h < height and w < width:
            top, left = int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1))
            return top, top + h, left, left + w
    return 0, 0, 0, 0


def erase(pixels: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Random erasing with noise: N(0, 1) per pixel and channel of the *normalised* image, as in timm's mode `pixel`.

    The image is normalised later, on the device, so the noise is written as 8-bit codes, in steps of 1/32 from -4 to
    3.97, which `functional.mixing.decode_images` decodes.

    Returns:
        A copy of the pixels with the codes, and the box, int32 (top, bottom, left, right).
    """
    top, bottom, left, right = erase_box(pixels.shape[0], pixels.shape[1], rng)
    draws = rng.integers(0, 1 << 16, (bottom - top, right - left, pixels.shape[-1]), np.uint16)
    out = pixels.copy()
    out[top:bottom, left:right] = _noise_codes()[draws]
    return out, np.array((top, bottom, left, right), np.int32)


@functools.cache
def _noise_codes() -> np.ndarray:
    """65,536 equally likely codes: a table is 5 times as fast as rounding normal draws to 8 bits."""
    edges = [(code - 0.5 - NOISE_ZERO) / NOISE_SCALE for code in range(1, 256)]
    cumulative = [0.0, *(0.5 + 0.5 * math.erf(edge / math.sqrt(2)) for edge in edges), 1.0]
    counts = np.diff(np.rint(np.array(cumulative) * (1 << 16)).astype(np.int64))
    return np.repeat(np.arange(256, dtype=np.uint8), counts)


def _tensor(pixels: np.ndarray) -> torch.Tensor:
    """A tensor to read from. PyTorch warns about read-only arrays and takes no negative strides: those are copied."""
    if not pixels.flags.writeable or not pixels.flags.c_contiguous:
        pixels = pixels.copy()
    return torch.from_numpy(pixels)
