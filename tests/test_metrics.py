"""Evaluation metrics: the counts of torch.topk; ties, rows that are not finite, and padding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pcpvt.functional import metrics

NAN, INF = float("nan"), float("inf")


def sums(logits: list[list[float]], labels: list[int]) -> dict[str, float]:
    found = metrics.sums(torch.tensor(logits), torch.tensor(labels), torch.ones(len(labels), dtype=torch.bool))
    return {name: value.item() for name, value in found.items() if value.ndim == 0}


def test_counts_and_loss_equal_plain_code_and_padding_is_not_counted():
    draws = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(200, 20, generator=draws), torch.randint(20, (200,), generator=draws)
    valid = torch.arange(200) < 150
    logits[150:] = NAN
    found = metrics.sums(logits, labels, valid)
    hits = logits[:150].topk(5).indices == labels[:150, None]
    assert (found["seen"], found["top1"], found["top5"]) == (150, hits[:, 0].sum(), hits.any(1).sum())
    torch.testing.assert_close(found["loss"], F.cross_entropy(logits[:150], labels[:150], reduction="sum"))
    assert {n: v.dtype for n, v in found.items()} == dict.fromkeys(found, torch.int64) | {"loss": torch.float32}
    summary = metrics.summarize({name: value.tolist() for name, value in found.items()})
    assert summary["acc1"] == pytest.approx(100 * hits[:, 0].double().mean().item()) and summary["seen"] == 150


def test_of_equal_scores_the_lower_class_ranks_higher():
    assert sums([[0.0] * 7] * 7, list(range(7)))["top1"] == 1
    assert sums([[0.0] * 7] * 7, list(range(7)))["top5"] == 5


@pytest.mark.parametrize("row", [[NAN, 1.0, NAN], [NAN, 1.0, 0.0], [INF, INF, 0.0], [-INF, 1.0, 0.0], [0.0, NAN, 0.0]])
def test_a_row_that_is_not_finite_counts_as_wrong(row):
    found = sums([row, [0.0, 1.0, 0.0]], [1, 1])
    assert (found["seen"], found["top1"], found["top5"]) == (2, 1, 1)


def reference(labels: np.ndarray, predicted: np.ndarray, classes: int) -> tuple[float, float]:
    """(balanced accuracy, macro F1) in percent from a confusion matrix, as scikit-learn defines them."""
    matrix = np.zeros((classes, classes))
    np.add.at(matrix, (labels, predicted), 1)
    right, true, found = np.diag(matrix), matrix.sum(1), matrix.sum(0)
    recall = right[true > 0] / true[true > 0]
    precision = np.divide(right, found, out=np.zeros(classes), where=found > 0)
    sensitivity = np.divide(right, true, out=np.zeros(classes), where=true > 0)
    total = precision + sensitivity
    f1 = np.divide(2 * precision * sensitivity, total, out=np.zeros(classes), where=total > 0)
    return 100 * recall.mean(), 100 * f1[(true > 0) | (found > 0)].mean()


@pytest.mark.filterwarnings("ignore:y_pred contains")  # scikit-learn's
@pytest.mark.parametrize("present", [7, 4, 1])
def test_balanced_accuracy_and_macro_f1_equal_plain_code_also_with_classes_that_are_missing(present):
    draws = np.random.default_rng(present)
    labels = draws.choice(present, 300, p=(w := 2.0 ** np.arange(present)) / w.sum())
    logits = torch.from_numpy(draws.standard_normal((300, 9)) + 1.5 * np.eye(9)[labels])
    logits[:, 8] = -9  # a class that is neither labelled nor predicted
    found = metrics.sums(logits, torch.from_numpy(labels), torch.ones(300, dtype=torch.bool))
    summary = metrics.summarize({name: value.tolist() for name, value in found.items()})
    expected = reference(labels, logits.argmax(1).numpy(), 9)
    assert (summary["balanced_acc"], summary["macro_f1"]) == pytest.approx(expected)
    assert found["labels"].tolist() == np.bincount(labels, minlength=9).tolist()
    sklearn = pytest.importorskip("sklearn.metrics")
    theirs = (
        sklearn.balanced_accuracy_score(labels, logits.argmax(1)),
        sklearn.f1_score(labels, logits.argmax(1), average="macro", zero_division=0),
    )
    assert expected == pytest.approx([100 * value for value in theirs])


def test_a_row_that_is_not_finite_is_a_miss_of_its_class_and_predicts_none():
    found = metrics.sums(torch.tensor([[NAN, 1.0], [3.0, 1.0]]), torch.tensor([1, 0]), torch.tensor([True, True]))
    assert [found[name].tolist() for name in metrics.PER_CLASS] == [[1, 1], [1, 0], [1, 0]]
    summary = metrics.summarize({name: value.tolist() for name, value in found.items()})
    assert (summary["balanced_acc"], summary["macro_f1"]) == (50, 50)
    assert metrics.recalls([2, 0], [1, 0]) == [50, None]
