"""The READMEs: every command and example runs, at miniature size, and both languages have the same ones."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import warm
from PIL import Image

from pcpvt.data import sources

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
CHINESE = (ROOT / "README.zh-CN.md").read_text()
PYTHON = (ROOT / "docs" / "python.md").read_text()


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    return [line for block in blocks(text, "bash") for line in block.splitlines()]


PHOTOS, USE = (commands("".join(re.findall(rf"^## {title}\n.*?(?=^## )", README, re.M | re.S))) for title in (
    "Your own photos", "Use"))  # fmt: skip


def test_both_languages_have_the_same_commands():
    assert commands(README) == commands(CHINESE)
    assert blocks(CHINESE, "python") == blocks(README, "python")
    assert len(PHOTOS) == 4 and [c for c in commands(README) if c.startswith("python -m")] == [*PHOTOS[1:], *USE]


def test_the_readme_is_short_and_its_links_have_targets():
    assert len(README.splitlines()) < 200
    for text in (README, CHINESE):
        for target in re.findall(r"\]\(([^)]+)\)", text):
            assert (ROOT / target).exists(), target
        for path in re.findall(r"`((?:launch|configs|pcpvt|tests)/[\w./-]+)`", text):
            assert (ROOT / path).exists(), path


def test_every_field_that_the_readme_names_exists():
    from pcpvt.config.fields import FIELDS

    named = set(re.findall(r"config\.([a-z_]+(?:\.[a-z_]+)?)(?==)", README))
    assert named <= set(FIELDS), named - set(FIELDS)


@pytest.fixture(scope="module")
def place(trained, tmp_path_factory):
    """A folder with the files that the README's commands name: runs/pcpvt_s, DIR, FILE, IMAGES, photo.jpg."""
    place = tmp_path_factory.mktemp("place")
    (place / "runs").mkdir()
    os.symlink(trained, place / "runs" / "pcpvt_s")
    digits = sources.digits("val", (64, 64))
    for split, start in (("train", 0), ("val", 100)):
        for i in range(start, start + 40):
            pixels, label = digits[i]
            folder = place / "DIR" / split / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / f"{i}.jpg")
    Image.fromarray(digits[0][0]).save(place / "photo.jpg")
    return place


def marked(line: str):
    """The bench measures the full size, 20 s long; test_bench.py measures the miniature."""
    return pytest.param(line, marks=pytest.mark.slow) if "--mode=bench" in line else line


@pytest.mark.parametrize("line", [marked(c) for c in USE])
def test_every_command_of_the_readme_runs(line, place, trained):
    """With changes for this machine: the miniature model, the CPU, and a few steps."""
    best = sorted((trained / "checkpoints").glob("step-*.safetensors"))[-1]
    line = line.replace("=DIR", f"={place / 'DIR'}").replace("=FILE", f"={best}").replace("=IMAGES", "=photo.jpg")
    words = shlex.split(line)[1:]
    mode = next((w.partition("=")[2] for w in words if w.startswith("--mode")), "train")
    if mode in ("train", "bench") and "--help" not in words:
        words = [re.sub(r":npu8", ":cpu", w) for w in words]
        words += ["--config.image_size=32", "--config.batch_size=4", "--config.bench.steps=1"]
        words += ["--config.eval.batch_size=4"]
    if mode == "train" and "--help" not in words:
        words += ["--config.model.name=pcpvt_nano", "--config.steps=2", f"--workdir={place / 'train'}-{len(line)}"]
    if mode == "export":
        words += [f"--config.export.output={place / 'exported.safetensors'}"]
    done = warm.run(words, os.environ, place, timeout=300)
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"


@pytest.mark.slow
def test_the_commands_for_your_own_photos_run_one_after_the_other(tmp_path):
    """In one folder, with timm's model under the name that its weights have in the hub's cache; sizes are reduced."""
    from pcpvt import torchvision_compat  # noqa: F401, I001  # before timm
    import timm

    snapshot = tmp_path / "hub" / "models--timm--twins_pcpvt_small.in1k" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(snapshot.name)
    weights = timm.create_model("twins_pcpvt_small").state_dict()
    safetensors.torch.save_file(weights, snapshot / "model.safetensors")
    digits = sources.digits("train", (64, 64))
    for i in range(60):
        folder = tmp_path / "PHOTOS" / ("even" if digits[i][1] % 2 == 0 else "odd")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(digits[i][0]).save(folder / f"{i}.jpg")
    env = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    outputs = []
    for line in PHOTOS[1:]:
        words = shlex.split(line.replace("=IMAGES", "=PHOTOS/odd"))[1:]
        words += ["--config.image_size=64", "--config.epochs=1"] if "--mode" not in line else []
        done = subprocess.run([sys.executable, *words], env=env, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
        outputs.append(done.stdout)
    assert "fine-tuning from timm:twins_pcpvt_small" in outputs[0] and "48 training, 12 validation" in outputs[0]
    assert len(re.findall(r"[\d.]+ % +(?:even|odd)\n", outputs[1])) == 2 * len(
        list((tmp_path / "PHOTOS/odd").iterdir())
    )
    assert [path.suffix for path in (tmp_path / "runs" / "pcpvt_s" / "export").iterdir()] == [".onnx"]


@pytest.mark.parametrize("code", [*blocks(README, "python"), *blocks(PYTHON, "python")])
def test_every_python_example_runs(code, place):
    done = warm.run(["-c", code], os.environ, place, timeout=300)
    assert done.returncode == 0, done.stderr
