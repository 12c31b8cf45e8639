"""Schedules of the learning rate and of the EMA's decay: pure functions of the step, in float64 on the host."""

import math
from collections.abc import Callable

Schedule = Callable[[int], float]


def constant(lr: float) -> Schedule:
    return lambda step: lr


def warmup_cosine(lr: float, steps: int, warmup: int, warmup_lr: float = 1e-6, min_lr: float = 1e-5) -> Schedule:
    """Linear from `warmup_lr` to `lr` over `warmup` steps, then half a cosine to `min_lr` at `steps`."""
    low = min(min_lr, lr)  # a fine-tuning run may set lr below the recipe's min_lr

    def schedule(step: int) -> float:
        if step < warmup:
            return warmup_lr + (lr - warmup_lr) * step / warmup
        progress = min((step - warmup) / max(steps - warmup, 1), 1.0)
        return low + 0.5 * (lr - low) * (1.0 + math.cos(math.pi * progress))

    return schedule


def reference(
    lr: float, epochs: float, warmup_epochs: float, epoch_of: Callable[[int], int],
    warmup_lr: float = 1e-6, min_lr: float = 1e-5,
) -> Schedule:  # fmt: skip
    """The Twins reference code's schedule: constant within an epoch and one epoch late.

    It is stepped after each epoch with that epoch's number, so epochs 0 and 1 both run at `warmup_lr` (at `lr` without
    warm-up). The cosine counts from epoch 0 and applies from the end of the warm-up.

    Args:
        epoch_of: step to epoch number.
    """

    def schedule(step: int) -> float:
        t = epoch_of(step) - 1
        if t < 0:
            return warmup_lr if warmup_epochs else lr
        if t < warmup_epochs:
            return warmup_lr + (lr - warmup_lr) * t / warmup_epochs
        if t >= epochs:
            return min_lr
        return min_lr + 0.5 * (lr - min_lr) * (1.0 + math.cos(math.pi * t / epochs))

    return schedule


def ema_decay(limit: float, step: int) -> float:
    """The EMA's decay at a step, counted from 0: min(limit, (1 + step) / (10 + step)).

    The average begins as the initial weights, which a constant decay near 1 would keep in it for the whole of a short
    run. With this one it covers about the last ninth of the steps, until the limit is reached after 9 / (1 - limit).

    Source: TensorFlow's `tf.train.ExponentialMovingAverage` with `num_updates`.
    """
    return min(limit, (1 + step) / (10 + step))
