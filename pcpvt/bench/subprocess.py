"""Measurements in a separate process: peak memory, whatever may run out of it, and the time to the first step."""

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

from pcpvt.bench.parts import Bench
from pcpvt.errors import UserError
from pcpvt.runtime import session as sessions
from pcpvt.runtime.session import Session

KILLED = (-signal.SIGKILL, 128 + signal.SIGKILL)  # exit codes of a process that the kernel killed for lack of memory


class OutOfMemory(Exception):
    """A measurement that the host or the device had too little memory for."""


def run_in_subprocess(measure: Callable[..., Any], config: ConfigDict, *args: Any) -> Any:
    """`measure(session, *args)` in a new process, on a session of `config`.

    Raises OutOfMemory, the UserError that `measure` raised, or one when the process died.
    """
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=_run_and_send, args=(measure, config, args, send))
    child.start()
    send.close()
    try:
        result = receive.recv()
    except EOFError:
        child.join()
        code = child.exitcode
        result = UserError(f"--mode=bench: the process of a measurement ended with exit code {code}: see what it said")
        if code in KILLED:
            result = OutOfMemory()
    except BaseException:  # such as KeyboardInterrupt
        child.kill()
        raise
    finally:
        child.join()
    if isinstance(result, Exception):
        raise result
    return result


def _run_and_send(measure: Callable[..., Any], config: ConfigDict, args: tuple, send: Connection) -> None:
    try:
        send.send(measure(sessions.start(config, Path()), *args))
    except UserError as error:
        send.send(error)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not lacks_memory(str(error)):
            raise
        send.send(OutOfMemory())


def lacks_memory(message: str) -> bool:
    """Whether an error message is that of an allocator of host or device memory."""
    return re.search(r"out of memory|allocate memory", message) is not None


def peak_memory(session: Session, side: str) -> int:
    """Peak bytes of two train steps of one side, in a process of its own."""
    try:
        return run_in_subprocess(_measure_memory, session.config, side)
    except OutOfMemory:
        size = session.config.batch_size
        raise UserError(f"config.batch_size: {size} is more than fits for {side} of the bench: lower it") from None


def _measure_memory(session: Session, side: str) -> int:
    bench = Bench(session)
    if side == "peer":
        del bench.state  # the peer holds its own parameters and moments
    step = bench.step(side, "train")
    for _ in range(2):
        step()
    session.device.synchronize()
    return session.device.memory_stats()[0]


def train_command(session: Session, workdir: Path, changes: dict[str, Any]) -> list[str]:
    """The command of a short training on noise images: this bench's own arguments, and `changes` of fields."""
    dropped = ("--mode", "--workdir", "--config.epochs", "--config.examples")
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith(dropped)]
    changes = {"eval_every": "0", "save_every": "0", "data.name": "synthetic"} | changes
    changes["num_classes"] = session.config.num_classes or 1000
    if session.config.data.name not in ("digits", "synthetic"):  # without a path, noise takes the recipe of the digits
        changes["data.path"] = session.config.data.path or "."
    arguments += [f"--config.{name}={value}" for name, value in changes.items()]
    return [sys.executable, "-m", "pcpvt.main", *arguments, f"--workdir={workdir}"]


def images_per_sec(session: Session, changes: dict[str, Any]) -> float:
    """The images/s that a short training with `changes` of fields reports in its `result.json`.

    Raises OutOfMemory; UserError when it failed otherwise, with the last line of its standard error.
    """
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(train_command(session, Path(folder), changes), capture_output=True, text=True)
        if done.returncode == 0:
            return json.loads((Path(folder) / "result.json").read_text())["images_per_sec"]
    if done.returncode in KILLED or lacks_memory(done.stderr):
        raise OutOfMemory
    reason = done.stderr.strip().rpartition("\n")[2].removeprefix("pcpvt: error: ")
    count = changes["processes"]
    raise UserError(f"--mode=bench: the training with config.processes={count} failed: {reason}")


def first_step_seconds(session: Session) -> dict[str, float]:
    """Seconds from starting the program until its first step is recorded, with a cold and with a warm compile cache."""
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": f"{folder}/cache"}
        for cache in ("cold", "warm"):
            workdir = Path(folder, cache)
            command = train_command(session, workdir, {"steps": 1, "log_every": "1 steps"})
            start = time.time()
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode:
                raise UserError(f"--mode=bench: the run to time the first step failed: {done.stderr[-300:]}")
            recorded = (workdir / "metrics.jsonl").stat().st_mtime  # that step is its only record
            seconds[cache] = round(recorded - start, 2)
    return seconds
