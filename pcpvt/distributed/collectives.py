"""The processes of a run: rank and size, sums over all processes, joining and leaving.

A process that dies or hangs ends the run: the others detect it within `config.timeout` seconds and exit with a
`PeerError` that names its rank.
"""

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

ROLL_CALL = 2.0  # seconds in which all live ranks report a failure; they detect a lost connection within milliseconds


class World(NamedTuple):
    """This process among those of the run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0


class _Group:
    """The process group that this process has joined."""

    world = World()
    timeout = 0  # seconds
    store: dist.Store | None = None  # key-value store shared by all ranks; works when collectives do not
    broken = False  # a collective has failed: the group is not destroyed, because that needs all ranks


_group = _Group()


def from_environment() -> World | None:
    """This process's place as torchrun has set it, or None outside torchrun."""
    if "WORLD_SIZE" not in os.environ or "RANK" not in os.environ:
        return None
    return World(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_RANK", 0)))


def join(device: Device, timeout: int) -> World:
    """Binds this process to its device and joins the process group if there are several processes.

    Args:
        timeout: seconds that any process waits for the others, now and in every collective.

    Raises:
        UserError: if this host does not have the devices.
        PeerError: if other processes do not join in time.
    """
    world = from_environment() or World()
    device.require(int(os.environ.get("LOCAL_WORLD_SIZE", world.size)))
    device.bind(world.local_rank)
    if world.size > 1:
        limit = datetime.timedelta(seconds=timeout)
        _group.world, _group.timeout = world, timeout
        with _peer_errors():
            store, *_ = next(dist.rendezvous("env://", timeout=limit))
            _group.store = dist.PrefixStore("pcpvt", store)
            dist.init_process_group(device.backend, store=store, rank=world.rank, world_size=world.size, timeout=limit)
    return world


def leave() -> None:
    if dist.is_initialized() and not _group.broken:
        dist.destroy_process_group()
        _group.store = None


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
    """Whether `value` is True in any process; every process gets the same answer."""
    return sum_numbers([float(value)])[0] > 0


def barrier() -> None:
    sum_numbers([0.0])


def first_to_say(text: str) -> bool:
    """Whether no other process has printed this text yet, so that a message of all processes is printed once."""
    return _increment(f"said/{text}") == 1


def explains(error: Exception) -> bool:
    """Whether to print the error that ends this process: each text once, a PeerError only if it is the first error."""
    return first_to_say(str(error)) and (_increment("errors") == 1 or not isinstance(error, PeerError))


def _increment(key: str) -> int:
    """The value of a shared counter after adding 1."""
    if _group.store is None:  # not joined: errors at this point occur in all processes of a host alike
        return 1 + int(os.environ.get("LOCAL_RANK", 0))
    try:
        return _group.store.add(key, 1)
    except RuntimeError:  # the store's host is down
        return 1


@contextlib.contextmanager
def _peer_errors() -> Iterator[None]:
    """Turns the failure of a collective into a PeerError that names the missing ranks."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # the types of torch.distributed are subclasses, and gloo raises RuntimeError itself
        _group.broken = True
        reason = str(error).strip().splitlines()[0]
        missing = _roll_call()
        if missing and re.search("timed? ?out", reason.lower()):
            what = f"gave no answer within {_group.timeout} s (config.timeout): hung, or far slower than the others"
        else:
            what, missing = f"lost: {reason}", missing or ["the connection between processes is"]
        raise PeerError(f"{', '.join(missing)} {what}") from error


def _roll_call() -> list[str]:
    """The ranks that have not detected the failure themselves: they are dead, or hang outside the collective."""
    if _group.store is None:
        return []
    try:
        _group.store.set(f"noticed/{_group.world.rank}", "")
        time.sleep(ROLL_CALL)
        return [f"rank {rank}" for rank in range(_group.world.size) if not _group.store.check([f"noticed/{rank}"])]
    except RuntimeError:
        return []
