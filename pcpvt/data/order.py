"""The order of samples as a pure function of (seed, step): independent of world size, worker count and resume point.

Training reads one endless stream: the permutation of epoch 0, then of epoch 1, and so on. A global batch is the next
`batch` positions of it, so every batch is full and every sample is seen exactly once per epoch; a batch may span two
epochs. With a balanced sampler (`Balance`) an epoch has as many positions, and every class the same number of them.
"""

import functools
from typing import NamedTuple, TypeVar

import numpy as np

from pcpvt import rng

BLOCK = 128  # distinct samples whose repeats are placed near each other


_Items = TypeVar("_Items", list, np.ndarray)


class Draw(NamedTuple):
    """One position of the stream: the sample and the keys of its random draws."""

    epoch: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which is not used
    copy: int  # of the same sample in an epoch: 0 .. repeats - 1, or as often as a balanced sampler draws it


class Balance:
    """The samples of each class, from labels `[n]`; classes without samples are left out. Compared by identity."""

    def __init__(self, labels: np.ndarray):
        by_class = np.argsort(labels, kind="stable").astype(np.int32)
        self.members = np.split(by_class, np.flatnonzero(np.diff(labels[by_class])) + 1)


@functools.lru_cache(maxsize=2)  # a batch may span two epochs; every loader process keeps them, 10 MB for ImageNet's
def epoch_order(seed: int, epoch: int, examples: int, repeats: int = 1, balance: Balance | None = None) -> np.ndarray:
    """Indices and copies, int32 `[examples, 2]`, of one epoch.

    With repeated augmentation (Hoffer et al. 2020) an epoch has as many draws as without, from 1 / `repeats` of the
    samples. The copies of a sample are within `repeats * BLOCK` positions, and in large datasets never adjacent, where
    mixing would pair them.
    """
    if balance is not None:
        assert repeats == 1  # `resolve.check` has refused it
        return _balanced_order(rng.generator(seed, "balanced order", epoch), examples, balance)
    order = rng.generator(seed, "order", epoch).permutation(examples).astype(np.int32)
    if repeats == 1:
        return np.stack([order, np.zeros_like(order)], 1)
    blocks = [order[i : i + BLOCK] for i in range(0, -(-examples // repeats), BLOCK)]
    rows = [np.stack([b, np.full_like(b, copy)], 1) for b in blocks for copy in range(repeats)]
    return np.concatenate(rows)[:examples]


def _balanced_order(generator: np.random.Generator, examples: int, balance: Balance) -> np.ndarray:
    """Indices and copies, int32 `[examples, 2]`: classes have equally many positions, up to one.

    The positions of a class go round its samples, each as often as the others of its class, up to one; the k-th
    occurrence of a sample is its copy k, so that its random draws differ.
    """
    classes = len(balance.members)
    extra = generator.permutation(classes) < examples % classes  # which classes have the one position more
    parts = []
    for members, more in zip(balance.members, extra, strict=True):
        positions = np.arange(examples // classes + more)
        shuffled = generator.permutation(members)
        parts.append(np.stack([shuffled[positions % len(members)], positions // len(members)], 1).astype(np.int32))
    return generator.permutation(np.concatenate(parts))


def global_batch(
    seed: int, step: int, batch: int, examples: int, repeats: int = 1, balance: Balance | None = None
) -> list[Draw]:
    """The draws of one step, in order, over all processes."""
    draws = []
    for position in range(step * batch, (step + 1) * batch):
        epoch, offset = divmod(position, examples)
        index, copy = epoch_order(seed, epoch, examples, repeats, balance)[offset]
        draws.append(Draw(epoch, int(index), int(copy)))
    return draws


def rank_slice(items: _Items, rank: int, world: int) -> _Items:
    """The contiguous part of a global batch that belongs to one process."""
    size = len(items) // world
    return items[rank * size : (rank + 1) * size]


def evaluation_batches(examples: int, local_batch: int, rank: int, world: int) -> list[range]:
    """One process's evaluation batches: every index once over all processes, and the same number of batches on each.

    The last batches may be short or empty; the loader pads them with invalid rows, so shapes never change.
    """
    per_round = local_batch * world
    rounds = -(-examples // per_round)
    starts = [r * per_round + rank * local_batch for r in range(rounds)]
    return [range(min(s, examples), min(s + local_batch, examples)) for s in starts]
