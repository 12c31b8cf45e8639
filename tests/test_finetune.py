"""Fine-tuning: weights are loaded, the head is replaced or kept with a note, frozen parameters do not change."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import warm
from PIL import Image

from pcpvt import rng
from pcpvt.checkpoints import checkpoint
from pcpvt.checkpoints.load import match_params
from pcpvt.config import recipes
from pcpvt.models import pcpvt as models
from pcpvt.models.init import init
from pcpvt.train import parameters

CIFAR = Path(os.environ.get("PCPVT_DATA", Path(__file__).parents[2] / "shared" / "data")) / "cifar10"


def picture(label: int, rng: np.random.Generator) -> np.ndarray:
    """A 32 px colour image: red stripes across, green stripes down, or a blue disc, of varied hue, phase and noise."""
    y, x = np.mgrid[:32, :32]
    phase = rng.uniform(0, 6.3)
    waves = [np.sin(y * 0.8 + phase), np.sin(x * 0.8 + phase), 1 - 2 * (np.hypot(y - 16, x - 16) > rng.uniform(6, 12))]
    mask = (waves[label] > 0)[..., None]
    colours = rng.integers(0, 160, (2, 3))
    colours[0, label] = 255
    noise = rng.normal(0, 12, (32, 32, 3))
    return np.clip(np.where(mask, *colours) + noise, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """CIFAR-like images in 3 classes: 48 to train and 16 to validate each."""
    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", 48), ("val", 16)):
        for label, name in enumerate(("across", "down", "other")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = picture(label, rng.generator(0, f"test/{split}", label, i))
                Image.fromarray(pixels).save(root / split / name / f"{i:03d}.png")
    return root


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """The checkpoint of a short run on the digits, made by the binary."""
    run = tmp_path_factory.mktemp("digits")
    words = (
        "--config.model.name=pcpvt_nano --config.steps=40 --config.batch_size=32 --config.lr=2e-3 --config.eval_every=0"
    )
    command = ["-m", "pcpvt.main", "--config=configs/pcpvt_s.py:cpu", f"--workdir={run}", *words.split()]
    warm.run(command, os.environ, Path(__file__).parents[1], timeout=120).check_returncode()
    return run


def finetune(pcpvt, workdir: Path, digits: Path, data: Path, *words: str) -> tuple[str, dict[str, torch.Tensor]]:
    """The log of a miniature fine-tuning and the parameters at its end."""
    done = pcpvt(
        "--config=configs/pcpvt_s.py:cpu,finetune", f"--config.finetune={digits}", f"--config.data.path={data}",
        f"--workdir={workdir}", "--config.batch_size=32",
        "--config.augment.scale=(0.8, 1.0)", "--config.data.workers=0", *words,
    )  # fmt: skip
    last = list(checkpoint.steps(workdir / "checkpoints").values())[-1]
    tensors = checkpoint.read(last).tensors
    return done.stdout, {n.removeprefix("params/"): v for n, v in tensors.items() if n.startswith("params/")}


def params_of(workdir: Path) -> dict[str, torch.Tensor]:
    tensors = checkpoint.read(list(checkpoint.steps(workdir / "checkpoints").values())[-1]).tensors
    return {n.removeprefix("params/"): v for n, v in tensors.items() if n.startswith("params/")}


def test_digits_checkpoint_is_fine_tuned_to_colour_images_of_other_classes(pcpvt, digits, images, tmp_path):
    frozen = r"^(patch_embeds|pos_block|blocks)\.0\."
    words = ["--config.steps=30", "--config.lr=5e-3", "--config.warmup_epochs=0", "--config.log_every=5 steps"]
    log, tuned = finetune(pcpvt, tmp_path, digits, images, f"--config.frozen={frozen}", *words)
    assert log.count("head: 10 classes in the file, 3 here: replaced by a fresh one") == 1
    assert f"config.model.name: pcpvt_nano, as {digits} says; the recipe has pcpvt_s" in log
    assert f"config.image_size: 32, as {digits} says; the recipe has 224" in log
    assert f"config.eval.crop: 0.875 is the recipe's; {digits} says 1" in log
    assert log.count("frozen: 42 of 114 leaves, 28%: ") == 1, log
    assert "patch_embeds.0, pos_block.0, blocks.0\n" in log

    start = params_of(digits)
    assert tuned.keys() == start.keys() and tuned["head.weight"].shape[0] == 3
    for name, value in tuned.items():
        if re.search(frozen, name):
            assert torch.equal(value, start[name]), name
        elif "mlp" in name:  # queries of the last stage learn nothing at 32 px, where it has one token
            assert not torch.equal(value, start[name]), name
    losses = [r["loss"] for r in map(json.loads, (tmp_path / "metrics.jsonl").open()) if r["kind"] == "train"]
    assert losses[-1] < losses[0] - 0.1
    assert json.loads((tmp_path / "result.json").read_text())["acc1"] > 60


@pytest.mark.skipif(not CIFAR.is_dir(), reason="no CIFAR images here")
def test_head_starts_anew_for_as_many_classes_that_are_others(pcpvt, digits, tmp_path):
    words = ["--config.steps=2", "--config.lr=0", "--config.warmup_epochs=0"]
    log, tuned = finetune(pcpvt, tmp_path, digits, CIFAR, *words, "--config.eval_every=0")
    assert "head: none of the file's 10 classes (0, 1, 2, ...) is among 10 classes (airplane, " in log
    for name, value in params_of(digits).items():
        assert torch.equal(value, tuned[name]) != name.startswith("head."), name


@pytest.mark.skipif(not CIFAR.is_dir(), reason="no CIFAR images here")
def test_digits_checkpoint_learns_from_real_photographs(pcpvt, digits, tmp_path):
    """In 60 steps of 32, under the recipe's augmentation: measured 2.40, above chance in 10 classes, to 2.18, below."""
    words = ["--config.steps=60", "--config.lr=3e-3", "--config.warmup_epochs=0", "--config.log_every=10 steps"]
    finetune(pcpvt, tmp_path, digits, CIFAR, *words, "--config.eval_every=0", "--config.layer_decay=1")
    losses = [r["loss"] for r in map(json.loads, (tmp_path / "metrics.jsonl").open())]
    assert losses[-1] < math.log(10) - 0.05 and losses[-1] < losses[0] - 0.1, losses


