"""Training transforms have the distributions of timm's and torchvision's, and depend on their key only."""

from __future__ import annotations

import io
import pickle
import random

import numpy as np
import pytest
import torch
from pictures import MEAN, POLICY, STD, agree, picture, timm_transform
from PIL import Image

from pcpvt.data import augment
from pcpvt.data.decode import DecodeError, Picture
from pcpvt.functional.mixing import decode_images
from pcpvt.rng import generator

# ---- random resized crop, flip, padding ----


@pytest.mark.parametrize("shape", [(60, 80), (90, 40)])
def test_crop_boxes_have_torchvisions_distribution(shape, theirs_seeded):
    from torchvision.transforms import RandomResizedCrop

    image, scale, ratio = torch.empty(3, *shape), (0.08, 1.0), (3 / 4, 4 / 3)
    theirs = [RandomResizedCrop.get_params(image, scale, ratio) for _ in range(4000)]
    ours = [augment.random_crop_box(*shape, scale, ratio, generator(0, "crop", i)) for i in range(4000)]

    def statistics(boxes):
        top, left, h, w = np.array(boxes, float).T
        return np.stack([top, left, h, w, h * w, np.log(w / h), top + h == shape[0], left == 0], axis=1)

    assert agree(statistics(ours), statistics(theirs))


@pytest.mark.parametrize("shape", [(10, 400), (400, 10), (30, 30), (1, 50), (1, 1)])
def test_impossible_crops_fall_back_as_in_torchvision(shape):
    from torchvision.transforms import RandomResizedCrop

    scale, ratio = (4.0, 5.0), (3 / 4, 4 / 3)  # never fits
    expected = RandomResizedCrop.get_params(torch.empty(3, *shape), scale, ratio)
    assert augment.random_crop_box(*shape, scale, ratio, generator(0, "crop")) == expected


@pytest.mark.parametrize(("shape", "ratio"), [((1, 10), (0.1, 0.3)), ((10, 1), (3.0, 9.0))])
def test_a_crop_has_at_least_one_pixel(shape, ratio):
    """torchvision's fallback would have none: its width or height would be 0.3 pixels."""
    assert augment.random_crop_box(*shape, (4.0, 5.0), ratio, generator(0, "crop"))[2:] == (1, 1)
    spec = augment.AugmentSpec((8, 8), scale=(4.0, 5.0), ratio=ratio)
    assert augment.train_sample(picture(*shape), spec, generator(0, "crop"))[0].shape == (8, 8, 3)


def test_flips_are_exact_and_have_the_given_probability():
    image = picture(12, 10)
    spec = augment.AugmentSpec((12, 10), scale=(), hflip=0.3)
    flipped = 0
    for i in range(2000):
        pixels, _ = augment.train_sample(image, spec, generator(0, "flip", i))
        flipped += np.array_equal(pixels, image[:, ::-1])
        assert np.array_equal(pixels, image) or np.array_equal(pixels, image[:, ::-1])
    assert abs(flipped / 2000 - 0.3) < 4.5 * np.sqrt(0.3 * 0.7 / 2000)


@pytest.mark.parametrize("mode", ["constant", "reflect"])
def test_pad_and_crop_visits_every_offset_equally(mode):
    image, p = picture(9, 8), 2
    padded = np.pad(image, ((p, p), (p, p), (0, 0)), mode=mode)
    windows = {padded[t : t + 9, x : x + 8].tobytes(): 0 for t in range(2 * p + 1) for x in range(2 * p + 1)}
    spec = augment.AugmentSpec((9, 8), crop_padding=p, padding_mode=mode, hflip=0.0)
    for i in range(5000):
        pixels, _ = augment.train_sample(image, spec, generator(0, "pad", i))
        windows[pixels.tobytes()] += 1  # KeyError: a window that does not exist
    assert abs(np.array(list(windows.values())) / 5000 - 1 / 25).max() < 4.5 * np.sqrt(1 / 25 / 5000)


def test_a_sample_that_needs_no_transform_is_not_copied():
    image = picture(32, 32)
    spec = augment.AugmentSpec((32, 32), scale=(), hflip=0.0)
    pixels, box = augment.train_sample(image, spec, generator(0, "x"))
    assert np.shares_memory(pixels, image) and not box.any()
    assert np.shares_memory(augment.eval_sample(image, (32, 32), 1.0), image)


