"""A config that asks for n processes to n supervised processes of this host, through torchelastic.

Signals reach every rank, the exit code is that of the first rank that failed, and no process outlives this one.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import uuid

from ml_collections import ConfigDict

from pcpvt import devices
from pcpvt.distributed import signals
from pcpvt.errors import show

FAILURE_GRACE = 30  # seconds from the first failure until the other ranks are killed; nothing is left to save then
QUIET = (2, signals.PREEMPTED, signals.PEER_LOST)  # what the rank itself has explained in a line, or was asked for


def launch(config: ConfigDict, argv: list[str]) -> int:
    """Runs `python -m pcpvt.main argv` once per process; returns the exit code of the whole.

    Raises:
        UserError: when this host does not have the devices.
        signals.Stopped: when a signal comes before there is a process to pass it on to.
    """
    device = devices.get(config.device)
    device.require(config.processes)
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.disable(logging.ERROR)  # torchelastic's tables repeat what the lines below say
    defaults = {
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(FAILURE_GRACE),
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # what c10d warns of, a PeerError says in one line
        "GLOO_SOCKET_IFNAME": "lo",  # one host: neither its name nor a network is needed
        **device.environment,
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    setup = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=config.processes,
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),  # by default a folder in /tmp, which nobody removes
        run_id=uuid.uuid4().hex,
        role="pcpvt",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,  # a restart would hide the failure; the same command resumes
        monitor_interval=0.2,
        signals_to_handle="SIGQUIT",  # the others are passed on, for the ranks to save
    )
    _adopt_orphans()
    for number in signals.STOPS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _pass_on)
    signals.finish_step_first(config.grace + FAILURE_GRACE)
    try:
        elastic_launch(setup, sys.executable)("-u", "-m", "pcpvt.main", *argv)
    except ChildFailedError as error:
        return _exit_code(error.failures)
    finally:
        signals.ignore()
        for pid in signals.descendants():
            signals.kill(pid, signal.SIGKILL)
    return 0


def _adopt_orphans() -> None:
    """Makes this process (Linux) the parent of what a killed rank leaves behind: its loader processes."""
    set_child_subreaper = 36
    ctypes.CDLL(None).prctl(set_child_subreaper, 1)


def _pass_on(number: int, frame: object) -> None:
    """Sends a signal to every rank: each leads a session of its own, where no terminal and no scheduler reaches it."""
    ranks = signals.children()
    if not ranks:
        raise signals.Stopped
    for pid in ranks:
        signals.kill(pid, number)


def _exit_code(failures: dict) -> int:
    """The code of the rank that failed first, after naming it; `failures` are torchelastic's, by rank."""
    # Times are whole seconds; within one, torchelastic keeps the order. Who lost a peer or was stopped is no cause.
    caused = (signals.PEER_LOST, signals.PREEMPTED)
    rank, first = min(failures.items(), key=lambda item: (item[1].timestamp, item[1].exitcode in caused))
    code = first.exitcode
    if code not in QUIET:
        what = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
        show(f"rank {rank} {what}; the others were stopped")
    return 128 - code if code < 0 else code
