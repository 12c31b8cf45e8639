"""A config that asks for n processes to n supervised processes of this host, through torchelastic.

Signals reach every rank, the exit code is that of the first rank that failed, and no process outlives this one.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from pathlib import Path

from ml_collections import ConfigDict

from pcpvt import devices

GRACE = 120  # seconds from the first failure or signal until what still runs is killed


def launch(config: ConfigDict, argv: list[str]) -> int:
    """Runs `python -m pcpvt.main argv` once per process; returns the exit code of the whole.

    Raises:
        UserError: when this host does not have the devices.
    """
    devices.get(config.device).require(config.processes)
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.disable(logging.ERROR)  # torchelastic's tables repeat what the lines below say
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(GRACE))
    if config.device == "cpu":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # one host: neither its name nor a network is needed
    setup = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=config.processes,
        run_id=uuid.uuid4().hex,
        role="pcpvt",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,  # a restart would hide the failure; the same command resumes
        monitor_interval=0.2,
        signals_to_handle="SIGHUP,SIGQUIT",  # SIGTERM and SIGINT are passed on, for the ranks to save
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _pass_on)
    try:
        elastic_launch(setup, sys.executable)("-u", "-m", "pcpvt.main", *argv)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        return _exit_code(rank, failure.exitcode)
    return 0


def _pass_on(number: int, frame: object) -> None:
    """Sends a signal to every rank: each is the leader of a session of its own, below this process."""
    for pid in children():
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue  # it has just ended


def children() -> list[int]:
    """Direct child processes of this one."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        found += [int(pid) for pid in (task / "children").read_text().split()]
    return found


def _exit_code(rank: int, code: int) -> int:
    """The code that this process ends with, after saying which rank failed, unless the run was merely preempted."""
    from pcpvt.modes.exits import PREEMPTED

    if code == PREEMPTED:
        return code
    what = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
    print(f"pcpvt: error: rank {rank} {what}; the others were stopped", file=sys.stderr, flush=True)
    return 128 - code if code < 0 else code