def test_without_a_random_crop_the_image_is_resized_to_cover_the_size_and_centre_cropped():
    spec = augment.AugmentSpec((24, 16), scale=(), hflip=0.0)
    pixels, _ = augment.train_sample(picture(60, 90), spec, generator(0, "x"))
    np.testing.assert_array_equal(pixels, augment.resize(picture(60, 90), (24, 36), "bicubic")[:, 10:26])


# ---- colour jitter, random erasing ----


def test_color_jitter_has_torchvisions_distribution(theirs_seeded):
    from torchvision.transforms import ColorJitter

    image = picture(10, 10)
    jitter = ColorJitter(0.4, 0.4, 0.4)
    ours = [augment.jitter_colors(image, 0.4, generator(0, "jitter", i)) for i in range(3000)]
    theirs = [np.asarray(jitter(Image.fromarray(image))) for _ in range(3000)]

    def statistics(images):
        x = np.stack(images).astype(float)
        return np.concatenate([x.mean((1, 2)), x.std((1, 2)), x.mean(3).std((1, 2))[:, None]], axis=1)

    assert agree(statistics(ours), statistics(theirs))


def test_color_jitter_is_applied_in_every_order(monkeypatch):
    orders, order = set(), []
    for name in ("Brightness", "Contrast", "Color"):
        original = getattr(augment.ImageEnhance, name)
        monkeypatch.setattr(
            augment.ImageEnhance,
            name,
            lambda image, name=name, original=original: order.append(name) or original(image),
        )
    for i in range(100):
        augment.jitter_colors(picture(4, 4), 0.4, generator(0, "order", i))
        orders.add(tuple(order))
        order.clear()
    assert len(orders) == 6 and all(len(set(names)) == 3 for names in orders)


def test_erasing_has_timms_distribution(theirs_seeded):
    from timm.data.random_erasing import RandomErasing

    height, width = 28, 36
    erasing = RandomErasing(0.8, mode="pixel", device="cpu")
    spec = augment.AugmentSpec((height, width), scale=(), hflip=0.0, erase_prob=0.8)
    image = picture(height, width)
    ours, theirs, noise, their_noise = [], [], [], []
    for i in range(6000):
        pixels, (top, bottom, left, right) = augment.train_sample(image, spec, generator(0, "erase", i))
        inside = np.zeros((height, width), bool)
        inside[top:bottom, left:right] = True
        assert np.array_equal(pixels[~inside], image[~inside])
        ours.append((top, bottom, left, right, (bottom - top) * (right - left), bottom > top))
        if bottom > top:
            box = torch.tensor([[top, bottom, left, right]], dtype=torch.int32)
            decoded = decode_images(torch.from_numpy(pixels[None].copy()), box, MEAN, STD)[0].numpy()
            noise.append(decoded[inside].ravel())

        erased = erasing(torch.zeros(3, height, width))
        rows, columns = (erased[0] != 0).any(1).nonzero().ravel(), (erased[0] != 0).any(0).nonzero().ravel()
        if len(rows):
            bounds = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
            theirs.append((*bounds, (bounds[1] - bounds[0]) * (bounds[3] - bounds[2]), True))
            their_noise.append(erased[erased != 0].numpy())
        else:
            theirs.append((0, 0, 0, 0, 0, False))
    assert agree(ours, theirs)

    def aspects(rows):
        return [np.log((bottom - top) / (right - left)) for top, bottom, left, right, _, erased in rows if erased]

    assert agree(aspects(ours), aspects(theirs))
    ours, theirs = np.concatenate(noise), np.concatenate(their_noise)
    # Millions of normal numbers, in steps of 1/32 (which adds 1/32**2/12 = 8e-5 to the variance) and clipped at 4.
    assert abs(ours.mean()) < 4.5 / np.sqrt(len(ours)) + 1e-4
    assert abs(ours.var() - 1) < 4.5 * np.sqrt(2 / len(ours)) + 1e-3
    for quantile in (0.001, 0.05, 0.5, 0.95, 0.999):
        assert abs(np.quantile(ours, quantile) - np.quantile(theirs, quantile)) < 1 / 32 + 0.02


# ---- the whole training transform ----


