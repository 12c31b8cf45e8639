"""docs/data.md: every command runs, at miniature size, and every field that it names exists."""

from __future__ import annotations

import re
import shlex
import tarfile
from pathlib import Path

import miniature
import pytest
from PIL import Image

from pcpvt.config.fields import FIELDS
from pcpvt.readers.files import HEIF, SUFFIXES

TEXT = (Path(__file__).parent.parent / "docs" / "data.md").read_text()
COMMANDS = [line for block in re.findall(r"^```bash\n(.*?)^```$", TEXT, re.M | re.S) for line in block.splitlines()]
STANDIN = Path(__file__).parent / "datasets_standin"
MINIATURE = {"model.name": "pcpvt_nano", "image_size": 32, "batch_size": 4, "steps": 1, "eval.batch_size": 4}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """What the commands name: DIR, PHOTOS, FILE.csv, OTHER.csv, TARS, and a workdir of the same classes."""
    place = tmp_path_factory.mktemp("place")
    miniature.image_folder(place / "DIR", 4)
    (place / "DIR" / "test").symlink_to("val")
    (place / "PHOTOS").symlink_to("DIR/train")
    for name in ("cat/0", "dog/0", "cat/1", "dog/1"):
        Image.open(place / "PHOTOS" / f"{name}.png").save(place / f"{name.replace('/', '')}.jpg")
    rows = ["cat0.jpg,cat,train", "dog0.jpg,dog,train", "cat1.jpg,cat,val", "dog1.jpg,dog,val"]
    (place / "FILE.csv").write_text("\n".join(["path,label,split", *rows]))
    (place / "OTHER.csv").write_text(
        "id,breed\n" + "".join(f"{n}{i}.jpg,{n}\n" for n in ("cat", "dog") for i in (0, 1))
    )
    (place / "TARS").mkdir()
    for split in ("train", "val"):
        with tarfile.open(place / "TARS" / f"{split}.tar", "w") as archive:
            archive.add(place / "DIR" / split, ".")
    fields = [f"--config.{name}={value}" for name, value in MINIATURE.items()]
    words = ["--config=configs/pcpvt_s.py:cpu", f"--config.data.path={place}/DIR", f"--workdir={place}/run", *fields]
    assert miniature.run(words).code == 0
    return place


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_runs(line, place, tmp_path):
    line = re.sub(r"=(DIR|PHOTOS|FILE\.csv|OTHER\.csv|TARS)\b", rf"={place}/\1", line)
    words = shlex.split(line)[3:]
    if "--mode=eval" in words:
        words += ["--config=configs/pcpvt_s.py:cpu", f"--workdir={place}/run"]
    else:
        words += [f"--workdir={tmp_path}/run", *(f"--config.{name}={value}" for name, value in MINIATURE.items())]
    env = {"PYTHONPATH": f"{miniature.FAULTS}:{STANDIN}:{miniature.ROOT}"} if "hfds/" in line else None
    done = miniature.run(words, env=env, cold=env is not None)
    assert done.code == 0 and done.err == "", done.err


def test_every_field_and_suffix_that_it_names_exists():
    named = set(re.findall(r"config\.([a-z_]+(?:\.[a-z_]+)?)", TEXT)) - {"seed"}
    assert named <= set(FIELDS), named - set(FIELDS)
    assert set(re.findall(r"`(\.[a-z]{3,4})`", TEXT)) - {".csv", ".tsv", ".tar"} <= SUFFIXES | HEIF
