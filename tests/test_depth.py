"""Values of more than 8 bits are scaled by the range that the user or the file gives, in all modes alike."""

from __future__ import annotations

import io
import json
import struct
import zlib

import miniature
import numpy as np
import pytest
from PIL import Image

from pcpvt import api
from pcpvt.data.augment import AugmentSpec
from pcpvt.data.decode import DecodeError, Picture, Reading
from pcpvt.data.loader import EvalBatches, Loader, TrainBatches
from pcpvt.data.sources import open_split
from pcpvt.errors import UserError

RAMP = np.linspace(0, 1, 32).reshape(4, 8)
LEVELS = np.floor(RAMP * 255 + 0.5)  # what a ramp over its whole range becomes


def tiff(values: np.ndarray, *, packed: int = 0, **tags: float) -> bytes:
    """A TIFF with one band; `packed`: so many bits per sample."""
    endings = {"SMin": (340, tags.get("low")), "SMax": (341, tags.get("high"))}
    if packed:
        bits = "".join("".join(f"{int(v):0{packed}b}" for v in row) for row in values)
        data = int(bits, 2).to_bytes(len(bits) // 8, "big")
        kind = 1
    else:
        data = values.tobytes()
        kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    height, width = values.shape
    number = {1: ("H", 3), 2: ("i", 9), 3: ("f", 11)}[kind]
    entries = [
        (256, 3, "H", width), (257, 3, "H", height), (258, 3, "H", packed or 8 * values.itemsize), (259, 3, "H", 1),
        (262, 3, "H", 1), (273, 4, "I", None), (277, 3, "H", 1), (278, 3, "H", height), (279, 4, "I", len(data)),
        (339, 3, "H", kind), *((tag, number[1], number[0], v) for tag, v in endings.values() if v is not None),
    ]  # fmt: skip
    offset = 8 + 2 + 12 * len(entries) + 4
    directory = b"".join(
        struct.pack("<HHI", tag, field, 1) + struct.pack(f"<{form}", offset if v is None else v).ljust(4, b"\0")
        for tag, field, form, v in entries
    )
    return struct.pack("<2sHIH", b"II", 42, 8, len(entries)) + directory + bytes(4) + data


def png(values: np.ndarray) -> bytes:
    """A PNG with 16 bits a band, `[h, w, 3 or 4]`."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    height, width, bands = values.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {3: 2, 4: 6}[bands], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def grey(source, **reading) -> np.ndarray:
    pixels = Picture(source, "x", Reading(**reading)).crop()
    assert (pixels[..., 0] == pixels[..., 2]).all()
    return pixels[..., 0]


@pytest.mark.parametrize(
    ("values", "options"),
    [
        (RAMP * 65535, {"dtype": np.uint16}),
        (RAMP * 4095, {"dtype": np.uint16, "packed": 12}),  # 12 bits, packed
        (RAMP * 4095, {"dtype": np.uint16, "high": 4095}),  # 12 bits in 16
        (RAMP * 3000 + 1000, {"dtype": np.uint16, "low": 1000, "high": 4000}),
        (RAMP * 65535 - 32768, {"dtype": np.int16}),
        (RAMP * (2**32 - 1), {"dtype": np.uint32}),
        (RAMP * (2**32 - 1) - 2**31, {"dtype": np.int32}),
        (RAMP * 4000 - 1000, {"dtype": np.int32, "low": -1000, "high": 3000}),
        (RAMP * 0.5, {"dtype": np.float32, "low": 0.0, "high": 0.5}),
        (RAMP * 255, {"dtype": np.float32}),
    ],
)
def test_the_range_is_what_the_file_says(values, options):
    dtype = np.dtype(options.pop("dtype"))
    stored = values.astype(dtype) if dtype.kind == "f" else np.rint(values).astype(dtype)
    picture = Picture(tiff(stored, **options), "x")
    # Values are integers here, which moves some of them over the border of a level.
    assert np.abs(picture.crop()[..., 1] - LEVELS).max() <= 1
    assert picture.depth.seen == pytest.approx((0, 1), abs=0.01) and picture.depth.unused == ""


def test_the_range_that_is_given_wins():
    for dtype, top in ((np.uint16, 4095), (np.float32, 1.0), (np.uint32, 70_000)):
        values = (RAMP * top).astype(dtype)
        given = grey(tiff(values, low=0, high=60_000 if dtype == np.uint16 else 2), value_range=(0, top))
        assert np.abs(given - LEVELS).max() <= 1
        assert np.abs(grey(values, value_range=(0, top)) - LEVELS).max() <= 1  # an array
    outside = np.array([[-5, np.nan, 0, 50, 100, 1e9, np.inf, -np.inf]], np.float32)
    assert grey(tiff(outside), value_range=(0, 100)).tolist() == [[0, 0, 0, 128, 255, 255, 255, 0]]
    eight = np.arange(32, dtype=np.uint8).reshape(4, 8)
    assert (grey(Image.fromarray(eight), value_range=(0, 4095)) == eight).all()  # 8 bits stay


@pytest.mark.parametrize("bands", [3, 4])
@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_16_bit_colours_keep_their_levels(bands, form):
    values = np.random.default_rng(0).integers(0, 4096, (6, 9, bands), dtype=np.uint16)
    data = png(values)
    if form == "TIFF":
        entries = [
            (256, 3, 9), (257, 3, 6), (258, 3, None), (259, 3, 1), (262, 3, 2), (273, 4, 0), (277, 3, bands),
            (278, 3, 6), (279, 4, values.nbytes), *([(338, 3, 2)] if bands == 4 else []),
        ]  # fmt: skip
        after = 8 + 2 + 12 * len(entries) + 4
        rows = b""
        for tag, kind, value in entries:
            if tag == 258:
                rows += struct.pack("<HHII", tag, kind, bands, after)
            else:
                number = after + 2 * bands if tag == 273 else value
                rows += struct.pack("<HHI", tag, kind, 1) + struct.pack("<H" if kind == 3 else "<I", number).ljust(
                    4, b"\0"
                )
        data = struct.pack("<2sHIH", b"II", 42, 8, len(entries)) + rows + bytes(4)
        data += struct.pack(f"<{bands}H", *[16] * bands) + values.tobytes()
    plain = Picture(data, "x")
    assert (plain.crop() == values[..., :3] >> 8).all()  # Pillow's upper bytes, with a warning
    assert "config.data.value_range=LOW,HIGH" in plain.depth.unused
    scaled = Picture(data, "x", Reading(3, (0, 4095))).crop()
    assert (scaled == np.floor(values[..., :3] * (255 / 4095) + 0.5)).all()


def twelve_bits(root) -> None:
    """A folder of two classes that differ in 12-bit values in 16-bit files."""
    for split in ("train", "val"):
        for label, name in enumerate(("dark", "light")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(8):
                values = np.full((40, 40), 200 + 2400 * label + 50 * i, np.uint16)
                Image.fromarray(values + np.arange(40, dtype=np.uint16)).save(folder / f"{i}.png")


def test_a_range_that_is_mostly_unused_is_said_once(tmp_path):
    twelve_bits(tmp_path)
    folder = open_split("folder", str(tmp_path), "train", (8, 8))
    spec = AugmentSpec((8, 8), scale=(), hflip=0.0)
    for workers in (0, 2):
        for limits, warned in ((None, 1), ((0, 4095), 0)):
            warnings: list[str] = []
            batches = TrainBatches(folder, spec, None, np.zeros(2), seed=0, batch=8, reading=Reading(3, limits))
            list(Loader(batches, range(4), workers, warn=warnings.append))
            evaluation = EvalBatches(folder, (8, 8), 1.0, 16, 0, 1, "error", Reading(3, limits))
            assert len(warnings) == warned and len(list(Loader(evaluation, range(1), 0, warn=warnings.append))) == 1
            assert all("% of the range 0 to 65535" in text and "value_range" in text for text in warnings)


def test_training_evaluation_prediction_and_api_scale_alike_and_the_checkpoint_carries_the_range(tmp_path):
    twelve_bits(tmp_path / "data")
    workdir = tmp_path / "run"
    words = miniature.words(
        workdir, "cpu,folder", data__path=tmp_path / "data", data__workers=0, image_size=32, batch_size=8, steps=2,
        augment__randaugment="", eval_every="2 steps",
    )  # fmt: skip
    ended = miniature.run(words)
    assert ended.code == 0 and ended.err.count("config.data.value_range=LOW,HIGH") == 1, ended.err
    moved = [word.replace(str(workdir), f"{workdir}-2") for word in words]
    ended = miniature.run([*moved, "--config.data.value_range=0,4095"])
    assert ended.code == 0 and ended.err == "", ended.err
    refused = miniature.run([*moved, "--config.data.value_range=0,100", "--config.steps=4"])
    assert refused.code == 2 and "config.data.value_range" in refused.error
    done = miniature.run(["--mode=eval", f"--workdir={workdir}-2"])
    assert done.code == 0 and done.err == "", done.err
    trained = json.loads((tmp_path / "run-2" / "result.json").read_text())
    assert json.loads((tmp_path / "run-2" / "result-eval.json").read_text())["loss"] == trained["loss"]

    net = api.load(f"{workdir}-2")
    photo = tmp_path / "data" / "val" / "light" / "3.png"
    image = api.read(photo, net.size, net.crop, net.reading)
    assert net.reading == Reading(3, (0, 4095)) and 150 < image.float().mean() < 190
    done = miniature.run(
        [
            "--mode=predict",
            f"--workdir={workdir}-2",
            f"--config.predict.images={photo}",
            "--config.predict.format=jsonl",
        ]
    )
    predicted = json.loads(done.out)["predictions"]
    expected = api.classify(net.model, net.params, image, net.classes)[0]
    assert {p["class"]: p["probability"] for p in predicted} == pytest.approx(dict(expected), abs=2e-6)
    with pytest.warns(UserWarning, match="value_range"):
        api.read(photo, net.size)
    export = ["--mode=export", f"--workdir={workdir}-2", "--config.export.format=timm"]
    assert miniature.run(export).code == 0
    assert (
        b'value_range\\": [0, 4095]' in (tmp_path / "run-2" / "export" / "pcpvt_nano.safetensors").read_bytes()[:20_000]
    )


@pytest.mark.parametrize("text", ["5", "4,1", "1,1", "0,1,2", "a,b"])
def test_a_range_that_is_none_is_refused(text):
    assert miniature.refusal([f"--config.data.value_range={text}"]).startswith("config.data.value_range: ")


def test_other_values_than_numbers_are_refused():
    with pytest.raises(DecodeError, match="complex"):
        Picture(np.zeros((2, 2), complex), "x")
    assert issubclass(DecodeError, UserError)
    buffer = io.BytesIO()
    np.save(buffer, np.array([[{}]]), allow_pickle=True)
    with pytest.raises(DecodeError, match="not numbers"):
        Picture(buffer.getvalue(), "x")
