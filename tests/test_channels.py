"""Grey images and other channels than RGB: reading, augmentation, adapted weights, and the modes from end to end."""

from __future__ import annotations

import io

import miniature
import numpy as np
import pytest
import torch
from pictures import picture
from PIL import Image

from pcpvt import api, rng
from pcpvt.checkpoints import foreign
from pcpvt.checkpoints.channels import FIRST, adapt_channels
from pcpvt.checkpoints.load import load_model
from pcpvt.data import augment
from pcpvt.data.decode import DecodeError, Picture, Reading
from pcpvt.errors import UserError
from pcpvt.functional.objective import IMAGENET_MEAN, IMAGENET_STD, normalisation
from pcpvt.models import pcpvt
from pcpvt.models.init import init


def pixels(source, channels: int, **options) -> np.ndarray:
    return Picture(source, "x", Reading(channels, **options)).crop()


def encoded(image: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def saved(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def test_one_channel_is_the_luminance_of_any_image():
    colour = Image.fromarray(picture(40, 60))
    grey = np.asarray(colour.convert("L"))
    exif = Image.Exif()
    exif[0x0112] = 6
    for source in (colour, encoded(colour, "PNG"), np.asarray(colour), encoded(colour.convert("RGBA"), "PNG")):
        assert (pixels(source, 1) == grey[..., None]).all()
    for source in (Image.fromarray(grey), encoded(Image.fromarray(grey), "PNG"), grey, saved(grey)):
        assert (pixels(source, 1) == grey[..., None]).all()
        assert (pixels(source, 3) == grey[..., None]).all() and pixels(source, 3).shape == (40, 60, 3)
    jpeg = encoded(colour, "JPEG", exif=exif)
    assert pixels(jpeg, 1).shape == (60, 40, 1)
    expected = np.asarray(Image.fromarray(pixels(jpeg, 3)).convert("L"))
    assert (pixels(jpeg, 1)[..., 0] == expected).all()


def test_other_channels_are_bands_as_they_are_stored():
    bands = np.random.default_rng(0).integers(0, 256, (12, 9, 6), dtype=np.uint8)
    assert (pixels(encoded(Image.fromarray(bands[..., :4], "RGBA"), "PNG"), 4) == bands[..., :4]).all()
    assert (pixels(encoded(Image.fromarray(bands[..., :4], "CMYK"), "TIFF"), 4) == bands[..., :4]).all()
    assert (pixels(encoded(Image.fromarray(bands[..., :2], "LA"), "PNG"), 2) == bands[..., :2]).all()
    layers = [Image.fromarray(np.ascontiguousarray(bands[..., i])) for i in range(6)]
    pages = encoded(layers[0], "TIFF", save_all=True, append_images=layers[1:])
    for source in (bands, saved(bands), saved(np.asfortranarray(bands)), pages):
        assert (pixels(source, 6) == bands).all()
    deep = [Image.fromarray(np.ascontiguousarray(bands[..., i]).astype(np.uint16) * 16) for i in range(6)]
    pages = encoded(deep[0], "TIFF", save_all=True, append_images=deep[1:])
    assert (pixels(pages, 6, value_range=(0, 4080)) == bands).all()
    wide = saved(bands.astype(np.float32) / 255)
    assert (pixels(wide, 6, value_range=(0, 1)) == bands).all()


@pytest.mark.parametrize(
    ("source", "channels", "found"),
    [
        (np.zeros((4, 5, 3), np.uint8), 4, 3),
        (np.zeros((4, 5, 6), np.uint8), 3, 6),
        (np.zeros((4, 5, 2), np.uint8), 1, 2),
        (encoded(Image.new("RGB", (5, 4)), "PNG"), 5, 3),
        (encoded(Image.new("RGB", (5, 4)), "JPEG"), 4, 3),
    ],
)
def test_other_channels_than_asked_for_are_an_error_that_names_the_field(source, channels, found):
    with pytest.raises(DecodeError, match=rf"x: .*\(4, 5, {found}\), and config.model.in_chans is {channels}"):
        pixels(source, channels)


@pytest.mark.parametrize("cut", [20, 60, 100, -1])
def test_damaged_numpy_files_are_errors(cut):
    with pytest.raises(DecodeError, match="cannot be read"):
        pixels(saved(np.zeros((8, 8, 4), np.uint8))[:cut], 4)


def test_a_forged_numpy_header_allocates_nothing():
    data = saved(np.zeros((8, 8), np.uint8)).replace(b"(8, 8)", b"(900000, 900000)")
    with pytest.raises(DecodeError):
        pixels(data, 1)


@pytest.mark.parametrize("channels", [1, 2, 4, 7])
def test_images_of_any_channels_are_augmented(channels):
    image = np.random.default_rng(0).integers(0, 256, (40, 50, channels), dtype=np.uint8)
    spec = augment.AugmentSpec((24, 24), randaugment="rand-m9-mstd0.5-inc1" if channels == 1 else "", erase_prob=1.0)
    seen = []
    for i in range(20):
        source = Picture(image, "x", Reading(channels))
        got, box = augment.train_sample(source, spec, rng.generator(0, "x", i))
        assert got.shape == (24, 24, channels) and got.dtype == np.uint8 and box[1] > box[0]
        seen.append(got)
    assert len({got.tobytes() for got in seen}) == 20
    for exact in (False, True):
        source = Picture(image, "x", Reading(channels))
        assert augment.eval_sample(source, (24, 24), 0.875, exact=exact).shape == (24, 24, channels)


def test_grey_is_augmented_as_rgb_of_equal_bands():
    grey = picture(40, 50)[..., :1].copy()
    rgb = np.repeat(grey, 3, -1)
    spec = augment.AugmentSpec((24, 24), randaugment="rand-m9-mstd0.5-inc1", color_jitter=0.4, fill=(114, 114, 114))
    for i in range(40):
        ours, _ = augment.train_sample(Picture(grey, "x", Reading(1)), spec, rng.generator(0, "x", i))
        theirs, _ = augment.train_sample(rgb, spec, rng.generator(0, "x", i))
        np.testing.assert_array_equal(ours[..., 0], theirs[..., 0])


@pytest.mark.parametrize("channels", [1, 2, 4, 8])
def test_rgb_weights_are_adapted_as_timm_does(channels):
    from pcpvt import torchvision_compat  # noqa: F401 - before timm
    from timm.models import adapt_input_conv  # isort: skip

    params = init(pcpvt.build("pcpvt_nano", 5), 0)
    adapted, notes = adapt_channels(params, channels, "x")
    assert torch.equal(adapted[FIRST], adapt_input_conv(channels, params[FIRST])) and len(notes) == 1
    assert all(adapted[name] is value for name, value in params.items() if name != FIRST)
    assert adapted[FIRST].shape == pcpvt.shapes(pcpvt.build("pcpvt_nano", 5, in_chans=channels))[FIRST]
    assert adapt_channels(params, 3, "x") == (params, [])
    with pytest.raises(UserError, match=rf"x: .*{channels} channels .*config.model.in_chans={channels}"):
        adapt_channels(adapted, 5, "x")


def test_normalisation_is_imagenets_for_rgb_and_its_average_elsewhere():
    assert normalisation(3) == (IMAGENET_MEAN, IMAGENET_STD)
    assert normalisation(1) == ((0.449,), (0.226,)) and normalisation(5) == ((0.449,) * 5, (0.226,) * 5)


def test_a_model_of_two_channels_equals_timms(tmp_path):
    from pcpvt import torchvision_compat  # noqa: F401 - before timm
    import timm  # isort: skip

    theirs = timm.create_model("twins_pcpvt_small", in_chans=2, num_classes=4).eval()
    torch.save(theirs.state_dict(), tmp_path / "a.pth")
    loaded = load_model(tmp_path / "a.pth")
    assert loaded.model.in_chans == 2
    images = torch.randn(1, 2, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = pcpvt.apply(loaded.model, loaded.params, images.permute(0, 2, 3, 1))
        torch.testing.assert_close(ours, theirs(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("channels", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_all_modes_take_other_channels(channels, tmp_path):
    data, workdir = tmp_path / "data", tmp_path / "run"
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for label, name in enumerate(("cat", "dog")):
            (data / split / name).mkdir(parents=True)
            for i in range(8):
                values = (generator.integers(0, 100, (36, 40, channels)) + 100 * label).astype(np.uint8)
                np.save(data / split / name / f"{i}.npy", values)
    rgb = tmp_path / "rgb.safetensors"
    foreign.write_timm(init(pcpvt.build("pcpvt_nano", 1000), 3), rgb, {})
    words = miniature.words(
        workdir, "cpu,folder", data__path=data, data__workers=0, image_size=32, batch_size=8, steps=4,
        eval_every="4 steps", model__in_chans=channels, finetune=rgb,
        **({} if channels == 1 else {"augment__randaugment": ""}),
    )  # fmt: skip
    ended = miniature.run(words)
    assert ended.code == 0 and f"channels: 3 in the file, {channels} here" in ended.out, ended.err
    for mode in ("eval", "export", "predict"):
        given = [f"--config.predict.images={data}/val/dog", "--config.export.format=pt2"]
        done = miniature.run([f"--mode={mode}", f"--workdir={workdir}", *given, "--config.predict.explain=true"])
        assert done.code == 0, done.err
    net = api.load(workdir)
    image = api.read(data / "val" / "dog" / "3.npy", net.size, net.crop, net.reading)
    assert net.model.in_chans == channels and image.shape == (1, 32, 32, channels)
    assert api.features(net.model, net.params, image)[0].shape[:2] == (1, 16)
    batch = {"image": image, "label": torch.tensor([1])}
    api.train_step(net.model)(api.train_state(net.params), batch)
    refused = miniature.run(["--mode=eval", f"--workdir={workdir}", "--config.model.in_chans=2"])
    assert refused.code == 2 and f"config.model.in_chans={channels}" in refused.error


def test_augmentations_of_colours_are_refused_for_other_channels(tmp_path):
    refused = miniature.run(miniature.words(tmp_path, model__in_chans=4, augment__randaugment="rand-m9"))
    assert refused.code == 2 and "config.augment.randaugment" in refused.error and "in_chans is 4" in refused.error
