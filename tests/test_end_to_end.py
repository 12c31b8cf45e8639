"""The program as a user calls it, at miniature size: training, its files, evaluation, an image folder, bad input."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from pcpvt import rng


@pytest.fixture
def images(tmp_path):
    """An image folder of three classes that differ in colour, with sizes of their own: 12 + 6 images a class."""
    draws = rng.generator(0, "test images")
    for split, count in (("train", 12), ("val", 6)):
        for label, name in enumerate(("blue", "green", "red")):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = draws.integers(0, 90, (int(draws.integers(40, 90)), int(draws.integers(40, 90)), 3))
                pixels[..., label] += 140
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.jpg")
    return tmp_path / "images"


def metrics(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_training_leaves_the_promised_files_and_evaluation_gives_the_same_figures(pcpvt, nano, tmp_path):
    workdir = tmp_path / "run"
    done = pcpvt(*nano, cold=True)
    result = json.loads((workdir / "result.json").read_text())
    for name in [
        "mode",
        "acc1",
        "acc5",
        "loss",
        "images",
        "images_per_sec",
        "epochs",
        "seconds",
        "n_parameters",
        "checkpoint",
    ]:
        assert result[name] is not None, name
    assert result["mode"] == "train" and result["images"] == 8 * 32
    records = metrics(workdir)
    assert [r["step"] for r in records if r["kind"] == "train"] == [2, 4, 6, 8]
    assert [r["step"] for r in records if r["kind"] == "eval"] == [4, 8]
    assert max(r["acc1"] for r in records if r["kind"] == "eval") == result["acc1"]
    config = json.loads((workdir / "config.json").read_text())
    assert config["model"]["name"] == "pcpvt_nano" and config["steps"] == 8
    assert re.search(r"final accuracy: top-1 [\d.]+ %", done.stdout)
    assert "images/s" in done.stdout and "end-to-end duration" in done.stdout and str(workdir) in done.stdout
    with safe_open(result["checkpoint"], "pt") as file:
        names = set(file.keys())
    assert {"step", "params/head.weight", "opt/mu/head.weight", "opt/nu/head.weight", "opt/count"} <= names

    evaluated = pcpvt("--mode=eval", f"--workdir={workdir}")
    found = json.loads((workdir / "result-eval.json").read_text())
    assert {n: found[n] for n in ("acc1", "acc5", "loss")} == {n: result[n] for n in ("acc1", "acc5", "loss")}
    assert f"top-1 {result['acc1']:.3f} %" in evaluated.stdout
    assert json.loads((workdir / "result.json").read_text())["mode"] == "train"  # training's own record stays


def test_perf_measures_images_per_second_and_evaluates_nothing(pcpvt, nano, tmp_path):
    words = [word for word in nano if "_every" not in word and not word.startswith("--config=")]
    done = pcpvt("--config=configs/pcpvt_s.py:cpu,perf", *words)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert re.search(r"^final images/s: (\d+\.\d)   end-to-end duration: ", done.stdout, re.MULTILINE)[1] != "0.0"
    assert result["images_per_sec"] > 0 and result["images"] == 8 * 32
    assert result["acc1"] is None and "top-1" not in done.stdout
    assert {record["kind"] for record in metrics(tmp_path / "run")} == {"train"}
    assert len(list((tmp_path / "run" / "checkpoints").glob("step-*"))) == 1  # at the end only


def test_an_image_folder_trains_evaluates_and_names_its_classes(pcpvt, images, tmp_path):
    words = [
        "--config=configs/pcpvt_s.py:cpu",
        "--config.model.name=pcpvt_nano",
        f"--config.data.path={images}",
        "--config.image_size=64",
        "--config.batch_size=12",
        "--config.steps=12",
        "--config.warmup_steps=2",
        "--config.lr=5e-3",
        "--config.data.workers=2",
        f"--workdir={tmp_path / 'run'}",
    ]
    done = pcpvt(*words)
    assert "36 training, 18 validation images" in done.stdout
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    with safe_open(result["checkpoint"], "pt") as file:
        assert json.loads(file.metadata()["pcpvt"])["classes"] == ["blue", "green", "red"]
        assert file.get_tensor("params/head.weight").shape[0] == 3
    (images / "val" / "red" / "0.jpg").write_bytes(b"not a picture")
    failed = pcpvt("--mode=eval", f"--workdir={tmp_path / 'run'}", check=False)
    assert failed.returncode == 2 and failed.stderr.count("\n") == 1
    assert failed.stderr.startswith("pcpvt: error:") and "red/0.jpg" in failed.stderr
    passed = pcpvt("--mode=eval", f"--workdir={tmp_path / 'run'}", "--config.data.on_error=skip")
    assert "unreadable 1" in passed.stdout
    assert json.loads((tmp_path / "run" / "result-eval.json").read_text())["seen"] == 17


def test_the_same_seed_gives_the_same_bits_with_0_and_4_workers(pcpvt, images, tmp_path):
    digests = []
    for workers in (0, 4):
        words = [
            "--config=configs/pcpvt_s.py:cpu,folder",
            "--config.model.name=pcpvt_nano",
            f"--config.data.path={images}",
            "--config.image_size=64",
            "--config.batch_size=12",
            "--config.steps=5",
            "--config.warmup_steps=1",
            "--config.lr=1e-3",
            "--config.eval_every=0",
            "--config.save_every=0",
            f"--config.data.workers={workers}",
            f"--workdir={tmp_path / str(workers)}",
        ]
        pcpvt(*words)
        (path,) = (tmp_path / str(workers) / "checkpoints").glob("step-*.safetensors")
        with safe_open(path, "np") as file:
            digests.append({name: file.get_tensor(name).tobytes() for name in file.keys()})  # noqa: SIM118
    assert digests[0] == digests[1]
    assert len(digests[0]) > 100


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--config.epohcs=3"], "config.epohcs: no such field: did you mean config.epochs?"),
        (["--config=configs/pcpvt_x.py"], "configs/pcpvt_x.py: no such file"),
        (
            ["--config=configs/pcpvt_s.py:cpu", "--config.data.path=/nowhere"],
            "/nowhere does not exist",
        ),
        (["--mode=eval", "--workdir=/nowhere"], "/nowhere"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(pcpvt, words, said):
    """One mistake of each stage: the flags, the config file, the data, the workdir; all others: test_cli.py."""
    done = pcpvt(*words, check=False)
    assert done.returncode == 2
    assert said in done.stderr and done.stderr.startswith("pcpvt: error: ") and done.stderr.count("\n") == 1
    assert re.fullmatch(r"(note: .*\n)?", done.stdout)  # what was implied, and nothing else
