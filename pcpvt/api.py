"""Python API for notebooks and other programs: plain functions of `(model, params)`, on any device.

    from pcpvt import api
    net = api.load("runs/pcpvt_s")                                           # model, params, classes, size, crop
    image = api.read("photo.jpg", net.size, net.crop, net.reading)           # uint8 [1, h, w, 3]
    print(api.classify(net.model, net.params, image, net.classes))           # [[("cat", 0.93), ("dog", 0.04), ...]]
    maps = api.features(net.model, net.params, image)                        # four maps [1, c, h, w], strides 4 to 32
    state, metrics = api.train_step(net.model)(api.train_state(net.params), dict(image=image, label=torch.tensor([3])))

Images are uint8 and NHWC everywhere; the functions normalise them. For more, see `pcpvt.models.pcpvt` (`apply`, and
`intermediates`, with attention maps on request) and `pcpvt.functional`.
"""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pcpvt import devices
from pcpvt.checkpoints.load import class_names, load_model
from pcpvt.config.fields import DEVICES
from pcpvt.data import augment
from pcpvt.data.decode import RGB, ImageSource, Picture, Reading
from pcpvt.functional import mixing, optim, schedules, tasks
from pcpvt.functional import state as states
from pcpvt.functional import step as steps
from pcpvt.functional.objective import make_objective, make_predict, normalisation
from pcpvt.functional.state import TrainState
from pcpvt.models import pcpvt
from pcpvt.models.layers import PLAIN, Kernels
from pcpvt.models.pcpvt import PCPVT, Params

Step = Callable[[TrainState, dict[str, Tensor]], tuple[TrainState, dict[str, Tensor]]]


class Loaded(NamedTuple):
    """A network and the preprocessing of its images."""

    model: PCPVT  # the structure
    params: Params  # float32, by the reference checkpoints' names
    classes: list[str]  # names of the outputs
    size: tuple[int, int]  # (height, width) of the images it is evaluated with
    crop: float  # side of the evaluation crop divided by the resized short side
    reading: Reading = RGB  # the channels of its images, and the range of values of more than 8 bits


def load(path: str | Path, which: str = "auto") -> Loaded:
    """A workdir's best checkpoint, a checkpoint file, weights of timm or of the Twins authors, or `timm:NAME`.

    Size, crop, classes and normalisation are what the file says about itself, as exports of pcpvt and timm's models do.

    Args:
        which: "params", "ema", or "auto": of checkpoints of pcpvt the averaged weights, where there are some.

    Raises:
        UserError: one line, when the file is missing, damaged or of another model.
    """
    loaded = load_model(path, which=which)
    said = loaded.said
    reading = Reading(loaded.model.in_chans, said.value_range)
    size, crop = said.size or (224, 224), said.crop or 0.875
    return Loaded(loaded.model, loaded.params, class_names(loaded), size, crop, reading)


def read(source: ImageSource, size: tuple[int, int], crop: float = 0.875, reading: Reading = RGB) -> Tensor:
    """An image preprocessed for evaluation, uint8 `[1, height, width, channels]`: short side resized, centre cropped.

    Args:
        source: a path, bytes, an open file, a PIL image, or an array `[h, w(, bands)]`.
        reading: its channels, and the range of values of more than 8 bits; of a loaded network: `Loaded.reading`.

    Raises:
        DecodeError: the image cannot be read.
    """
    picture = Picture(source, reading=reading)
    if picture.depth.unused:
        warnings.warn(picture.depth.unused, stacklevel=2)
    return torch.from_numpy(augment.eval_sample(picture, size, crop).copy())[None]


def logits(model: PCPVT, params: Params, images: Tensor) -> Tensor:
    """Logits `[b, classes]` of uint8 images `[b, h, w, channels]`; without gradients."""
    return make_predict(model, kernels=_kernels(images))(params, images)


def classify(
    model: PCPVT, params: Params, images: Tensor, classes: Sequence[str], top: int = 5, threshold: float = 0.5
) -> list[list[tuple[str, float]]]:
    """The `top` most probable classes of each of the uint8 images `[b, h, w, channels]`, with their probabilities.

    Of a model of several labels per image (`model.task`) instead all classes whose probability is at least `threshold`.
    """
    probabilities = tasks.choose(model.task).probabilities(logits(model, params, images))
    values, indices = probabilities.sort(descending=True, stable=True)
    counts = [top] * len(values)
    if model.task == "multilabel":
        counts = (probabilities >= threshold).sum(1).tolist()
    rows = zip(indices.tolist(), values.tolist(), counts, strict=True)
    return [[(classes[i], p) for i, p in zip(own[:n], ps[:n], strict=True)] for own, ps, n in rows]


def features(model: PCPVT, params: Params, images: Tensor) -> list[Tensor]:
    """Four maps `[b, c, h, w]` at strides 4 to 32 of uint8 images `[b, h, w, channels]`; differentiable in `params`."""
    normalised = mixing.decode_images(images, None, *normalisation(model.in_chans))
    return pcpvt.features(model, params, normalised, kernels=_kernels(images))


def train_state(params: Params) -> TrainState:
    """The state before the first step, AdamW's moments at zero; copies the params, since steps reuse the memory."""
    groups = optim.groups(params, 0.0)
    own = optim.lay_out(params, groups)
    return states.create(own, _adamw(groups, 0.0).init(own), {}, ema=False, device=own.flat.device)


def train_step(model: PCPVT, lr: float = 1e-4, weight_decay: float = 0.05, smoothing: float = 0.0) -> Step:
    """`step(state, batch) -> (state, metrics)`: loss, gradient, AdamW; reuses the memory of the state it is given.

    The batch holds `image`, uint8 `[b, h, w, channels]`, and `label`, int64 `[b]` (of several labels per image:
    multi-hot rows, float `[b, classes]`), and may hold the draws of `data.loader`. Metrics are `loss` (the mean over
    the batch, before the update), `grad_norm` and `skipped`.
    """

    def step(state: TrainState, batch: dict[str, Tensor]) -> tuple[TrainState, dict[str, Tensor]]:
        objective = make_objective(model, smoothing=smoothing, kernels=_kernels(batch["image"]))
        optimizer = optim.chain(_adamw(optim.groups(state.params, weight_decay), lr))
        return steps.make_step(objective, optimizer, global_batch=len(batch["label"]))(state, batch)

    return step


def _kernels(images: Tensor) -> Kernels:
    """Exact kernels of the images' device."""
    kind = images.device.type
    return devices.get(kind).plain_kernels() if kind in DEVICES else PLAIN


def _adamw(groups: list[optim.Group], lr: float) -> optim.Optimizer:
    return optim.adamw(schedules.constant(lr), groups)
