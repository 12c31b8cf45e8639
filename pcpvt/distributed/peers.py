"""Lost and hanging processes: which errors mean one, which process it is, and where it is."""

import contextlib
import re
import threading
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist

from pcpvt.distributed import flight, group, stacks
from pcpvt.errors import PeerError

POLL = 0.5  # seconds between two looks for another rank's question where this one is
ROLL_CALL = 2.0  # seconds in which all live ranks report a failure; they detect a lost connection within milliseconds
# Errors of communication, among RuntimeErrors of all kinds: gloo's name its source files and NCCL's and HCCL's the
# library; EI are HCCL's codes of CANN, ERR02 those of torch_npu's distributed part.
COMMUNICATION = re.compile(r"gloo[/\\]|\b[nh]ccl|\bEI\d{4}|\bERR02\d{3}|connection (closed|reset)|broken pipe", re.I)


@contextlib.contextmanager
def peer_errors() -> Iterator[None]:
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
    if not dist.is_initialized() and group.joined.store is None:
        return None
    group.joined.broken = True  # even by an error of its own, which has interrupted a collective or will miss the next
    reason = _reason(error)
    if isinstance(error, torch.OutOfMemoryError) or not (
        isinstance(error, dist.DistError) or COMMUNICATION.search(str(error))
    ):
        return None
    late = bool(re.search("time[sd]? ?out", reason.lower()))
    missing = _roll_call(late)
    if missing and late:
        what = f"gave no answer within {group.joined.timeout} s (config.timeout): hung, or far slower than the others"
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
    if group.joined.store is None:
        return []
    try:
        group.joined.store.set(f"noticed/{group.joined.world.rank}", "")
        if asks:
            group.joined.store.set("where", "")
        time.sleep(ROLL_CALL)
        return [rank for rank in range(group.joined.world.size) if not group.joined.store.check([f"noticed/{rank}"])]
    except RuntimeError:
        return []


def _places(ranks: list[int]) -> list[str]:
    """Where ranks are, of those that have told it."""
    store, told = group.joined.store, []
    assert store is not None  # they were missed in it
    with contextlib.suppress(RuntimeError):
        told = [
            f"rank {rank} is {store.get(f'where/{rank}').decode()}" for rank in ranks if store.check([f"where/{rank}"])
        ]
    return [*told, "all stacks are in the workdir's debug/"] if told else []


def answer(store: dist.Store) -> threading.Thread:
    """Starts a thread that tells the other ranks where this one is, once one of them asks because its wait was over.

    It has a connection of its own, as the main thread may hang in the other.
    """
    own = store.clone()  # type: ignore[attr-defined]  # not annotated in torch 2.13
    thread = threading.Thread(target=_tell_place, args=(own,), name="place", daemon=True)
    thread.start()
    return thread


def _tell_place(store: dist.Store) -> None:
    """Thread that tells the other ranks where this one is, once one of them asks because its wait was over."""
    with contextlib.suppress(RuntimeError):  # the store's host is down
        while not store.check(["where"]):
            if group.joined.left.wait(POLL):
                return
        store.set(f"where/{group.joined.world.rank}", stacks.place())
        stacks.write()
        flight.write()