def test_fresh_leaves_start_as_a_new_runs_and_the_others_come_over(pcpvt, digits, images, tmp_path):
    fresh = r"^(patch_embeds|pos_block|blocks)\.[123]\.|^norm\.|^head\."
    log, tuned = finetune(
        pcpvt, tmp_path, digits, images, "--config.steps=1", "--config.lr=0", "--config.warmup_epochs=0",
        "--config.eval_every=0", "--config.model.pad=pad", f"--config.fresh={fresh}", "--config.seed=7",
    )  # fmt: skip
    assert log.count("fresh: 72 of 114 leaves, 72%: ") == 1 and "head:" not in log, log
    start, new = params_of(digits), init(models.build("pcpvt_nano", 3), seed=7)
    for name, value in tuned.items():
        assert torch.equal(value, (new if re.search(fresh, name) else start)[name]), name


def test_fresh_leaves_need_not_fit_and_need_not_exist():
    shapes = {"a": torch.Size([2]), "b": torch.Size([3]), "c": torch.Size([1])}
    weights = {"a": torch.ones(2), "b": torch.ones(9)}
    fitted, _ = match_params(weights, shapes, path="x", exact=True, fresh={"b", "c"})
    assert list(fitted) == ["a"]


def test_used_workdir_refuses_other_weights_and_goes_on_without_its_own(pcpvt, digits, nano, tmp_path):
    words = [*nano, "--config.eval_every=0", "--config.warmup_epochs=0"]
    pcpvt(*words, "--config.steps=1", f"--config.finetune={digits}")
    assert "resumed: step 1 of 2" in pcpvt(*words, "--config.steps=2").stdout
    done = pcpvt(*words, "--config.steps=3", f"--config.finetune={tmp_path}", check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "config.finetune" in done.stderr and "start anew with: " in done.stderr
    kept = pcpvt(*words, "--config.steps=3", f"--config.finetune={digits}")  # its own may still be named
    assert "resumed: step 2 of 3" in kept.stdout


def test_a_fine_tuning_goes_on_when_its_weights_are_gone(pcpvt, digits, tmp_path):
    """Its model and image size are then those of its own workdir."""
    weights = shutil.copytree(digits, tmp_path / "weights")
    words = ["--config=configs/pcpvt_s.py:cpu,finetune", f"--config.finetune={weights}", "--config.batch_size=32"]
    words += [
        "--config.warmup_epochs=0",
        "--config.eval_every=0",
        f"--workdir={tmp_path / 'run'}",
    ]
    pcpvt(*words, "--config.steps=1")
    shutil.rmtree(weights)
    assert "resumed: step 1 of 2" in pcpvt(*words, "--config.steps=2").stdout
    done = pcpvt(*words[:-1], "--config.steps=2", f"--workdir={tmp_path / 'other'}", check=False)
    assert done.returncode == 2 and f"{weights}: no such file" in done.stderr


def test_wrong_model_is_one_line(pcpvt, digits, tmp_path):
    words = ["--config=configs/pcpvt_s.py:cpu", f"--config.finetune={digits}", "--config.model.name=pcpvt_s"]
    done = pcpvt(*words, f"--workdir={tmp_path}", check=False)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
    assert "looks like pcpvt_nano: use --config.model.name=pcpvt_nano" in done.stderr


@pytest.mark.parametrize("arg", ["cpu,finetune,folder", "cpu,folder,finetune", "cpu,finetune", "npu8,finetune"])
def test_recipe_refines_that_of_the_data_in_any_order(arg):
    config = recipes.from_arg(arg, "pcpvt_s", 0.2)
    plain = recipes.from_arg(arg.replace(",finetune", ""), "pcpvt_s", 0.2)
    assert config.epochs == 10 and config.epochs < plain.epochs
    lr = config.base_lr * config.batch_size / 512
    assert config.lr is None and lr < (plain.lr or plain.base_lr * plain.batch_size / 512)
    assert config.layer_decay < 1 and config.mixup == config.cutmix == config.augment.erase == 0
    assert config.augment.scale[0] > plain.augment.scale[0]
    assert bool(config.augment.randaugment) == bool(plain.augment.randaugment)


@pytest.mark.parametrize("name", ["pcpvt_s", "pcpvt_b", "pcpvt_l"])
def test_first_block_learns_at_a_twentieth_of_the_heads_rate_in_every_size(name):
    scale = models.layer_decay(models.SPECS[name], recipes.from_arg("npu1,finetune", name, 0.2).layer_decay)
    assert scale("head.weight") == scale("norm.bias") == 1
    assert 0.045 < scale("patch_embeds.0.proj.weight") == scale("blocks.0.0.attn.q.weight") < 0.055


def test_names_are_shortened_to_the_stems_that_cover_exactly_them():
    names = list(models.shapes(models.build("pcpvt_nano", 10)))
    for pattern in (r"^(patch_embeds|pos_block|blocks)\.[01]\.", r"bias$", r"attn", r"^head", r"."):
        picked = [name for name in names if re.search(pattern, name)]
        stems = parameters.stems(picked, names)
        covered = [n for n in names if any(n == s or n.startswith(f"{s}.") or s == "" for s in stems)]
        assert covered == picked
    assert parameters.stems([n for n in names if n.startswith("blocks.0.") or n == "head.bias"], names) == [
        "blocks.0",
        "head.bias",
    ]
