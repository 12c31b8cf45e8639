"""docs/distillation.md: its example and every command run, at miniature size, and every field that it names exists."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import miniature
import pytest
import safetensors.torch
import warm
from PIL import Image
from test_distillation import resnet

from pcpvt.config.fields import FIELDS

TEXT = (Path(__file__).parent.parent / "docs" / "distillation.md").read_text()
BASH = re.findall(r"^```bash\n(.*?)^```$", TEXT, re.M | re.S)
HUB, *OTHERS = [line for block in BASH for line in block.splitlines()]
WORDNET = ("n01440764", "n01443537")
FIELDS_OF_RUN = {"model.name": "pcpvt_nano", "image_size": 32, "batch_size": 4, "steps": 1, "restarts": 0}
MINIATURE = [f"--config.{name}={value}" for name, value in FIELDS_OF_RUN.items()]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """What the commands name: PHOTOS of two classes, DIR (the same of ImageNet's), TEACHER, WORKDIR, FILE.pt2."""
    place = tmp_path_factory.mktemp("place")
    miniature.image_folder(place / "PHOTOS", 4)
    for split in ("train", "val"):
        for name, own in zip(WORDNET, ("cat", "dog"), strict=True):
            (place / "DIR" / split / name).mkdir(parents=True)
            image = Image.open(place / "PHOTOS" / split / own / "0.png")
            for i in range(4):
                image.save(place / "DIR" / split / name / f"{i}.png")
    (example,) = re.findall(r"^```python\n(.*?)^```$", TEXT, re.M | re.S)
    warm.run(["-c", example], os.environ, place, timeout=300).check_returncode()
    words = ["--config=configs/pcpvt_s.py:cpu", f"--config.data.path={place}/PHOTOS", f"--workdir={place}/WORKDIR"]
    assert miniature.run([*words, *MINIATURE]).code == 0
    output = f"--config.export.output={place}/FILE.pt2"
    assert miniature.run(["--mode=export", "--config.export.format=pt2", output, words[-1]]).code == 0
    return place


@pytest.mark.parametrize("line", OTHERS)
def test_every_command_runs(line, place, tmp_path):
    line = re.sub(r"=(PHOTOS|TEACHER|WORKDIR|FILE\.pt2)\b", rf"={place}/\1", line)
    ended = miniature.run([*shlex.split(line)[3:], *MINIATURE, f"--workdir={tmp_path}"])
    assert ended.code == 0 and ended.err == "" and "note: teacher: " in ended.out, ended.err


def test_the_command_for_a_model_of_timm_runs(place, tmp_path):
    """With a small ResNet under the name that its weights have in the hub's cache, for 1000 classes without names."""
    snapshot = tmp_path / "hub" / "models--timm--test_resnet.r160_in1k" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(snapshot.name)
    safetensors.torch.save_file(resnet(1000).float().state_dict(), snapshot / "model.safetensors")
    line = HUB.replace("timm:resnet50", "timm:test_resnet").replace(":npu8", ":cpu").replace("=DIR", f"={place}/DIR")
    env = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    words = [*shlex.split(line)[3:], *MINIATURE, f"--workdir={tmp_path}/run"]
    ended = miniature.run(words, env=env, cold=True)
    assert ended.code == 0 and "note: teacher: timm:test_resnet, 469,688 parameters, 1000 classes" in ended.out, (
        ended.err
    )
    assert "teacher: its outputs for 2 classes of 1000 are taken as ImageNet's" in ended.out
    bench = miniature.run(["--mode=bench", "--config.bench.steps=1", f"--workdir={tmp_path}/run"])
    assert bench.code == 0 and "config.distill.teacher: is left out: --mode=bench measures" in bench.out, bench.err


def test_every_field_that_it_names_exists():
    named = set(re.findall(r"config\.([a-z_]+(?:\.[a-z_]+)?)", TEXT)) - {"json"}
    assert named <= set(FIELDS), named - set(FIELDS)
    assert {name for name in FIELDS if name.startswith("distill.")} <= named
