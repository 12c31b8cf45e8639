"""The processes of a run as a World: who am I, sums over all, agreement, and joining and leaving."""

from __future__ import annotations

import datetime
import os
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from pcpvt.devices.base import Device
from pcpvt.errors import UserError

TIMEOUT = 2100  # seconds; above the 1800 of HCCL_CONNECT_TIMEOUT and HCCL_EXEC_TIMEOUT, so HCCL reports first


class World(NamedTuple):
    """This process among those of the run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def from_environment() -> World | None:
    """The place that torchrun gave this process, or None outside it."""
    if "WORLD_SIZE" not in os.environ or "RANK" not in os.environ:
        return None
    return World(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_RANK", 0)))


def join(device: Device, processes: int) -> World:
    """Binds this process to its device and joins the group when there are several processes.

    Raises:
        UserError: when torchrun started another number of processes than the config asks for.
    """
    world = from_environment() or World()
    if world.size != processes:
        raise UserError(
            f"config.processes: {processes} but {world.size} were started: give ARG the number that torchrun starts"
        )
    device.require(int(os.environ.get("LOCAL_WORLD_SIZE", world.size)))
    device.bind(world.local_rank)
    if world.size > 1:
        timeout = datetime.timedelta(seconds=float(os.environ.get("PCPVT_TIMEOUT", TIMEOUT)))
        dist.init_process_group(device.backend, timeout=timeout)
    return world


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def psum(tensors: list[Tensor]) -> list[Tensor]:
    """Sums of each tensor over all processes, through one flat bucket; the same order of addition on every call."""
    if not dist.is_initialized():
        return tensors
    bucket = torch.cat([t.reshape(-1) for t in tensors])
    dist.all_reduce(bucket)
    pieces = bucket.split([t.numel() for t in tensors])
    return [piece.view_as(t) for piece, t in zip(pieces, tensors, strict=True)]


def sum_numbers(values: list[float]) -> list[float]:
    """Sums of host numbers over all processes, in float64."""
    if not dist.is_initialized():
        return values
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor)
    return tensor.tolist()


def any_true(value: bool) -> bool:
    """Whether any process says True; every process gets the same answer."""
    return sum_numbers([float(value)])[0] > 0


def barrier() -> None:
    sum_numbers([0.0])
