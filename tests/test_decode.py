"""Images of every format and mode are decoded to upright RGB; errors name the file."""

import errno
import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, ImageOps

from pcpvt import api
from pcpvt.data import decode, sources
from pcpvt.errors import UserError
from pcpvt.rng import generator


def smooth(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A picture without sharp edges and with four different corners, uint8 `[height, width, 3]`."""
    coarse = generator(seed, "picture").integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def encoded(image: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def pixels(source, **where) -> np.ndarray:
    return decode.Picture(source).crop(**where)


@pytest.fixture(params=["pillow", "simplejpeg"])
def decoder(request, monkeypatch):
    if request.param == "pillow":
        monkeypatch.setattr(decode, "simplejpeg", None)
    elif decode.simplejpeg is None:
        pytest.skip("simplejpeg is not installed")
    return request.param


ORANGE, GREY = (250, 120, 30), (90, 90, 90)


@pytest.mark.parametrize(
    "mode, colour, form, expected",
    [
        ("RGB", ORANGE, "PNG", ORANGE),
        ("L", 90, "PNG", GREY),
        ("L", 90, "JPEG", GREY),
        ("1", 1, "PNG", (255, 255, 255)),
        ("LA", (90, 0), "PNG", GREY),
        ("RGBA", (*ORANGE, 0), "PNG", ORANGE),
        ("RGBA", (*ORANGE, 128), "WEBP", ORANGE),
        ("CMYK", (5, 135, 225, 0), "JPEG", ORANGE),
        ("CMYK", (5, 135, 225, 0), "TIFF", ORANGE),
        ("YCbCr", (150, 60, 200), "JPEG", (251, 120, 29)),
        ("HSV", (17, 225, 250), None, (250, 118, 29)),
        ("I", 90 * 257, None, GREY),
        ("F", 90.2, "TIFF", GREY),
        ("La", (90, 255), None, GREY),
        ("RGBa", (*ORANGE, 255), None, ORANGE),
    ],
)
def test_modes_become_rgb(mode, colour, form, expected):
    image = Image.new(mode, (20, 10), colour)
    options = {"lossless": True, "exact": True} if form == "WEBP" else {}
    got = pixels(encoded(image, form, **options) if form else image)
    assert got.shape == (10, 20, 3) and got.dtype == np.uint8
    assert np.abs(got.astype(int) - expected).max() <= 3  # JPEG and colour spaces round


@pytest.mark.parametrize("transparency", [None, 1, b"\x00\x80\xff"])
@pytest.mark.parametrize("form", ["PNG", "GIF"])
def test_palettes_keep_their_colours_without_a_warning(form, transparency):
    if form == "GIF" and isinstance(transparency, bytes):
        pytest.skip("GIF has at most one transparent colour")
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.putdata([0, 1, 2])
    options = {} if transparency is None else {"transparency": transparency}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = pixels(encoded(image, form, **options))
    assert got.tolist() == [[[10, 20, 30], [40, 50, 60], [70, 80, 90]]]


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PGM"])
def test_16_bit_grey_is_scaled_not_clipped(form):
    values = np.linspace(0, 65535, 32, dtype=np.uint16).reshape(4, 8)
    if form == "PGM":
        data = b"P5 8 4 65535\n" + values.astype(">u2").tobytes()
    else:
        data = encoded(Image.fromarray(values), form)
    got = pixels(data)
    np.testing.assert_array_equal(got[..., 0], np.rint(values / 257))
    np.testing.assert_array_equal(got[..., 0], got[..., 2])


def test_big_endian_16_bit_grey():
    values = np.linspace(0, 65535, 32, dtype=np.uint16).reshape(4, 8)
    image = Image.frombytes("I;16B", (8, 4), values.astype(">u2").tobytes())
    np.testing.assert_array_equal(pixels(image)[..., 1], np.rint(values / 257))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF"])
def test_exif_orientation_is_applied_once(form, orientation, decoder):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(smooth(40, 64))
    data = encoded(stored, form, exif=exif)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(encoded(stored, form, exif=exif)))))
    picture = decode.Picture(data)
    assert (picture.height, picture.width) == upright.shape[:2] == ((40, 64) if orientation < 5 else (64, 40))
    np.testing.assert_array_equal(picture.crop((3, 5, 30, 20)), upright[3:33, 5:25])


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II", b"Exif\0\0", b"cut", b"no offset"])
@pytest.mark.parametrize(("form", "options"), [("JPEG", {"dpi": (72, 72)}), ("JPEG", {}), ("PNG", {}), ("WEBP", {})])
def test_image_with_broken_exif_is_read_as_stored_and_without_a_warning(form, options, exif, recwarn):
    whole = Image.Exif()
    whole[0x0112], whole[0x010F] = 6, "a camera"
    exif = {b"cut": whole.tobytes()[:20], b"no offset": whole.tobytes()[:-9]}.get(exif, exif)
    stored = Image.fromarray(smooth(30, 40))
    picture = decode.Picture(encoded(stored, form, exif=exif, **options))
    assert (picture.height, picture.width) == (30, 40)
    np.testing.assert_array_equal(picture.crop(), pixels(encoded(stored, form, **options)))
    assert not recwarn.list


def test_of_an_animation_the_first_frame_is_used():
    frames = [Image.new("RGB", (6, 4), c) for c in ("red", "green", "blue")]
    for form in ("GIF", "WEBP", "PNG", "TIFF"):
        data = encoded(frames[0], form, save_all=True, append_images=frames[1:])
        assert np.abs(pixels(data).astype(int) - (255, 0, 0)).max() <= 3


def test_all_sources_give_the_same_pixels(tmp_path, decoder):
    path = tmp_path / "a.jpg"
    path.write_bytes(encoded(Image.fromarray(smooth(33, 47)), "JPEG"))
    expected = np.asarray(Image.open(path))
    with open(path, "rb") as file:
        for source in (path, str(path), path.read_bytes(), file, Image.open(path), expected):
            np.testing.assert_array_equal(pixels(source), expected)


def test_an_array_is_not_copied():
    array = smooth(8, 8)
    assert np.shares_memory(pixels(array), array)


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("progressive", [False, True])
def test_both_decoders_give_the_same_pixels(subsampling, progressive, monkeypatch):
    pytest.importorskip("simplejpeg")
    noise = generator(0, "noise").integers(0, 256, (61, 83, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    data = encoded(image, "JPEG", quality=90, subsampling=subsampling, progressive=progressive)
    fast = pixels(data, box=(3, 7, 50, 60))
    monkeypatch.setattr(decode, "simplejpeg", None)
    np.testing.assert_array_equal(fast, pixels(data, box=(3, 7, 50, 60)))


def test_minor_defects_that_pillow_accepts_are_accepted(decoder):
    data = encoded(Image.fromarray(smooth(64, 64)), "JPEG")
    defective = data[:-2] + b"\x00\x01\x02" + data[-2:]
    np.testing.assert_array_equal(pixels(defective), pixels(data))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"])
def test_truncated_files_raise_an_error_with_their_path(form, tmp_path, decoder):
    noise = generator(0, "noise").integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), form)
    for share in (0.0, 0.01, 0.3, 0.6, 0.9):
        path = tmp_path / f"bad{share}.{form.lower()}"
        path.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(decode.DecodeError) as caught:
            pixels(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"hello", b"\xff\xd8\xff\xe0" + bytes(100), None])
def test_a_file_that_is_no_image_raises_an_error_with_its_path(content, tmp_path):
    path = tmp_path / "no.jpg"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(decode.DecodeError, match=r"no\.jpg.*: replace or remove") as caught:
        pixels(path)
    assert isinstance(caught.value, UserError)


def test_a_given_name_is_used_in_messages():
    with pytest.raises(decode.DecodeError, match="train/3"):
        decode.Picture(b"nothing", name="train/3")


def forged_png(width: int, height: int) -> bytes:
    """A small file whose header claims a huge image."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(10_000, 10_000), (200_000, 200_000)])
def test_decompression_bombs_are_refused_before_decoding(size, tmp_path):
    path = tmp_path / "bomb.png"
    path.write_bytes(forged_png(*size))
    with pytest.raises(decode.DecodeError, match=r"bomb\.png.*limit") as caught:
        decode.Picture(path)
    pixel_count = size[0] * size[1]
    assert str(pixel_count) in str(caught.value) or f"{size[0]} x {size[1]}" in str(caught.value)


def test_the_limit_is_named(monkeypatch):
    monkeypatch.setattr(decode, "MAX_PIXELS", 1000)
    with pytest.raises(decode.DecodeError, match=r"40 x 30 pixels .* limit of 1000"):
        decode.Picture(encoded(Image.new("RGB", (40, 30)), "JPEG"))


@pytest.mark.parametrize(
    "box, at_least, factor",
    [
        ((448, 448), (224, 224), 2),
        ((447, 900), (224, 224), 1),
        ((900, 900), (224, 224), 4),
        ((5000, 5000), (224, 224), 8),
        ((300, 300), (100, 200), 1),
    ],
)
def test_the_scale_leaves_enough_pixels(box, at_least, factor):
    assert decode.scale_factor(box, at_least) == factor


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("box", [(0, 0, 299, 301), (17, 33, 200, 150), (81, 103, 201, 183)])
def test_reduced_crops_show_the_same_scene(mode, orientation, box):
    """On a gradient the mean gives the position of the crop: within half a reduced pixel on either side."""
    slope = np.zeros((301, 399, 3), np.uint8)
    slope[..., 0], slope[..., 1] = np.linspace(0, 200, 399)[None], np.linspace(0, 200, 301)[:, None]
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = decode.Picture(encoded(Image.fromarray(slope).convert(mode), "JPEG", quality=95, exif=exif))
    full = picture.crop(box)
    assert full.shape == (*box[2:], 3)
    for at_least, factor in (((100, 75), 2), ((50, 37), 4), ((20, 15), 8)):
        assert decode.scale_factor(box[2:], at_least) == factor
        reduced = picture.crop(box, at_least)
        assert reduced.shape[0] >= at_least[0] and reduced.shape[1] >= at_least[1]
        assert all(abs(n * factor - m) <= factor for n, m in zip(reduced.shape[:2], box[2:], strict=True))
        per_pixel = 200 / 301
        assert np.abs(reduced.mean((0, 1)) - full.mean((0, 1))).max() <= per_pixel * factor / 2 + 0.5


def test_a_picture_can_be_cropped_again():
    data = encoded(Image.fromarray(smooth(128, 128)), "JPEG")
    picture = decode.Picture(data)
    picture.crop((0, 0, 128, 128), (30, 30))
    np.testing.assert_array_equal(picture.crop((4, 4, 9, 9)), np.asarray(Image.open(io.BytesIO(data)))[4:13, 4:13])


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.EMFILE, "Too many open files")])
def test_limits_of_the_system_are_no_fault_of_the_image(error):
    with pytest.raises(type(error)), decode.decode_errors("a.jpg"):
        raise error
    with pytest.raises(decode.DecodeError, match=r"a\.jpg"), decode.decode_errors("a.jpg"):
        raise OSError(errno.EIO, "Input/output error")


