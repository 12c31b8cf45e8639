"""Measurements in a process of their own: peak memory, what may run out of it, and the time to the first step."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from pcpvt.config import fields, stored
from pcpvt.errors import UserError
from pcpvt.runtime import records
from pcpvt.runtime import session as sessions
from pcpvt.runtime.session import Session
from pcpvt.train import setup

KILLED = (-signal.SIGKILL, 128 + signal.SIGKILL)  # exit codes of who asked the kernel for more memory than there is


class OutOfMemory(Exception):
    """A measurement that the host or the device had too little memory for."""


def run_in_subprocess(measure: Callable[..., Any], config: ConfigDict, *args: Any) -> Any:
    """`measure(session, *args)` in a process of its own, on a session of `config`.

    Raises:
        OutOfMemory: when there was too little memory for it, there or on the device.
        UserError: that it met, or when its process died.
    """
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=_run_and_send, args=(measure, config.to_json_best_effort(), args, send))
    child.start()
    send.close()
    try:
        found = receive.recv()
    except EOFError:
        child.join()
        code = child.exitcode
        ended = UserError(f"--mode=bench: the process of a measurement ended with exit code {code}: see what it said")
        found = OutOfMemory() if code in KILLED else ended
    except BaseException:  # the bench itself is being ended
        child.kill()
        raise
    finally:
        child.join()
    if isinstance(found, Exception):
        raise found
    return found


def _run_and_send(measure: Callable[..., Any], config_json: str, args: tuple, send: Connection) -> None:
    config = fields.base()
    stored.apply_config(config, json.loads(config_json), "bench")
    try:
        send.send(measure(sessions.start(config, Path()), *args))
    except UserError as error:
        send.send(error)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not lacks_memory(str(error)):
            raise
        send.send(OutOfMemory())


def lacks_memory(said: str) -> bool:
    """Whether an error is that of an allocator of the host's or a device's memory."""
    return re.search(r"out of memory|allocate memory", said) is not None


def peak_memory(session: Session, side: str) -> int:
    """Peak bytes of two training steps of one side alone, in a process of its own."""
    try:
        return run_in_subprocess(_measure_memory, session.config, side)
    except OutOfMemory:
        size = session.config.batch_size
        raise UserError(f"config.batch_size: {size} is more than fits for {side} of the bench: lower it") from None


def _measure_memory(session: Session, side: str) -> int:
    from pcpvt.bench.run import Bench

    bench = Bench(session)
    if side == "ours":
        step = setup.train_step(session, bench.model, bench.plan, bench.optimizer)
        for _ in range(2):
            bench.state, _ = step(bench.state, bench.batch)
    else:
        from pcpvt.bench import baseline as bench_peer

        del bench.state  # the peer holds its own parameters and moments
        peer_step = bench_peer.train_step(session, bench.plan, bench.batch)
        for _ in range(2):
            peer_step()
    session.device.synchronize()
    return session.device.memory_stats()[0]


def training(session: Session, workdir: Path, changes: dict[str, Any]) -> list[str]:
    """The command of a short training on noise images: the words of this bench, and `changes` of fields."""
    words = [
        w for w in sys.argv[1:] if not w.startswith(("--mode", "--workdir", "--config.epochs", "--config.examples"))
    ]
    changes = {"eval_every": "0", "save_every": "0", "data.name": "synthetic"} | changes
    changes["num_classes"] = session.config.num_classes or 1000
    if session.config.data.name not in ("digits", "synthetic"):  # without a path, noise takes the recipe of the digits
        changes["data.path"] = session.config.data.path or "."
    words += [f"--config.{name}={value}" for name, value in changes.items()]
    return [sys.executable, "-m", "pcpvt.main", *words, f"--workdir={workdir}"]


def first_step_seconds(session: Session) -> dict[str, float]:
    """Seconds from starting the program until its first step is recorded, with a cold and with a warm compile cache."""
    taken = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("cold", "warm"):
            taken[name] = round(_first_step(session, Path(folder) / name, Path(folder) / "cache"), 2)
    return taken


def _first_step(session: Session, workdir: Path, cache: Path) -> float:
    command = training(session, workdir, {"steps": 1, "log_every": "1 steps"})
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    start = time.perf_counter()
    child = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        while child.poll() is None:
            if any(r.get("kind") == "train" for r in records.read_metrics(workdir / "metrics.jsonl")):
                return time.perf_counter() - start
            time.sleep(0.05)
        if any(r.get("kind") == "train" for r in records.read_metrics(workdir / "metrics.jsonl")):
            return time.perf_counter() - start
        said = child.communicate()[1].decode()
        raise UserError(f"--mode=bench: the run to time the first step failed: {said[-300:]}")
    finally:
        child.kill()
        child.wait()
