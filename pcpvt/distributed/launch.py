"""Starts and supervises the processes of a run on this host, through torchelastic.

Signals are forwarded to every rank, the exit code is the first failed rank's, and no process outlives this one.
"""

import ctypes
import logging
import math
import os
import signal
import sys
import uuid

from ml_collections import ConfigDict

from pcpvt import devices
from pcpvt.distributed import signals
from pcpvt.errors import show

# Seconds until ranks are killed, beyond those in which each rank ends itself; only a stopped process needs it.
FAILURE_GRACE = 30
STOPPED = (signals.PREEMPTED, signals.PEER_LOST)  # exit codes of ranks that ended because of a signal or another rank


def launch(config: ConfigDict, argv: list[str]) -> int:
    """Runs `python -m pcpvt.main argv` in `config.processes` processes; returns the exit code of the run.

    Raises:
        UserError: when this host does not have the devices.
        signals.Stopped: when a signal arrives before the first process has started.
    """
    device = devices.get(config.device)
    device.require(config.processes)
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.disable(logging.ERROR)  # torchelastic's error tables repeat the lines of the ranks and of `_exit_code`
    limit = config.grace + signals.SAVE_LIMIT + FAILURE_GRACE
    defaults = {
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(math.ceil(limit)),  # from the first failure until the others are killed
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # a PeerError says in one line what c10d warns of
        "GLOO_SOCKET_IFNAME": "lo",  # one host: works without a resolvable host name and without a network
        **device.environment,
    }
    os.environ.update(defaults | os.environ)
    os.environ[signals.LAUNCHER] = str(os.getpid())
    setup = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=config.processes,
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),  # the default is a folder in /tmp that nobody removes
        run_id=uuid.uuid4().hex, role="pcpvt",
        rdzv_backend="c10d", rdzv_endpoint="localhost:0", local_addr="localhost",
        max_restarts=0,  # a restart would hide the failure; the same command resumes
        monitor_interval=0.2,
        signals_to_handle="SIGQUIT",  # SIGTERM, SIGINT and SIGHUP are forwarded instead, so that the ranks save
    )  # fmt: skip
    # If a rank is killed, its loader processes become children of this process (Linux), which can then kill them.
    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER
    for number in signals.STOPS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _forward)
    signals.finish_step_first(limit, "the processes did not end within {:g} s of a signal")
    try:
        elastic_launch(setup, sys.executable)("-u", "-m", "pcpvt.main", *argv)
    except ChildFailedError as error:
        return _exit_code(error.failures)
    finally:
        signals.ignore_from_now()
        signals.kill_descendants()
    return 0


def _forward(number: int, frame: object) -> None:
    """Signal handler: sends the signal to every rank, whose own sessions get none from a terminal or scheduler."""
    ranks = signals.children()
    if not ranks:
        raise signals.Stopped
    for pid in ranks:
        signals.kill(pid, number)


def _exit_code(failures: dict) -> int:
    """The exit code of the rank that failed first, after printing which one; `failures` are torchelastic's, by rank."""
    # Timestamps are whole seconds; among equal ones a rank with an error of its own comes first.
    rank, first = min(failures.items(), key=lambda item: (item[1].timestamp, item[1].exitcode in STOPPED))
    code = first.exitcode
    if code != 2 and code not in STOPPED:  # a rank with code 2 has printed its error
        what = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
        if code == -signal.SIGABRT:  # as libraries end a process, among them the watchdogs of NCCL and HCCL
            what += " (by a library, such as the watchdog of its collectives when another rank has ended or hangs)"
        show(f"rank {rank} {what}; the others were stopped")
    return 128 - code if code < 0 else code
