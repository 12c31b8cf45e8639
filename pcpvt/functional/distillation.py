"""Knowledge distillation: the loss towards a teacher's logits, and images in the teacher's size and normalisation.

Soft targets are those of Hinton et al. 2015: the Kullback-Leibler divergence of the student's probabilities from the
teacher's, both at temperature T, times T squared, so that the gradient keeps its size whatever T is. Hard targets are
those of DeiT (Touvron et al. 2021): the loss of the task with the teacher's answers as labels.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from pcpvt.functional.mixing import channels
from pcpvt.functional.tasks import Task

MODES = ("soft", "hard")


class Distillation(NamedTuple):
    """How a student learns from a teacher beside its labels."""

    mode: str = "soft"  # one of MODES
    temperature: float = 1.0  # of soft targets
    weight: float = 0.5  # share of this loss; the loss of the labels has the rest


def make_loss(task: Task, how: Distillation) -> Callable[[Tensor, Tensor], Tensor]:
    """`(logits, teacher's logits) -> loss of each sample [b]`; both are `[b, classes]`.

    With several labels per image each class is a distribution of its own, over yes and no, and the loss is the mean
    over the classes, as the task's own is.
    """

    def soft(logits: Tensor, teacher: Tensor) -> Tensor:
        logits, teacher = logits / how.temperature, teacher / how.temperature
        targets = task.probabilities(teacher)
        # The divergence is the cross-entropy less the entropy of the targets.
        return (task.loss(logits, targets, None) - task.loss(teacher, targets, None)) * how.temperature**2

    def hard(logits: Tensor, teacher: Tensor) -> Tensor:
        targets = task.targets(task.answers(teacher), None, logits.shape[1], 0.0, logits.dtype)
        return task.loss(logits, targets, None)

    return {"soft": soft, "hard": hard}[how.mode]


def resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Images `[b, h, w, c]` in another (height, width): bicubic, with antialiasing where they shrink."""
    if images.shape[1:3] == size:
        return images
    channels_first = rearrange(images, "b h w c -> b c h w")
    resized = F.interpolate(channels_first, size, mode="bicubic", antialias=True, align_corners=False)
    return rearrange(resized, "b c h w -> b h w c")


Normalisation = tuple[Sequence[float], Sequence[float]]  # mean and standard deviation per channel, for values in 0..1


def renormalise(images: Tensor, here: Normalisation, there: Normalisation) -> Tensor:
    """Images `[b, h, w, c]` that are normalised as `here`, normalised as `there`."""
    scale = [own / other for own, other in zip(here[1], there[1], strict=True)]
    shift = [(own - other) / std for own, other, std in zip(here[0], there[0], there[1], strict=True)]
    if set(scale) == {1.0} and set(shift) == {0.0}:
        return images
    return images * channels(scale, images) + channels(shift, images)
