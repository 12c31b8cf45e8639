"""The session of one process (config, device, processes, precision, kernels), and how modes open data and models."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict
from torch import Tensor

from pcpvt import devices
from pcpvt.config.cli import Command
from pcpvt.data import classes, sources
from pcpvt.data.loader import EvalBatches, Loader, TrainBatches, default_workers
from pcpvt.devices import base
from pcpvt.devices.compile import backend, compiled, compiled_blocks, value_and_grad
from pcpvt.distributed import collectives
from pcpvt.distributed.collectives import World
from pcpvt.errors import UserError
from pcpvt.functional import precision
from pcpvt.functional.objective import make_predict
from pcpvt.functional.precision import Policy
from pcpvt.models import pcpvt
from pcpvt.models.layers import PLAIN, Kernels
from pcpvt.runtime.console import warn_once


class Session(NamedTuple):
    """What every mode starts from; immutable."""

    config: ConfigDict
    workdir: Path
    device: base.Device
    world: World
    policy: Policy
    size: tuple[int, int]  # height, width
    kernels: Kernels
    command: Command | None = None  # as given; None where the program was not started by a command line

    @property
    def preprocessing(self) -> str:
        """What images are evaluated as, for the log."""
        return f"{self.size[0]}x{self.size[1]} px, crop {self.config.eval.crop:g}, {self.policy}"

    @property
    def checkpoints(self) -> Path:
        return self.workdir / "checkpoints"

    def compute(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """Parameters on the device in the compute dtype."""
        here = {name: value.to(self.device.torch) for name, value in params.items()}
        return precision.cast(here, self.policy, self.device.fp32_norms)

    def inference(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """`compute`, with weights packed once for repeated evaluation."""
        return self.kernels.prepack(self.compute(params))

    def predictor(self, model: pcpvt.PCPVT) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
        """`(params, uint8 images [b, h, w, 3]) -> logits [b, classes]`, compiled as `config.compile` says."""
        predict = make_predict(model, policy=self.policy, kernels=self.kernels)
        return compiled(predict, self.device, self.config.compile, warn_once)

    def value_and_grad(self) -> Callable:
        """The gradient implementation for `functional.step.make_step`."""
        return value_and_grad(self.device, self.config.compile, warn_once)


def start(config: ConfigDict, workdir: Path, command: Command | None = None) -> Session:
    """Join the process group, bind the device, and choose precision and kernels.

    Raises:
        UserError: when the device, the number of processes or the precision is not available here.
    """
    device = devices.get(config.device)
    world = collectives.join(device, config.timeout)
    policy = precision.parse(device.precision() if config.precision == "auto" else config.precision)
    device.check_precision(policy.compute)
    kernels = _choose_kernels(config, device, policy)
    return Session(config, workdir, device, world, policy, image_size(config), kernels, command)


def image_size(config: ConfigDict) -> tuple[int, int]:
    return config.image_size, config.image_width or config.image_size


def open_data(session: Session, split: str) -> sources.Dataset:
    """One split of the configured data set."""
    config = session.config
    name = config.data.name or "folder"
    found = sources.open_split(name, config.data.path, split, session.size, config.num_classes, config.data.val_split)
    return classes.arrange(found, config.data.class_order, config.data.class_map)


def count_classes(config: ConfigDict, source: sources.Dataset) -> int:
    """`config.num_classes`, which must cover the data's classes, or their number if it is unset."""
    found = len(source.classes)
    if config.num_classes is None:
        return found
    if config.num_classes < found:
        raise UserError(f"config.num_classes: {config.num_classes} but the data have {found} classes: leave it unset")
    return config.num_classes


def _choose_kernels(config: ConfigDict, device: base.Device, policy: Policy) -> Kernels:
    """The device's kernels for the compute dtype, or the plain ones, as `config.kernels` and `config.compile` say."""
    own = PLAIN
    if config.kernels != "plain":
        own = device.kernels(policy.compute, compiled=backend(device, config.compile) != "none")
    return compiled_blocks(own, device, config.compile, warn_once)


def build_model(config: ConfigDict, num_classes: int) -> pcpvt.PCPVT:
    return pcpvt.build(config.model.name, num_classes, config.model.pad)


def workers(session: Session, dataset: sources.Dataset) -> int:
    """Loader processes per training process: `config.data.workers`, or a share of the host's cores."""
    configured = session.config.data.workers
    return (
        configured
        if configured >= 0
        else default_workers(dataset, base.cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    )


def open_loader(
    session: Session, batches: TrainBatches | EvalBatches, indices: Sequence[int], processes: int | None = None
) -> Loader:
    """A loader of the batches with these indices, by `processes` loader processes (default: see `workers`)."""
    if processes is None:
        processes = workers(session, batches.dataset)
    return Loader(batches, indices, processes, start=session.device.worker_start, pin=session.device.pins_memory)
