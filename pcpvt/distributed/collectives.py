"""The processes of a run: rank and size, sums over all processes, joining and leaving.

A process that dies or hangs ends the run: the others detect it within `config.timeout` seconds and exit with a
`PeerError` that names its rank.
"""

import contextlib
import datetime
import math
import os
import time

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pcpvt.devices.base import Device
from pcpvt.distributed import flight, group, hosts
from pcpvt.distributed.group import World
from pcpvt.distributed.peers import answer, peer_errors
from pcpvt.errors import PeerError

UNJOINED = datetime.timedelta(seconds=5)  # to reach the store from a process that ends before it has joined


def from_environment() -> World | None:
    """This process's place as torchrun or `launch` has set it; None in a process that they have not started.

    Schedulers set RANK and WORLD_SIZE too, with the meaning of a host (see `hosts`).
    """
    if not hosts.is_rank(os.environ):
        return None
    return World(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"]))


def local_size() -> int:
    """The number of this run's processes on this host."""
    world = from_environment()
    return int(os.environ.get("LOCAL_WORLD_SIZE", world.size)) if world else 1


def join(device: Device, timeout: int) -> World:
    """Binds this process to its device and joins the process group if there are several processes.

    Args:
        timeout: seconds that any process waits for the others, now and in every collective.

    Raises:
        UserError: if this host does not have the devices.
        PeerError: if other processes do not join in time.
    """
    world = from_environment() or World()
    os.environ.update(device.environment(timeout) | os.environ)  # done already where `launch` has started this process
    device.require(local_size())
    device.bind(world.local_rank)
    if world.size > 1:
        limit = datetime.timedelta(seconds=timeout)
        group.joined.world, group.joined.timeout, group.joined.longest = world, timeout, timeout
        flight.install(device.recording, device.recorded_collectives, world.rank)
        with peer_errors():
            store = _rendezvous(limit)
            group.joined.store = dist.PrefixStore("pcpvt", store)
            group.joined.place = answer(group.joined.store)
            dist.init_process_group(device.backend, store=store, rank=world.rank, world_size=world.size, timeout=limit)
    return world


def _rendezvous(limit: datetime.timedelta) -> dist.Store:
    """The key-value store of this attempt of the run, to which any process may connect before the others do."""
    store, *_ = next(dist.rendezvous("env://", timeout=limit))
    # torchelastic's store outlives the ranks, with their keys.
    attempt = os.environ.get("PCPVT_ATTEMPT") or os.environ.get("TORCHELASTIC_RESTART_COUNT", "")
    return dist.PrefixStore(f"attempt/{attempt}", store)


def limit_waiting(seconds: float) -> None:
    """Sets the limit of all waits from now on, `config.timeout` at most, where the library can change it.

    HCCL's watchdog can (torch_npu 2.13); what its devices themselves wait, HCCL_EXEC_TIMEOUT, is fixed.
    """
    timeout = min(group.joined.longest, math.ceil(seconds))
    if dist.group.WORLD is not None and timeout != group.joined.timeout and not group.joined.fixed:
        try:
            dist.group.WORLD.set_timeout(datetime.timedelta(seconds=timeout))
            group.joined.timeout = timeout
        except RuntimeError:  # what such a library is told
            group.joined.fixed = True


def leave() -> None:
    """Leaves the process group; at the end of the process, because it cannot be joined again."""
    if group.joined.place is not None:  # in a store's call at the end of the interpreter it would abort the process
        group.joined.left.set()
        group.joined.place.join(UNJOINED.total_seconds())
    if dist.is_initialized() and not group.joined.broken:
        dist.destroy_process_group()
        group.joined.store = None


def psum(tensors: list[Tensor]) -> list[Tensor]:
    """Sums of each tensor over all processes, through one flat bucket; the same order of addition on every call."""
    if not dist.is_initialized():
        return tensors
    bucket = torch.cat([t.reshape(-1) for t in tensors])
    with peer_errors():
        dist.all_reduce(bucket)
    pieces = bucket.split([t.numel() for t in tensors])
    return [piece.view_as(t).to(t.dtype) for piece, t in zip(pieces, tensors, strict=True)]


def sum_numbers(values: list[float]) -> list[float]:
    """Sums of host numbers over all processes, in float64."""
    return sum_array(np.array(values, np.float64)).tolist() if dist.is_initialized() else values


def sum_array(values: np.ndarray) -> np.ndarray:
    """Sums of a host array, element by element, over all processes, in its dtype; its memory may be reused."""
    if not dist.is_initialized():
        return values
    tensor = torch.from_numpy(values)
    with peer_errors():
        dist.all_reduce(tensor)
    return tensor.numpy()


def gather_numbers(values: list[float]) -> list[list[float]]:
    """The numbers of every process, by rank; as many in each, and exact as float64."""
    rank, size = group.joined.world.rank, group.joined.world.size
    row = [0.0] * len(values)
    flat = sum_numbers([*row * rank, *values, *row * (size - 1 - rank)])
    return [flat[i * len(values) : (i + 1) * len(values)] for i in range(size)]


def gather_texts(text: str) -> list[str]:
    """The text of every process, by rank."""
    joined = group.joined
    if joined.store is None:
        return [text]
    joined.gathered += 1
    keys = [f"text/{joined.gathered}/{rank}" for rank in range(joined.world.size)]
    with peer_errors():
        joined.store.set(keys[joined.world.rank], text)
        return [value.decode() for value in joined.store.multi_get(keys)]


def any_true(value: bool) -> bool:
    """Whether `value` is True in any process; every process gets the same answer."""
    return sum_numbers([float(value)])[0] > 0


def reduction_time(device: Device, numbers: int, rounds: int) -> float:
    """Seconds that all processes take to sum so many float32 numbers on the device: the fastest of some rounds."""
    bucket, times = torch.zeros(numbers, device=device.torch), []
    with peer_errors():
        for _ in range(rounds + 1):  # the first connects the processes
            device.synchronize()
            began = time.perf_counter()
            dist.all_reduce(bucket)
            device.synchronize()
            times.append(time.perf_counter() - began)
    return min(times[1:])


def await_all(seconds: float) -> None:
    """Waits until all processes have called this, at most so many seconds; that one does not come is no error here."""
    world, store = group.joined.world, group.joined.store
    if store is None:
        return
    with contextlib.suppress(RuntimeError):  # a process, or the store's host, has ended
        store.set(f"ended/{world.rank}", "")
        store.wait([f"ended/{rank}" for rank in range(world.size)], datetime.timedelta(seconds=seconds))


def first_to_say(text: str) -> bool:
    """Whether no other process has printed this text yet, so that a message of all processes is printed once."""
    return _increment(f"said/{text}") == 1


def explains(error: Exception) -> bool:
    """Whether to print the error that ends this process: each text once, a PeerError only if it is the first error."""
    return first_to_say(str(error)) and (_increment("errors") == 1 or not isinstance(error, PeerError))


def _increment(key: str) -> int:
    """The value of a shared counter after adding 1."""
    try:
        if group.joined.store is None:
            if from_environment() is None:
                return 1
            group.joined.store = dist.PrefixStore("pcpvt", _rendezvous(UNJOINED))
        return group.joined.store.add(key, 1)
    except (RuntimeError, ValueError):  # the store's host is down, or the environment names none
        return 1
