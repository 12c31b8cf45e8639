"""The process group that this process has joined, and the key-value store that its processes share."""

import threading
from typing import NamedTuple

import torch.distributed as dist


class World(NamedTuple):
    """This process among those of the run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0


class Group:
    """The process group that this process has joined."""

    world = World()
    timeout, longest = 0, 0  # seconds of a wait now, and `config.timeout`
    fixed = False  # the library cannot change its limit
    store: dist.Store | None = None  # key-value store shared by all ranks; works when collectives do not
    place: threading.Thread | None = None  # see `peers.answer`
    left = threading.Event()
    gathered = 0  # calls of `collectives.gather_texts`, as many in all processes
    broken = False  # a collective has failed: the group is not destroyed, because that needs all ranks


joined = Group()
