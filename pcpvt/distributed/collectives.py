"""The processes of a run: rank and size, sums over all processes, joining and leaving.

A process that dies or hangs ends the run: the others detect it within `config.timeout` seconds and exit with a
`PeerError` that names its rank.
"""

import contextlib
import datetime
import math
import os
import re
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from pcpvt.devices.base import Device
from pcpvt.distributed import hosts, stacks
from pcpvt.errors import PeerError

UNJOINED = datetime.timedelta(seconds=5)  # to reach the store from a process that ends before it has joined
POLL = 0.5  # seconds between two looks for another rank's question where this one is
ROLL_CALL = 2.0  # seconds in which all live ranks report a failure; they detect a lost connection within milliseconds
# Errors of communication, among RuntimeErrors of all kinds: gloo's name its source files and NCCL's and HCCL's the
# library; EI are HCCL's codes of CANN, ERR02 those of torch_npu's distributed part.
COMMUNICATION = re.compile(r"gloo[/\\]|\b[nh]ccl|\bEI\d{4}|\bERR02\d{3}|connection (closed|reset)|broken pipe", re.I)


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
    timeout, longest = 0, 0  # seconds of a wait now, and `config.timeout`
    store: dist.Store | None = None  # key-value store shared by all ranks; works when collectives do not
    teller: threading.Thread | None = None  # see `_tell_place`
    left = threading.Event()  # ends it
    shared = 0  # calls of `share`, as many in all processes
    broken = False  # a collective has failed: the group is not destroyed, because that needs all ranks


_group = _Group()


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
        _group.world, _group.timeout, _group.longest = world, timeout, timeout
        with _peer_errors():
            store = _rendezvous(limit)
            _group.store = dist.PrefixStore("pcpvt", store)
            # A connection of its own, as the main thread may hang in the other.
            _group.left.clear()
            _group.teller = threading.Thread(
                target=_tell_place, args=(_clone(_group.store),), name="place", daemon=True
            )
            _group.teller.start()
            dist.init_process_group(device.backend, store=store, rank=world.rank, world_size=world.size, timeout=limit)
    return world


def _rendezvous(limit: datetime.timedelta) -> dist.Store:
    """The key-value store of this attempt of the run, to which any process may connect before the others do."""
    store, *_ = next(dist.rendezvous("env://", timeout=limit))
    # torchelastic's store outlives the ranks, with their keys.
    attempt = os.environ.get("PCPVT_ATTEMPT") or os.environ.get("TORCHELASTIC_RESTART_COUNT", "")
    return dist.PrefixStore(f"attempt/{attempt}", store)


def _clone(store: dist.Store) -> dist.Store:
    """Another connection to a store (its type has no annotation for this in torch 2.13)."""
    clone: dist.Store = store.clone()  # type: ignore[attr-defined]
    return clone


def _tell_place(store: dist.Store) -> None:
    """Thread that tells the other ranks where this one is, once one of them asks because its wait was over."""
    with contextlib.suppress(RuntimeError):  # the store's host is down
        while not store.check(["where"]):
            if _group.left.wait(POLL):
                return
        store.set(f"where/{_group.world.rank}", stacks.place())
        stacks.write()


def limit_waiting(seconds: float) -> None:
    """Sets the limit of all waits from now on, `config.timeout` at most; HCCL's is fixed once a process has joined."""
    timeout = min(_group.longest, math.ceil(seconds))
    if dist.is_initialized() and timeout != _group.timeout and not hasattr(torch, "npu"):
        _group.timeout = timeout
        dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=timeout))


def leave() -> None:
    _group.left.set()
    if _group.teller is not None:  # Python would abort the process at a thread that is in the library at its end
        _group.teller.join(2 * POLL)
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


def share(text: str) -> list[str]:
    """The text of every process, by rank."""
    if _group.store is None:
        return [text]
    _group.shared += 1
    keys = [f"share/{_group.shared}/{rank}" for rank in range(_group.world.size)]
    with _peer_errors():
        _group.store.set(keys[_group.world.rank], text)
        return [value.decode() for value in _group.store.multi_get(keys)]


