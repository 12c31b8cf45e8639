"""The processes of a run as a World: who am I, sums over all, agreement, and joining and leaving.

A process that dies or hangs ends the run: the others notice within `config.timeout` seconds, say which one it was, and
leave with `PeerError`.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from pcpvt.devices.base import Device
from pcpvt.errors import PeerError

ROLL_CALL = 2.0  # seconds for all that are left to say so; a lost connection reaches them within milliseconds


class World(NamedTuple):
    """This process among those of the run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0


class _Group:
    """What the processes share beside their collectives: a key-value store, outside of any process that may fail."""

    store: dist.Store | None = None
    timeout = 0
    broken = False  # a collective has failed: the group can only be left to itself


def from_environment() -> World | None:
    """The place that torchrun gave this process, or None outside it."""
    if "WORLD_SIZE" not in os.environ or "RANK" not in os.environ:
        return None
    return World(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_RANK", 0)))


def join(device: Device, timeout: int) -> World:
    """Binds this process to its device and joins the group when there are several processes.

    Args:
        timeout: seconds that any process waits for the others, now and later.

    Raises:
        UserError: when this host does not have the devices.
        PeerError: when the others do not come.
    """
    world = from_environment() or World()
    device.require(int(os.environ.get("LOCAL_WORLD_SIZE", world.size)))
    device.bind(world.local_rank)
    if world.size > 1:
        patience = datetime.timedelta(seconds=timeout)
        with _peer_errors(world):
            _Group.timeout = timeout
            store, *_ = next(dist.rendezvous("env://", timeout=patience))
            _Group.store = dist.PrefixStore("pcpvt", store)
            dist.init_process_group(
                device.backend, store=store, rank=world.rank, world_size=world.size, timeout=patience
            )
    return world


def leave() -> None:
    if dist.is_initialized() and not _Group.broken:
        dist.destroy_process_group()
        _Group.store = None


def psum(tensors: list[Tensor]) -> list[Tensor]:
    """Sums of each tensor over all processes, through one flat bucket; the same order of addition on every call."""
    if not dist.is_initialized():
        return tensors
    bucket = torch.cat([t.reshape(-1) for t in tensors])
    with _peer_errors():
        dist.all_reduce(bucket)
    pieces = bucket.split([t.numel() for t in tensors])
    return [piece.view_as(t).to(t.dtype) for piece, t in zip(pieces, tensors, strict=True)]


def sum_numbers(values: list[float]) -> list[float]:
    """Sums of host numbers over all processes, in float64."""
    if not dist.is_initialized():
        return values
    tensor = torch.tensor(values, dtype=torch.float64)
    with _peer_errors():
        dist.all_reduce(tensor)
    return tensor.tolist()


def any_true(value: bool) -> bool:
    """Whether any process says True; every process gets the same answer."""
    return sum_numbers([float(value)])[0] > 0


def barrier() -> None:
    sum_numbers([0.0])


def first_to_say(text: str) -> bool:
    """Whether no other process has said this yet: a warning or an error of all processes is one line, not one each."""
    return _add(f"said/{text}") == 1


def explains(error: Exception) -> bool:
    """Whether an error that ends this process should be shown: once each, and a lost peer only if nobody knows more."""
    return first_to_say(str(error)) and (_add("errors") == 1 or not isinstance(error, PeerError))


def _add(key: str) -> int:
    if _Group.store is None:  # not joined: what goes wrong now does so in all processes of a host
        return 1 + int(os.environ.get("LOCAL_RANK", 0))
    try:
        return _Group.store.add(key, 1)
    except RuntimeError:  # the store went down with its host
        return 1


@contextlib.contextmanager
def _peer_errors(world: World | None = None) -> Iterator[None]:
    """Turns the failure of a collective into a PeerError that names who is missing."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # of torch.distributed: its own types are subclasses, and gloo raises the plain one
        _Group.broken = True
        world = world or World(dist.get_rank(), dist.get_world_size())
        reason = str(error).strip().splitlines()[0]
        missing = _roll_call(world)
        if missing and re.search("timed? ?out", reason.lower()):
            what = f"gave no answer within {_Group.timeout} s (config.timeout): hung, or far slower than the others"
        else:
            what, missing = f"lost: {reason}", missing or ["the connection between processes is"]
        raise PeerError(f"{', '.join(missing)} {what}") from error


def _roll_call(world: World) -> list[str]:
    """The ranks that do not notice the failure themselves: they are dead, or busy with something else."""
    if _Group.store is None:
        return []
    try:
        _Group.store.set(f"noticed/{world.rank}", "")
        time.sleep(ROLL_CALL)
        return [f"rank {rank}" for rank in range(world.size) if not _Group.store.check([f"noticed/{rank}"])]
    except RuntimeError:
        return []
