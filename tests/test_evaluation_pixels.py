"""The evaluation transform equals timm's and torchvision's, exactly or up to rounding, at square and other sizes."""

from __future__ import annotations

import numpy as np
import pytest
from pictures import picture, timm_transform
from PIL import Image

from pcpvt.data import augment
from pcpvt.data.decode import DecodeError
from pcpvt.rng import generator

SHAPES = [(100, 140), (140, 100), (99, 99), (37, 41), (61, 300), (256, 301), (20, 15)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "size, crop",
    [((56, 56), 0.875), ((32, 32), 1.0), ((64, 48), 0.875), ((48, 64), 0.9), ((224, 160), 0.875), ((9, 50), 1.0)],
)
def test_exact_evaluation_equals_timms_pixel_for_pixel(shape, size, crop):
    transform = timm_transform(input_size=(3, *size), is_training=False, crop_pct=crop)
    expected = transform(Image.fromarray(picture(*shape))).permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(augment.eval_sample(picture(*shape), size, crop, exact=True), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_evaluation_equals_timms_up_to_rounding(shape):
    """Pillow and PyTorch order the two passes differently, so they round and clip different intermediate values."""
    exact = augment.eval_sample(picture(*shape), (56, 56), 0.875, exact=True).astype(int)
    fast = augment.eval_sample(picture(*shape), (56, 56), 0.875).astype(int)
    difference = np.abs(exact - fast)
    # Measured: one of the 9,408 values of one shape by 2, at most 1.1 % of the others by 1.
    assert difference.max() <= 2 and (difference > 1).sum() <= 1 and difference.mean() < 0.02


def test_evaluation_at_another_aspect_ratio_keeps_the_images_proportions():
    got = augment.eval_sample(picture(100, 90), (64, 48), 0.875)  # 73 x 54 must be covered; 65.7 rounds to 66
    np.testing.assert_array_equal(got, augment.resize(picture(100, 90), (73, 66), "bicubic")[4:68, 9:57])


def test_a_crop_share_above_one_uses_the_whole_image():
    whole = augment.eval_sample(picture(100, 90), (64, 48), 1.0)
    np.testing.assert_array_equal(augment.eval_sample(picture(100, 90), (64, 48), 2.0), whole)


def test_elongated_images_are_refused_before_they_take_all_memory():
    """1 by 200,000 pixels: resized to a height of 256, the image would have 13 thousand million."""
    strip = np.zeros((1, 200_000, 3), np.uint8)
    with pytest.raises(DecodeError, match="limit"):
        augment.eval_sample(strip, (224, 224), 0.875)
    pixels, _ = augment.train_sample(strip, augment.AugmentSpec((224, 224)), generator(0, "x"))
    assert pixels.shape == (224, 224, 3)
