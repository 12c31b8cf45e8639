"""Weights of the classes in the loss: torch's cross-entropy, scikit-learn's `balanced`, files, and a warning."""

from __future__ import annotations

import json

import miniature
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from pcpvt.data.sources import Arrays
from pcpvt.errors import UserError
from pcpvt.functional import mixing
from pcpvt.functional.objective import IMAGENET_MEAN, IMAGENET_STD, make_objective
from pcpvt.models import pcpvt as models
from pcpvt.models.init import init
from pcpvt.train import class_weights

WEIGHTS = torch.tensor([0.5, 2.0, 0.0, 1.0, 3.0])


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_and_its_gradient_are_those_of_torchs_cross_entropy(mixed, smoothing):
    model = models.build("pcpvt_nano", 5)
    params = {name: value.requires_grad_() for name, value in init(model, 0).items()}
    source = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (8, 32, 32, 3), dtype=torch.uint8, generator=source)
    batch = {"image": image, "label": torch.randint(5, (8,), generator=source)}
    x = mixing.decode_images(image, None, IMAGENET_MEAN, IMAGENET_STD)
    if mixed:
        batch |= {"lam": torch.rand(8, generator=source), "box": torch.zeros(8, 4, dtype=torch.int32)}
        x = mixing.mix_images(x, batch["lam"], batch["box"])
    value = make_objective(model, smoothing=smoothing, class_weights=WEIGHTS)(params, batch, torch.tensor(0.125))
    logits = models.apply(model, params, x)
    soft = mixing.mix_targets(batch["label"], batch.get("lam"), 5, smoothing)
    expected = F.cross_entropy(logits, soft, weight=WEIGHTS)  # the mean over 8
    torch.testing.assert_close(value, expected)
    if not mixed:  # with labels, torch divides the same sum by the sum of the labels' weights
        theirs = F.cross_entropy(logits, batch["label"], weight=WEIGHTS, label_smoothing=smoothing, reduction="sum")
        torch.testing.assert_close(8 * value, theirs)
    ours, reference = (torch.autograd.grad(v, params["head.weight"], retain_graph=True)[0] for v in (value, expected))
    torch.testing.assert_close(ours, reference)
    plain = [make_objective(model, class_weights=w)(params, batch, torch.tensor(1.0)) for w in (None, torch.ones(5))]
    assert torch.equal(*plain)


def test_balanced_weights_are_scikit_learns_and_their_mean_over_the_images_is_1():
    labels = np.repeat(np.arange(4), [7, 1, 30, 2])
    found = class_weights.balanced(np.bincount(labels, minlength=5).tolist())
    assert found == pytest.approx([40 / (4 * 7), 40 / 4, 40 / (4 * 30), 40 / (4 * 2), 0])
    assert np.mean([found[label] for label in labels]) == pytest.approx(1)
    sklearn = pytest.importorskip("sklearn.utils.class_weight")
    assert found[:4] == pytest.approx(sklearn.compute_class_weight("balanced", classes=np.arange(4), y=labels))


def data(*counts: int) -> Arrays:
    labels = np.repeat(np.arange(len(counts)), counts)
    return Arrays(np.zeros((len(labels), 2, 2, 3), np.uint8), labels, [f"k{i}" for i in range(len(counts))], "x")


def test_classes_that_differ_more_than_tenfold_are_a_warning():
    assert class_weights.of_run("none", data(20, 2, 0), 3).warnings == []
    (warning,) = class_weights.of_run("none", data(5, 21, 2), 3).warnings
    assert warning.startswith("the classes differ 10.5-fold in number: k1 has 21 training images, k2 2: ")
    found = class_weights.of_run("balanced", data(5, 21, 2), 4)  # a head with more outputs than classes
    assert found.warnings == [] and found.weights == pytest.approx([28 / 15, 28 / 63, 28 / 6, 0])


def test_a_file_gives_weights_by_name_or_in_order(tmp_path):
    path = tmp_path / "w.txt"
    path.write_text("k1\t3\nother\t9\nk0\t0.5\n")
    assert class_weights.of_run(str(path), data(1, 1), 3).weights == [0.5, 3, 0]
    path.write_text("1\n0\n")
    assert class_weights.of_run(str(path), data(1, 1), 2).weights == [1, 0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("k1\t3\n", r"lacks 1 classes of the data \(k0\)"), ("1\n", "has 1 weights for 2 classes"),
        ("1\nx\n", "'x' is no"), ("1\n-1\n", "'-1' is no weight"), ("1\ninf\n", "'inf' is no weight"),
        ("0\n0\n", "all weights are 0"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_fit_is_one_line(tmp_path, text, message):
    (tmp_path / "w.txt").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        class_weights.read(str(tmp_path / "w.txt"), ["k0", "k1"])
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="give none, balanced or a file"):
        class_weights.read("balance", ["k0", "k1"])


def test_weights_reach_the_training_which_says_them(tmp_path):
    """With weight 0 for one class of two, the first loss of a batch that holds all images is half of the plain one."""
    for split, count in (("train", 24), ("val", 1)):
        for name in ("a", "b"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (32, 32), "grey").save(tmp_path / "data" / split / name / f"{i}.png")
    (tmp_path / "w.txt").write_text("a\t1\nb\t0\n")
    losses = []
    for setting in ("none", str(tmp_path / "w.txt")):
        fields = {"data.path": tmp_path / "data", "steps": 1, "lr": 0, "mixup": 0, "cutmix": 0, "image_size": 32}
        fields |= {"log_every": "1 steps", "class_weights": setting, "data.workers": 0, "label_smoothing": 0}
        workdir = tmp_path / f"run-{len(losses)}"
        ended = miniature.run(miniature.words(workdir, "cpu,folder", **fields))
        assert ended.code == 0, ended.err
        losses.append(miniature.records(workdir)[0]["loss"])
    assert losses[1] == pytest.approx(losses[0] / 2, rel=0.05)  # augmented images of one colour differ a little
    assert f"class weights: {tmp_path / 'w.txt'}, from 1 to 1" in ended.out
    assert json.loads((workdir / "config.json").read_text())["class_weights"] == str(tmp_path / "w.txt")
    (tmp_path / "w.txt").write_text("a\t1\nb\t0.5\n")
    changed = miniature.run(miniature.words(workdir, "cpu,folder", **fields | {"steps": 2}))
    assert changed.code == 2 and "the weights are no longer those that" in changed.error
    assert "(output 1: 0 there, 0.5 here): restore them, or start anew with" in changed.error


def test_a_run_goes_on_with_the_weights_that_it_began_with_only():
    class_weights.check_same("f", "run", [1.0, 0.1], [1.0, 0.1])
    class_weights.check_same("none", "run", None, None)
    weights = class_weights.balanced([15, 63, 0])
    class_weights.check_same("balanced", "run", json.loads(json.dumps(weights)), weights)
    for before in ([1.0, 0.2], None, [1.0]):
        with pytest.raises(UserError, match=r"config\.class_weights: balanced: the weights are no longer .* run was"):
            class_weights.check_same("balanced", "run", before, [1.0, 0.1])