def reduction_time(device: Device, numbers: int, rounds: int) -> float:
    """Seconds that all processes take to sum so many float32 numbers on the device: the fastest of some rounds."""
    bucket, times = torch.zeros(numbers, device=device.torch), []
    with _peer_errors():
        for _ in range(rounds + 1):  # the first connects the processes
            device.synchronize()
            began = time.perf_counter()
            dist.all_reduce(bucket)
            device.synchronize()
            times.append(time.perf_counter() - began)
    return min(times[1:])


def await_all(seconds: float) -> None:
    """Waits until all processes have called this, at most so many seconds; that one does not come is no error here."""
    if _group.store is None:
        return
    with contextlib.suppress(RuntimeError):  # a process, or the store's host, has ended
        _group.store.set(f"ended/{_group.world.rank}", "")
        _group.store.wait([f"ended/{rank}" for rank in range(_group.world.size)], datetime.timedelta(seconds=seconds))


def first_to_say(text: str) -> bool:
    """Whether no other process has printed this text yet, so that a message of all processes is printed once."""
    return _increment(f"said/{text}") == 1


def explains(error: Exception) -> bool:
    """Whether to print the error that ends this process: each text once, a PeerError only if it is the first error."""
    return first_to_say(str(error)) and (_increment("errors") == 1 or not isinstance(error, PeerError))


def _increment(key: str) -> int:
    """The value of a shared counter after adding 1."""
    try:
        if _group.store is None:
            if from_environment() is None:
                return 1
            _group.store = dist.PrefixStore("pcpvt", _rendezvous(UNJOINED))
        return _group.store.add(key, 1)
    except (RuntimeError, ValueError):  # the store's host is down, or the environment names none
        return 1


@contextlib.contextmanager
def _peer_errors() -> Iterator[None]:
    """Turns the failure of a collective into a PeerError that names the missing ranks."""
    try:
        yield
    except RuntimeError as error:
        if found := peer_error(error):
            raise found from error
        raise


def peer_error(error: RuntimeError) -> PeerError | None:
    """The PeerError that an error of this process's communication stands for; None when it is an error of its own.

    HCCL and NCCL run asynchronously, so their errors may be raised by a later operation that reads from the device.
    """
    if not dist.is_initialized() and _group.store is None:
        return None
    _group.broken = True  # even by an error of its own, which has interrupted a collective or will miss the next
    reason = _reason(error)
    if isinstance(error, torch.OutOfMemoryError) or not (
        isinstance(error, dist.DistError) or COMMUNICATION.search(str(error))
    ):
        return None
    late = bool(re.search("time[sd]? ?out", reason.lower()))
    missing = _roll_call(late)
    if missing and late:
        what = f"gave no answer within {_group.timeout} s (config.timeout): hung, or far slower than the others"
        return PeerError("; ".join([f"{', '.join(f'rank {rank}' for rank in missing)} {what}", *_places(missing)]))
    who = ", ".join(f"rank {rank}" for rank in missing) or "the connection between processes is"
    return PeerError(f"{who} lost: {reason}")


def _reason(error: RuntimeError) -> str:
    """What an error says, without gloo's source position and its advice, which suspects a bug in this program."""
    line = next(iter(str(error).strip().splitlines()), "")
    return re.sub(r"^\[\S+:\d+\] |\.? This is typically caused by .*", "", line)


def _roll_call(asks: bool) -> list[int]:
    """The ranks that have not detected the failure themselves: they are dead, or hang outside the collective.

    Args:
        asks: whether all ranks shall write where they are.
    """
    if _group.store is None:
        return []
    try:
        _group.store.set(f"noticed/{_group.world.rank}", "")
        if asks:
            _group.store.set("where", "")
        time.sleep(ROLL_CALL)
        return [rank for rank in range(_group.world.size) if not _group.store.check([f"noticed/{rank}"])]
    except RuntimeError:
        return []


def _places(ranks: list[int]) -> list[str]:
    """Where ranks are, of those that have told it."""
    store, told = _group.store, []
    assert store is not None  # they were missed in it
    with contextlib.suppress(RuntimeError):
        told = [
            f"rank {rank} is {store.get(f'where/{rank}').decode()}" for rank in ranks if store.check([f"where/{rank}"])
        ]
    return [*told, "all stacks are in the workdir's debug/"] if told else []