@pytest.mark.parametrize(
    "options",
    [
        {"auto_augment": POLICY, "color_jitter": None},
        pytest.param({"color_jitter": 0.3, "scale": (0.35, 1.0), "ratio": (0.9, 1.1)}, marks=pytest.mark.slow),
    ],
)
def test_training_images_have_the_statistics_of_timms_transform(options, timm_posterize, theirs_seeded):
    """For three fixed images, 1,500 draws each: brightness, contrast and colour, overall and by quarter."""
    spec = augment.AugmentSpec(
        (24, 24),
        options.get("scale", (0.08, 1.0)),
        options.get("ratio", (3 / 4, 4 / 3)),
        randaugment=options.get("auto_augment", ""),
        color_jitter=options["color_jitter"] or 0.0,
    )
    transform = timm_transform(input_size=24, is_training=True, **options)

    def statistics(x):
        x = np.stack(x).astype(float)
        quarters = x.reshape(len(x), 2, 12, 2, 12, 3).mean((2, 4, 5)).reshape(len(x), 4)
        edges = np.abs(np.diff(x, axis=2)).mean((1, 2, 3))[:, None]
        return np.concatenate([x.mean((1, 2)), x.std((1, 2)), quarters, edges, (x == 0).mean((1, 2, 3))[:, None]], 1)

    for seed, shape in enumerate([(40, 52), (60, 33), (24, 24)]):
        image = picture(*shape, seed)
        pil = Image.fromarray(image)
        ours = [augment.train_sample(image, spec, generator(seed, "all", i))[0] for i in range(1500)]
        theirs = [transform(pil).permute(1, 2, 0).numpy() for _ in range(1500)]
        assert agree(statistics(ours), statistics(theirs))


def test_crops_of_large_jpegs_have_the_same_statistics_at_reduced_scale(monkeypatch):
    """The same crops, decoded at reduced and at full scale: mean within 0.5 of 255, contrast within 2 %."""
    buffer = io.BytesIO()
    Image.fromarray(picture(400, 500)).save(buffer, "JPEG", quality=90)
    spec = augment.AugmentSpec((32, 32), scale=(0.3, 1.0), hflip=0.0)

    def samples():
        return np.stack([augment.train_sample(buffer.getvalue(), spec, generator(0, "c", i))[0] for i in range(60)])

    reduced = samples().astype(float)
    original = Picture.crop
    monkeypatch.setattr(Picture, "crop", lambda self, box=None, at_least=None: original(self, box))
    full = samples().astype(float)
    assert not np.array_equal(reduced, full)
    assert np.abs(reduced - full).mean() < 4
    assert np.abs(reduced.mean((0, 1, 2)) - full.mean((0, 1, 2))).max() < 0.5
    assert abs(reduced.std() / full.std() - 1) < 0.02


def test_samples_depend_on_their_key_only():
    spec = augment.AugmentSpec((24, 24), randaugment=POLICY, color_jitter=0.2, erase_prob=0.5)
    image = picture(40, 30)
    first = [augment.train_sample(image, spec, generator(0, "key", i)) for i in range(30)]
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    for i in reversed(range(30)):
        pixels, box = augment.train_sample(image, spec, generator(0, "key", i))
        assert np.array_equal(pixels, first[i][0]) and np.array_equal(box, first[i][1])
    assert random.getstate() == before[0]
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert torch.equal(torch.get_rng_state(), before[2])
    assert len({pixels.tobytes() for pixels, _ in first}) == 30


def test_the_source_is_never_written_to():
    image = picture(24, 24).copy()
    image.flags.writeable = False  # any write would raise
    for options in ({"erase_prob": 1.0}, {"randaugment": POLICY}, {"crop_padding": 2}, {"color_jitter": 0.3}):
        for i in range(20):
            augment.train_sample(image, augment.AugmentSpec((24, 24), **options), generator(0, "w", i))


def test_a_spec_survives_pickling():
    spec = augment.AugmentSpec((24, 16), randaugment=POLICY)
    assert pickle.loads(pickle.dumps(spec)) == spec


def test_a_corrupt_source_raises_a_decode_error(tmp_path):
    path = tmp_path / "bad.jpg"
    path.write_bytes(b"\xff\xd8nothing")
    for read in (
        lambda: augment.train_sample(path, augment.AugmentSpec((8, 8)), generator(0, "x")),
        lambda: augment.eval_sample(path, (8, 8), 0.875),
    ):
        with pytest.raises(DecodeError, match=r"bad\.jpg"):
            read()
