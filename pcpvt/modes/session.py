"""What every mode needs before its own work: the device and the world, the data, the model, the policy."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict
from torch import Tensor

from pcpvt import devices
from pcpvt.data import sources
from pcpvt.data.loader import default_workers
from pcpvt.devices import base, collectives
from pcpvt.devices.collectives import World
from pcpvt.devices.compilation import backend, compiled_blocks
from pcpvt.errors import UserError
from pcpvt.functional import precision
from pcpvt.functional.precision import Policy
from pcpvt.models import pcpvt
from pcpvt.models.layers import PLAIN, Kernels


class Session(NamedTuple):
    """The surroundings of one process; nothing of it changes after start."""

    config: ConfigDict
    workdir: Path
    device: base.Device
    world: World
    policy: Policy
    size: tuple[int, int]  # height, width

    @property
    def checkpoints(self) -> Path:
        return self.workdir / "checkpoints"

    def compute(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """Parameters on the device in the compute dtype."""
        here = {name: value.to(self.device.torch) for name, value in params.items()}
        return precision.cast(here, self.policy, self.device.wide_norms)

    def inference(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """`compute`, as the kernels take parameters that stay as they are."""
        return kernels(self).pack(self.compute(params))


def start(config: ConfigDict, workdir: Path) -> Session:
    """Joins the world, binds the device and settles the precision.

    Raises:
        UserError: when the device, the process count or the precision cannot be had here.
    """
    device = devices.get(config.device)
    world = collectives.join(device, config.timeout)
    policy = precision.parse(device.precision() if config.precision == "auto" else config.precision)
    device.check_precision(policy.compute)
    return Session(config, workdir, device, world, policy, image_size(config))


def image_size(config: ConfigDict) -> tuple[int, int]:
    return config.image_size, config.image_width or config.image_size


def open_data(session: Session, split: str) -> sources.Source:
    """One split of the configured data set."""
    config = session.config
    name = config.data.name or "folder"
    return sources.open_split(name, config.data.path, split, session.size, config.num_classes, config.data.val_split)


def count_classes(config: ConfigDict, source: sources.Source) -> int:
    """The class count from the data, or the configured one when it covers the data."""
    found = len(source.classes)
    if config.num_classes is None:
        return found
    if config.num_classes < found:
        raise UserError(f"config.num_classes: {config.num_classes} but the data have {found} classes: leave it unset")
    return config.num_classes


def kernels(session: Session, choice: str | None = None) -> Kernels:
    """The device's kernels for the model in the compute dtype, or the plain ones, as `config.kernels` says.

    Args:
        choice: what to take for `config.compile`.
    """
    device, choice = session.device, choice or session.config.compile
    own = PLAIN
    if session.config.kernels != "plain":
        own = device.kernels(session.policy.compute, compiled=backend(device, choice) != "none")
    return compiled_blocks(own, device, choice)


def build_model(config: ConfigDict, num_classes: int) -> pcpvt.PCPVT:
    return pcpvt.build(config.model.name, num_classes, config.model.pad)


def workers(session: Session, source: sources.Source) -> int:
    """Loader processes for this training process."""
    configured = session.config.data.workers
    if configured >= 0:
        return configured
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return default_workers(source, base.cores() // local)
