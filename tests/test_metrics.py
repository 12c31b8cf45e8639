"""Evaluation metrics: the counts of torch.topk; ties, rows that are not finite, and padding."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pcpvt.functional import metrics

NAN, INF = float("nan"), float("inf")


def sums(logits: list[list[float]], labels: list[int]) -> dict[str, float]:
    found = metrics.sums(torch.tensor(logits), torch.tensor(labels), torch.ones(len(labels), dtype=torch.bool))
    return {name: value.item() for name, value in found.items()}


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
    summary = metrics.summarize({name: value.item() for name, value in found.items()})
    assert summary["acc1"] == pytest.approx(100 * hits[:, 0].double().mean().item()) and summary["seen"] == 150


def test_of_equal_scores_the_lower_class_ranks_higher():
    assert sums([[0.0] * 7] * 7, list(range(7)))["top1"] == 1
    assert sums([[0.0] * 7] * 7, list(range(7)))["top5"] == 5


@pytest.mark.parametrize("row", [[NAN, 1.0, NAN], [NAN, 1.0, 0.0], [INF, INF, 0.0], [-INF, 1.0, 0.0], [0.0, NAN, 0.0]])
def test_a_row_that_is_not_finite_counts_as_wrong(row):
    found = sums([row, [0.0, 1.0, 0.0]], [1, 1])
    assert (found["seen"], found["top1"], found["top5"]) == (2, 1, 1)