@pytest.fixture
def ghostscript(tmp_path, monkeypatch):
    """A program `gs` on the PATH; returns the file that it leaves when it runs."""
    trace = tmp_path / "bin" / "ran"
    trace.parent.mkdir()
    (trace.parent / "gs").write_text(f"#!/bin/sh\necho x > {trace}\n")
    (trace.parent / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(trace.parent), prepend=":")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    return trace


def test_only_the_named_formats_are_decoded_and_no_program_runs(ghostscript, tmp_path):
    image, path = Image.fromarray(smooth(20, 30)), tmp_path / "a.jpg"
    for form in ("EPS", "PDF", "ICO", "PCX", "TGA", "JPEG2000"):
        image.save(path, form)
        for read in (pixels, lambda path: api.read(path, (8, 8))):
            with pytest.raises(decode.DecodeError, match=r"a\.jpg: .* \(in none of the formats BMP, GIF, JPEG, PNG, "):
                read(path)
    assert not ghostscript.exists()
    for form in decode.FORMATS:
        assert pixels(encoded(image, form)).shape == (20, 30, 3)


def test_datasets_that_decode_by_themselves_run_no_program(ghostscript, monkeypatch):
    import pcpvt.torchvision_compat  # noqa: F401 - before timm
    import timm.data  # isort: skip

    data = type("Data", (list,), {"class_to_idx": {"cat": 0, "dog": 1}})([(0, 0), (1, 1)])
    monkeypatch.setattr(timm.data, "create_dataset", lambda *_, **__: data)
    sources.open_split("torch/pets", "", "val", (16, 16))
    with pytest.raises(OSError, match="Ghostscript"):
        Image.open(io.BytesIO(encoded(Image.new("RGB", (8, 8)), "EPS"))).convert("RGB")
    assert not ghostscript.exists()


def test_names_of_open_files_in_a_decoders_words_are_left_out():
    with pytest.raises(decode.DecodeError) as caught, decode.decode_errors("a.jpg"):
        raise OSError(f"cannot decode {io.BytesIO()!r} at all")
    assert str(caught.value).startswith("a.jpg: cannot be read as an image (OSError: cannot decode the file at all): ")
