"""The training objective and the predict function: pure functions from pixels to the loss and to logits."""

from collections.abc import Callable

import torch
from torch import Tensor

from pcpvt.functional import distillation, mixing, tasks
from pcpvt.functional.distillation import Distillation
from pcpvt.functional.precision import FLOAT32, Policy
from pcpvt.models import pcpvt
from pcpvt.models.layers import PLAIN, Kernels

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Batch = dict[str, Tensor]


def normalisation(channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of images with so many channels, for values in 0..1.

    ImageNet's for RGB; for other channels the average of its three, 0.449 and 0.226.
    """
    if channels == 3:
        return IMAGENET_MEAN, IMAGENET_STD
    mean, std = (round(sum(values) / 3, 6) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (mean,) * channels, (std,) * channels


def training_images(batch: Batch, channels: int) -> Tensor:
    """The images that a model learns from, `[b, h, w, channels]` in float32: normalised, erased and mixed."""
    x = mixing.decode_images(batch["image"], batch.get("erase"), *normalisation(channels))
    return mixing.mix_images(x, batch["lam"], batch["box"]) if "lam" in batch else x


def make_objective(
    model: pcpvt.PCPVT, *, smoothing: float = 0.0, class_weights: Tensor | None = None, policy: Policy = FLOAT32,
    kernels: Kernels = PLAIN, distill: Distillation | None = None,
) -> Callable[[pcpvt.Params, Batch, Tensor], Tensor]:  # fmt: skip
    """`(params, batch, factor) -> factor * sum of losses`; params are in the compute dtype already.

    A sample's loss is that of the model's task: `metrics.cross_entropy`, or `multilabel.cross_entropy`. It is not
    divided by the sum of the `class_weights` `[classes]`, on the device, so that the loss stays a plain sum over
    samples, whatever the batch is cut into.

    The batch holds uint8 images `[b, h, w, channels]`, labels (int64 `[b]`, or multi-hot `[b, classes]`), and the
    recipe's random draws: `erase`, `lam` and `box`, `drop_path_scale` (see `data.loader`). The loss is
    computed in the policy's output dtype.

    With `distill` the batch also holds the logits of a `teacher` `[b, classes]` (see `step.with_teacher`), and a
    sample's loss is (1 - weight) times the task's, which alone has the class weights, plus weight times
    `distillation.make_loss`.
    """

    task = tasks.choose(model.task)
    towards = distill and distillation.make_loss(task, distill)

    def objective(params: pcpvt.Params, batch: Batch, factor: Tensor) -> Tensor:
        x = training_images(batch, model.in_chans)
        targets = task.targets(batch["label"], batch.get("lam"), model.num_classes, smoothing, policy.output)
        logits = pcpvt.apply(model, params, x.to(policy.compute), batch.get("drop_path_scale"), kernels=kernels)
        logits = logits.to(policy.output)
        loss = task.loss(logits, targets, class_weights)
        if distill is not None and towards is not None:
            taught = towards(logits, batch["teacher"].to(policy.output))
            loss = (1 - distill.weight) * loss + distill.weight * taught
        return loss.sum() * factor

    return objective


def make_predict(
    model: pcpvt.PCPVT, *, policy: Policy = FLOAT32, kernels: Kernels = PLAIN
) -> Callable[[pcpvt.Params, Tensor], Tensor]:
    """`(params, uint8 images [b, h, w, channels]) -> logits [b, classes]`; params are in the compute dtype already."""

    def predict(params: pcpvt.Params, images: Tensor) -> Tensor:
        x = mixing.decode_images(images, None, *normalisation(model.in_chans))
        with torch.no_grad():
            return pcpvt.apply(model, params, x.to(policy.compute), kernels=kernels).to(policy.output)

    return predict
