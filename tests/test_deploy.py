"""docs/deploy.md: its blocks run where pcpvt cannot be imported, and give the probabilities of --mode=predict."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys

import miniature
import numpy as np
import pytest
from PIL import Image

TEXT = (miniature.ROOT / "docs" / "deploy.md").read_text()
SHARED, *RUNTIMES = re.findall(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
COMMANDS = re.findall(r"^python -m pcpvt.main (.*)$", TEXT, re.MULTILINE)
# Pillow and PyTorch resize the same pixels to values that differ by one level, rarely.
TOLERANCE = 0.01
needs_onnx = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("onnx", "onnxscript", "onnxruntime"))), reason="the extra `export`"
)
needs_openvino = pytest.mark.skipif(not importlib.util.find_spec("openvino"), reason="OpenVINO is not installed")


@pytest.fixture(scope="module")
def place(trained, tmp_path_factory):
    """A folder with photo.png; also the checkpoint's probabilities of it by class name."""
    place = tmp_path_factory.mktemp("place")
    source = np.random.default_rng(0)
    pixels = source.integers(0, 256, (7, 9, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((90, 70), Image.Resampling.BICUBIC).save(place / "photo.png")
    return place, predicted(place, trained)


def predicted(place, checkpoint):
    words = ["--mode=predict", f"--config.checkpoint={checkpoint}", f"--config.predict.images={place / 'photo.png'}"]
    words += ["--config.predict.format=jsonl", "--config.predict.top=10", f"--workdir={place / 'predict'}"]
    ended = miniature.end(miniature.start([*words, "--config.precision=float32"]), timeout=400)
    assert ended.code == 0, ended.err
    return {entry["class"]: entry["probability"] for entry in json.loads(ended.out)["predictions"]}


def run(place, trained, name):
    """Exports the file as the document says, runs the block that reads it, and compares what both print."""
    folder, expected = place
    (command,) = [line for line in COMMANDS if line.endswith(name)]
    (block,) = [block for block in RUNTIMES if f'"{name}"' in block]
    words = command.replace("=FILE", f"={trained}").replace(f"={name}", f"={folder / name}").split()
    ended = miniature.end(miniature.start([*words, f"--workdir={folder / 'export'}"]), timeout=400)
    assert ended.code == 0, ended.err
    code = f"import sys\nsys.modules['pcpvt'] = None\n{SHARED}\n{block}\nshow(np.array([]), about)\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shown = [line.split() for line in done.stdout.splitlines()]
    assert len(shown) == 5 and [name for _, name in shown] == list(expected)[:5]
    for probability, label in shown:
        assert float(probability) == pytest.approx(expected[label], abs=TOLERANCE)


@needs_onnx
def test_onnx_runtime(place, trained):
    run(place, trained, "model.onnx")


@needs_onnx
def test_onnx_runtime_with_the_preprocessing_in_the_graph(place, trained):
    run(place, trained, "pixels.onnx")
    again = predicted(place[0], place[0] / "pixels.onnx")
    assert again == pytest.approx(place[1], abs=1e-5)


def test_pytorch(place, trained):
    run(place, trained, "pixels.pt2")


@needs_openvino
def test_openvino(place, trained):
    run(place, trained, "model.xml")


def test_a_format_without_preprocessing_says_so(trained, tmp_path):
    words = ["--mode=export", f"--config.checkpoint={trained}", "--config.export.preprocess=true"]
    ended = miniature.run([*words, f"--workdir={tmp_path}"])
    assert (
        ended.code == 2 and "timm files have no such form: leave it out, or use onnx or pt2 or openvino" in ended.error
    )


def test_links_and_fields_of_the_document_exist():
    from pcpvt.config.fields import FIELDS

    for name in ("deploy.md", "om.md"):
        text = (miniature.ROOT / "docs" / name).read_text()
        assert set(re.findall(r"config\.([a-z_]+(?:\.[a-z_]+)?)(?==)", text)) <= set(FIELDS)
        for target in re.findall(r"\]\(([^)]+)\)", text):
            assert (miniature.ROOT / "docs" / target).exists(), target
