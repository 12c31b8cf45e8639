"""RandAugment has timm's operations and distributions, and depends on its key only."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import numpy as np
import pytest
from pictures import POLICY, agree, picture
from PIL import Image, ImageFilter

from pcpvt.data import randaugment
from pcpvt.rng import generator


def test_operations_equal_timms(timm_posterize, theirs_seeded):
    """Each of timm's 15 operations with the same arguments; the faster versions may round differently."""
    image = picture(48, 40)
    policy = randaugment._policy(POLICY, 40, "bicubic", (124, 116, 104))
    assert len({op.name for op in policy.ops}) == 15
    for op in policy.ops:
        for i in range(40):
            arguments = randaugment._arguments(op, generator(0, op.name, i))
            ours = randaugment._apply(op, arguments, image, fast=True).astype(int)
            theirs = np.asarray(op.aug_fn(Image.fromarray(image), *arguments, **op.kwargs)).astype(int)
            if "Shear" in op.name or "Translate" in op.name:
                assert np.abs(ours - theirs).max() <= 1 and (ours != theirs).mean() < 0.03, op.name
            else:
                np.testing.assert_array_equal(ours, theirs, err_msg=op.name)


def test_three_augment_is_timms(theirs_seeded):
    """One of timm's three operations, equally often, with timm's arguments; the radius of the blur has timm's range."""
    image = picture(48, 40)
    grey, solarized = (np.asarray(op.aug_fn(Image.fromarray(image), *arguments)) for op, arguments in (
        (op, op.level_fn(op.magnitude, op.hparams)) for (op,) in _timms_three()[1::-1]))  # fmt: skip
    assert (grey[..., 0] == grey[..., 2]).all()
    found = {"grey": 0, "solarized": 0}
    blurred = []
    for i in range(300):
        rng = generator(0, "three", i)
        ours = randaugment.rand_augment(image, "3a", "bicubic", (124, 116, 104), rng)
        which = "grey" if (ours == grey).all() else "solarized" if (ours == solarized).all() else ""
        if which:
            found[which] += 1
        else:
            blurred.append(np.abs(ours.astype(int) - image).mean())
        again = randaugment.rand_augment(image, "3a", "bicubic", (124, 116, 104), generator(0, "three", i))
        assert (again == ours).all()
    assert all(70 < count < 130 for count in (*found.values(), len(blurred)))
    strongest = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(2.0))).astype(int)
    assert len(set(blurred)) > 60 and max(blurred) <= np.abs(strongest - image).mean()


def _timms_three():
    from timm.data.auto_augment import auto_augment_transform

    return auto_augment_transform("3a").policy


@pytest.mark.parametrize("factor", [-3.0, -0.31, -1e-9, 0.0, 0.02, 0.5, 2.5])
@pytest.mark.parametrize("shape", [(33, 20), (8, 1), (1, 9)])
def test_shifted_rows_equal_pillows_transform(factor, shape):
    image = picture(*shape)
    fill = (1, 200, 99)
    ours = randaugment.shift_rows(image, factor * (np.arange(shape[0]) + 0.5), fill).astype(int)
    theirs = Image.fromarray(image).transform(
        shape[::-1], Image.Transform.AFFINE, (1, factor, 0, 0, 1, 0), Image.Resampling.BICUBIC, fillcolor=fill
    )
    assert np.abs(ours - np.asarray(theirs)).max() <= 1


def test_magnitudes_and_choices_have_timms_distribution(monkeypatch, theirs_seeded):
    """The names and arguments of the operations that are called."""
    from timm.data.auto_augment import rand_augment_transform

    def recorded(transform, run, draws):
        calls = []
        for op in transform.ops:
            monkeypatch.setattr(op, "aug_fn", lambda img, *a, name=op.name, **_: calls.append((name, *a)) or img)
        for i in range(draws):
            run(i)
        return calls

    image = np.zeros((8, 8, 3), np.uint8)
    ours_transform = randaugment._policy(POLICY, 8, "bilinear", (124, 116, 104))
    ours = recorded(
        ours_transform,
        lambda i: randaugment.rand_augment(image, POLICY, "bilinear", (124, 116, 104), generator(0, "ra", i)),
        12_000,
    )
    transform = rand_augment_transform(POLICY, {"translate_const": 3, "img_mean": (124, 116, 104)})
    theirs = recorded(transform, lambda i: transform(Image.fromarray(image)), 12_000)
    names = {op.name for op in transform.ops}
    assert {name for name, *_ in ours} == {name for name, *_ in theirs} == names
    for name in names:
        a, b = ([call for call in calls if call[0] == name] for calls in (ours, theirs))
        # Each operation is drawn 12,000 * 2 * 0.5 / 15 = 800 times on each side, with a variance of 800.
        assert abs(len(a) - len(b)) < 4.5 * np.sqrt(1600), name
        if len(a[0]) > 1:
            bound = 1 if name.startswith("Posterize") else -np.inf
            assert agree([call[1] for call in a], [max(bound, call[1]) for call in b]), name
            assert min(call[1] for call in a) >= bound


def test_thousands_of_draws_raise_nothing():
    """timm asks for posterizing to 0 bits in 0.15 % of the draws, which is 7 of 5,000."""
    image = picture(16, 16)
    for i in range(5000):
        out = randaugment.rand_augment(image, POLICY, "bicubic", (124, 116, 104), generator(1, "ra", i))
        assert out.shape == image.shape and out.dtype == np.uint8


def test_weighted_choices_and_bilinear_work():
    out = [
        randaugment.rand_augment(
            picture(20, 20), "rand-m9-mstd101-n3-tweights", "bilinear", (0, 0, 0), generator(0, "w", i)
        )
        for i in range(50)
    ]
    assert len({o.tobytes() for o in out}) > 20


def test_rand_augment_imports_only_one_module_of_timm():
    script = (
        "import sys, numpy as np; from pcpvt.data.randaugment import rand_augment;"
        "image = np.zeros((8, 8, 3), np.uint8);"
        "rand_augment(image, 'rand-m9', 'bicubic', (0, 0, 0), np.random.default_rng(0));"
        "sys.exit('timm' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 0


def test_timm_is_imported_whole_if_its_module_cannot_be_loaded_alone(monkeypatch):
    alone = randaugment._timm()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    whole = randaugment._timm.__wrapped__()
    assert whole.__name__ == "timm.data.auto_augment" != alone.__name__
    assert whole._RAND_INCREASING_TRANSFORMS == alone._RAND_INCREASING_TRANSFORMS
