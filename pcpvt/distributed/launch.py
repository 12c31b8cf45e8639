"""Starts and supervises the processes of a run on this host, through torchelastic.

Signals are forwarded to every rank, no process outlives this one, and the exit code is the first failed rank's. Before
that, ranks that crashed, were killed, hung or lost another rank are started again, `config.restarts` times at most:
they go on from the newest checkpoint. On several hosts (see `hosts`) the launchers of all hosts do this together.
"""

import ctypes
import logging
import math
import os
import signal
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from pcpvt import devices
from pcpvt.distributed import hosts, restart, signals, suspect
from pcpvt.errors import PeerError, UserError, show

# Seconds until ranks are killed, beyond those in which each rank ends itself; only a stopped process needs it.
FAILURE_GRACE = 30
JOIN_TIMEOUT = 900  # seconds to wait for the other hosts: pods start at different times while images are pulled


def launch(
    config: ConfigDict, argv: list[str], newest_checkpoint: Callable[[], Path | None] | None, debug: Path
) -> int:
    """Runs `python -m pcpvt.main argv` in `config.processes` processes over all hosts; returns the run's exit code.

    Args:
        newest_checkpoint: of a training; a restart without a newer one than at the restart before is the last. None
            for a mode that saves nothing from which another attempt would go on.
        debug: the folder in which ranks write where they were.

    Raises:
        UserError: when this host does not have the devices, has left the run, or the hosts do not meet.
        signals.Stopped: when a signal arrives before the first process has started.
    """
    place = hosts.from_environment(os.environ)
    if place.number > 1 and newest_checkpoint is not None:
        suspect.refuse_left(debug)
    processes = _on_this_host(config, place)
    device = devices.get(config.device)
    device.require(processes)
    from torch.distributed import DistError
    from torch.distributed.elastic.agent.server.api import WorkerSpec
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.rendezvous import RendezvousError, RendezvousParameters
    from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

    from pcpvt.distributed.agent import Agent

    logging.disable(logging.ERROR)  # torchelastic's error tables repeat the lines of the ranks and of `_exit_code`
    defaults = device.environment(config.timeout)
    if place.number == 1:
        defaults["GLOO_SOCKET_IFNAME"] = "lo"  # works without a resolvable host name and without a network
    os.environ.update(defaults | os.environ)
    os.environ[signals.LAUNCHER] = str(os.getpid())
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"  # the others are forwarded, so that the ranks save
    restarts = (3 if config.processes > 1 else 0) if config.restarts is None else config.restarts
    if newest_checkpoint is None:
        restarts, newest_checkpoint = 0, lambda: None
    spec = WorkerSpec(
        role="pcpvt", local_world_size=processes, entrypoint=sys.executable,
        args=("-u", "-m", "pcpvt.main", *argv), rdzv_handler=get_rendezvous_handler(
            RendezvousParameters(**_rendezvous(place, math.ceil(config.elastic / processes) or place.number))
        ),
        max_restarts=restarts, monitor_interval=0.2, local_addr=place.address if place.number > 1 else "localhost",
    )  # fmt: skip
    # The default folder is one in /tmp that nobody removes.
    limit = config.grace + signals.SAVE_LIMIT + FAILURE_GRACE
    found = suspect.path_for_ranks(debug)
    os.environ[suspect.FOUND] = str(found)
    rule = restart.Rule(
        newest_checkpoint, debug, found, ends_on_fault=config.audit_action == "end", fewest=config.elastic,
        batch=config.batch_size,
    )  # fmt: skip
    keeps_store = None if place.rank is None else place.rank == 0
    agent = Agent(spec, DefaultLogsSpecs(log_dir=os.devnull), rule, limit, keeps_store)
    # If a rank is killed, its loader processes become children of this process (Linux), which can then kill them.
    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER
    for number in signals.STOPS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _forward)
    signal.signal(signal.SIGUSR1, _ask_for_stacks)
    signals.finish_step_first(limit, "the processes did not end within {:g} s of a signal", answer="")
    result, why = None, "it has left"
    try:
        result = agent.run()  # None when the others have ended the run
    except (RendezvousError, DistError) as error:
        why = type(error).__name__
    finally:
        signals.ignore_from_now()
        signals.kill_descendants()
        suspect.take(found)  # of the last attempt, which nobody reads
        if not rule.left:
            spec.rdzv_handler.shutdown()
    if rule.left:
        return signals.FAULTY
    if result is None:
        raise PeerError(
            f"{place.endpoint}: the {place.number} hosts are not together ({why}): another has ended or cannot be "
            "reached; the last lines of its log say why"
        )
    return _exit_code(result.failures, debug) if result.is_failed() else 0


def _on_this_host(config: ConfigDict, place: hosts.Hosts) -> int:
    """The number of processes to start here."""
    each, rest = divmod(config.processes, place.number)
    if rest or (place.processes is not None and place.number > 1 and place.processes != each):
        having = f" of {place.processes}" if place.processes else ""
        raise UserError(
            f"config.processes: {config.processes} on {place.number} hosts{having}: give their total, as in "
            f":{config.device}{(place.processes or max(each, 1)) * place.number}"
        )
    return each


def _rendezvous(place: hosts.Hosts, fewest: int) -> dict[str, Any]:
    """The parameters by which the launchers of all hosts meet; the first host keeps the store."""
    if place.number == 1:
        return {
            "backend": "c10d", "endpoint": "localhost:0", "run_id": uuid.uuid4().hex, "min_nodes": 1, "max_nodes": 1,
            "local_addr": "localhost",
        }  # fmt: skip
    return {
        "backend": "c10d", "endpoint": place.endpoint, "run_id": place.run_id, "min_nodes": min(fewest, place.number),
        "max_nodes": place.number, "local_addr": place.address, "join_timeout": JOIN_TIMEOUT,
        "read_timeout": JOIN_TIMEOUT, **({} if place.rank is None else {"is_host": place.rank == 0}),
    }  # fmt: skip


def _exit_code(failures: restart.Failures, debug: Path) -> int:
    """The exit code of the rank that failed first, after printing which one."""
    code = restart.first_failure(failures)[1]
    if code not in (2, signals.FAULTY, *restart.STOPPED):  # a rank with code 2 or 77 has printed its error
        show(f"{restart.what_failed(failures, debug)}; the others were stopped")
    return 128 - code if code < 0 else code


def _ask_for_stacks(number: int, frame: object) -> None:
    """Signal handler: every rank writes its stacks (see `stacks`)."""
    for pid in signals.children():
        signals.kill(pid, number)


def _forward(number: int, frame: object) -> None:
    """Signal handler: sends the signal to every rank, whose own sessions get none from a terminal or scheduler."""
    ranks = signals.children()
    if not ranks:
        raise signals.Stopped
    for pid in ranks:
        signals.kill(pid, number)
