"""Several labels per image, the pure part: the loss against PyTorch's, the metrics against scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference import nano, nchw, timm_model

from pcpvt import api
from pcpvt.functional import mixing, multilabel, optim, precision, schedules, state, tasks
from pcpvt.functional.objective import IMAGENET_MEAN, IMAGENET_STD, make_objective
from pcpvt.functional.step import make_step
from pcpvt.models import pcpvt

CLASSES = 6
WEIGHTS = torch.tensor([0.5, 3.0, 0.0, 1.0, 2.0, 1.0])
TASK = tasks.choose("multilabel")


def batch(n: int, size: int, seed: int = 0) -> dict[str, torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    labels = (torch.rand(n, CLASSES, generator=source) < 0.4).float()
    labels[0] = 0
    return {"image": torch.randint(0, 256, (n, size, size, 3), generator=source, dtype=torch.uint8), "label": labels}


def normalised(images: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(values) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (images.float() - 255 * mean) / (255 * std)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("mixed", [False, True])
def test_the_loss_is_torchs_binary_cross_entropy_with_logits(mixed, smoothing, weights):
    model = pcpvt.build("pcpvt_nano", CLASSES, task="multilabel")
    params = {n: v.float().requires_grad_() for n, v in nano(CLASSES)[1].items()}
    data = batch(8, 32)
    x, targets = normalised(data["image"]), data["label"] * (1 - smoothing) + smoothing / 2
    if mixed:
        lam = torch.rand(8, generator=torch.Generator().manual_seed(1))
        data |= {"lam": lam, "box": torch.zeros(8, 4, dtype=torch.int32)}
        x = mixing.mix_images(x, lam, data["box"])
        partners = targets[[1, 0, 3, 2, 5, 4, 7, 6]]
        targets = lam[:, None] * targets + (1 - lam)[:, None] * partners
    value = make_objective(model, smoothing=smoothing, class_weights=weights)(params, data, torch.tensor(1 / 8))
    expected = F.binary_cross_entropy_with_logits(pcpvt.apply(model, params, x), targets, weight=weights)
    torch.testing.assert_close(value, expected)
    ours, reference = (torch.autograd.grad(v, params["head.weight"], retain_graph=True)[0] for v in (value, expected))
    torch.testing.assert_close(ours, reference)


def test_three_steps_equal_timms_model_in_a_plain_loop():
    """float64: rounding over three steps stays below 1e-9 of the weights."""
    network = timm_model("pcpvt_s", CLASSES).double().train()
    params = {n: p.detach().clone() for n, p in network.named_parameters()}
    model = pcpvt.build("pcpvt_s", CLASSES, task="multilabel")
    policy, groups = precision.parse("float64"), optim.groups(params, 0.0)
    optimizer = optim.chain(optim.adamw(schedules.constant(1e-3), groups, (0.9, 0.999), 1e-8))
    step = make_step(make_objective(model, smoothing=0.1, policy=policy), optimizer, global_batch=4, policy=policy)
    params = optim.lay_out(params, groups)
    ours = state.create(params, optimizer.init(params), {}, ema=False)
    theirs = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.0, eps=1e-8)
    for seed in range(3):
        data = batch(4, 32, seed)
        ours, metrics = step(ours, data)
        targets = data["label"].double() * 0.9 + 0.05
        loss = F.binary_cross_entropy_with_logits(network(nchw(normalised(data["image"]).double())), targets)
        theirs.zero_grad()
        loss.backward()
        theirs.step()
        assert metrics["loss"].item() == pytest.approx(loss.item(), rel=1e-9)
    expected = dict(network.named_parameters())
    worst = max((ours.params[name] - value).abs().max().item() for name, value in expected.items())
    assert worst < 1e-9


def scored(n: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits with many equal ones, and labels of which some classes have none."""
    draws = np.random.default_rng(seed)
    labels = draws.random((n, classes)) < draws.random(classes) * 0.5
    labels[:, 0] = False
    return np.round(draws.standard_normal((n, classes)) + labels, 1).astype(np.float32), labels


@pytest.mark.parametrize("threshold", [0.5, 0.3])
def test_metrics_are_scikit_learns(threshold):
    sklearn = pytest.importorskip("sklearn.metrics")
    logits, labels = scored(300, 9, 0)
    logits[:, 1] = -9  # neither predicted nor, below, a label
    labels[:, 1] = False
    sums = tasks.choose("multilabel", threshold).sums(
        torch.from_numpy(logits), torch.from_numpy(labels).float(), torch.ones(300, dtype=torch.bool)
    )
    found = multilabel.summarize({name: value.tolist() for name, value in sums.items()})
    predicted = torch.from_numpy(logits).sigmoid().numpy() >= threshold
    for name in ("macro", "micro"):
        expected = sklearn.f1_score(labels, predicted, average=name, zero_division=np.nan)
        assert found[f"{name}_f1"] == pytest.approx(100 * expected)
    assert found["loss"] == pytest.approx(
        F.binary_cross_entropy_with_logits(torch.from_numpy(logits), torch.from_numpy(labels).float()).item()
    )
    precision = multilabel.average_precision(logits, labels)
    assert precision[:2] == [None, None]
    expected = [sklearn.average_precision_score(labels[:, i], logits[:, i]) for i in range(2, 9)]
    assert precision[2:] == pytest.approx(expected)
    order = np.random.default_rng(1).permutation(300)
    assert multilabel.average_precision(logits[order], labels[order]) == precision


def test_padding_and_rows_that_are_not_finite():
    logits = torch.tensor([[9.0, -9.0], [9.0, 9.0], [float("nan"), 9.0]])
    labels, valid = torch.tensor([[1.0, 0], [1, 1], [1, 1]]), torch.tensor([True, False, True])
    found = TASK.sums(logits, labels, valid)
    assert {name: found[name].tolist() for name in ("seen", "labels", "hits", "predicted")} == {
        "seen": 2, "labels": [2, 1], "hits": [1, 0], "predicted": [1, 0],
    }  # fmt: skip
    assert found["loss"].isnan()


def test_averaged_probabilities_survive_certainty():
    sure, unsure = torch.tensor([[200.0, -200.0, 2.0]]), torch.tensor([[0.0, 0.0, -1.0]])
    found = TASK.average([sure, unsure])
    torch.testing.assert_close(found.sigmoid(), (sure.sigmoid() + unsure.sigmoid()) / 2)
    torch.testing.assert_close(TASK.average([sure, sure]), sure)


def test_the_api_reads_a_models_task():
    model = pcpvt.build("pcpvt_nano", CLASSES, task="multilabel")
    params, data = {n: v.float() for n, v in nano(CLASSES)[1].items()}, batch(3, 32)
    probabilities = api.logits(model, params, data["image"]).sigmoid()
    names, threshold = list("abcdef"), probabilities.median().item()
    found = api.classify(model, params, data["image"], names, threshold=threshold)
    for row, listed in zip(probabilities.tolist(), found, strict=True):
        over = sorted(((p, name) for p, name in zip(row, names, strict=True) if p >= threshold), reverse=True)
        assert listed == [(name, p) for p, name in over]
    _, metrics = api.train_step(model)(api.train_state(params), data)
    x = normalised(data["image"])
    expected = F.binary_cross_entropy_with_logits(pcpvt.apply(model, params, x), data["label"])
    assert metrics["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
