"""torchelastic's agent for the ranks of one host, with this project's rule of when to start them again.

The base class keeps the ranks of all hosts in step: whoever starts its ranks again makes the others do the same.
"""

import json
import os
import signal
import time
import uuid
from collections.abc import Callable
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import LogsSpecs

from pcpvt.distributed import signals
from pcpvt.distributed.restart import RESTART, Failure, Failures, Restart
from pcpvt.distributed.suspect import Attempt

ATTEMPT = "PCPVT_ATTEMPT"  # environment variable: the same for all ranks that were started together
FAILED = "PCPVT_FAILED"  # key of the store: what has failed on a host
TOGETHER = 10.0  # seconds in which the other hosts' ranks fail too; they detect a lost connection within 3


class Agent(LocalElasticAgent):
    """Starts and supervises the ranks of one host.

    Args:
        restarts: called with the failures of the ranks; the reason to start all ranks again, or empty.
        keeps_store: whether this host keeps the store in which hosts meet; None: not known.
        limit: seconds from the first failure until ranks that go on are killed. torchelastic's is 30 in this case,
            which would kill a rank that is writing a checkpoint.
    """

    def __init__(
        self, spec: WorkerSpec, logs: LogsSpecs, restarts: Callable[[Failures, Attempt], str], limit: float,
        keeps_store: bool | None,
    ):  # fmt: skip
        super().__init__(spec, logs)
        self._restarts, self._limit, self._keeps_store = restarts, int(limit), keeps_store
        self._starts, self._reason = 0, ""
        self._store_host: int | None = None

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result: RunResult = super()._monitor_workers(worker_group)
        if result.is_failed():
            result.failures.update(self._failed_elsewhere(worker_group, result.failures))
            own, hosts = worker_group.group_rank, worker_group.group_world_size
            assert own is not None and hosts is not None  # they have met
            attempt = Attempt(own, hosts, worker_group.spec.local_world_size, self._store_host)
            self._reason = self._restarts(result.failures, attempt) if self._remaining_restarts else ""
            if not self._reason:
                self._remaining_restarts = 0
        return result

    def _failed_elsewhere(self, worker_group: WorkerGroup, failures: Failures) -> Failures:
        """The failures of the other hosts, from those that report them in time; all hosts then decide alike."""
        store, own = worker_group.store, worker_group.group_rank
        found: dict[int, dict[str, list[int]]] = {}  # host to rank to exit code and time
        assert store is not None
        hosts = [rank for rank in range(worker_group.group_world_size) if rank != own]

        def read() -> None:
            for host in hosts:
                if host not in found and store.check([f"{FAILED}/{host}"]):
                    found[host] = json.loads(store.get(f"{FAILED}/{host}"))

        read()  # first, because a host may leave, with the store, once it knows of all others
        store.set(f"{FAILED}/{own}", json.dumps({rank: (f.exitcode, f.timestamp) for rank, f in failures.items()}))
        deadline = time.monotonic() + TOGETHER
        while len(found) < len(hosts) and time.monotonic() < deadline:
            time.sleep(0.1)
            read()
        return {int(rank): Failure(*what) for told in found.values() for rank, what in told.items()}

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        # A launcher keeps the address where the ranks have met before, and would not tell it to the launcher of a host
        # that takes the place of another: that one would wait for it until its time is over (torch 2.13).
        worker_group.spec.rdzv_handler._bootstrap_store_info = None  # type: ignore[attr-defined]
        super()._rendezvous(worker_group)

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        store = worker_group.store  # of this attempt, the same on all hosts
        assert store is not None  # they have met
        if worker_group.group_rank == 0:
            store.set(ATTEMPT, uuid.uuid4().hex)
        os.environ[ATTEMPT] = store.get(ATTEMPT).decode()
        # The host whose rank 0 writes the records may not be the one whose ranks have failed.
        store.set(f"{RESTART}/{worker_group.group_rank}", json.dumps((self._starts, self._reason, self._keeps_store)))
        told = [json.loads(store.get(f"{RESTART}/{rank}")) for rank in range(worker_group.group_world_size)]
        self._store_host = next((host for host, (*_, keeps) in enumerate(told) if keeps), None)
        if number := max(starts for starts, *_ in told):
            reason = next((reason for _, reason, _ in told if reason), "a host has joined or left the run")
            os.environ[RESTART] = json.dumps(Restart(number, reason))
        self._starts, self._reason = self._starts + 1, ""
        started: dict[int, Any] = super()._start_workers(worker_group)
        assert self._pcontext is not None
        close, pids = self._pcontext.close, self._pcontext.pids().values()

        def close_within_limit(death_sig: signal.Signals | None = None, timeout: int = 30) -> None:
            for pid in set(pids) & set(signals.children()):
                signals.kill(pid, signals.FROM_LAUNCHER)
            close(death_sig, self._limit)

        self._pcontext.close = close_within_limit  # type: ignore[method-assign]
        return started
