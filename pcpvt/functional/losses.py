"""Cross-entropy in the dtype of the logits (the policy's output dtype, float32), for hard and soft targets."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """-sum(targets * log_softmax(logits)) per sample: `[b, classes], [b, classes] -> [b]`."""
    return -(targets * F.log_softmax(logits, -1)).sum(-1)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Per-sample cross-entropy with integer labels: `[b, classes], [b] -> [b]`."""
    return -F.log_softmax(logits, -1).gather(1, labels[:, None])[:, 0]
