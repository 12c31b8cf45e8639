"""The figures of the benchmark that need a process of their own: peak memory, and the time to the first step."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pcpvt.config import fields
from pcpvt.errors import UserError
from pcpvt.modes import build
from pcpvt.modes import session as sessions
from pcpvt.modes.session import Session
from pcpvt.store import records


def peak_memory(session: Session, side: str) -> int:
    """Peak bytes of two training steps of one side alone, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=_measure_memory, args=(session.config.to_json_best_effort(), side, send))
    child.start()
    send.close()
    try:
        return receive.recv()
    except EOFError:
        raise UserError(f"--mode=bench: the memory of {side}: its process died: lower config.batch_size") from None
    finally:
        child.join()


def _measure_memory(config_json: str, side: str, send) -> None:
    from pcpvt.modes.bench import Bench

    config = fields.base()
    records.apply_config(config, json.loads(config_json), "bench")
    session = sessions.start(config, Path())
    bench = Bench(session)
    if side == "ours":
        step = build.train_step(session, bench.model, bench.plan, bench.optimizer)
        for _ in range(2):
            bench.state, _ = step(bench.state, bench.batch)
    else:
        from pcpvt.modes import bench_peer

        del bench.state  # the peer holds its own parameters and moments
        peer_step = bench_peer.train_step(session, bench.plan, bench.batch, compiled=bench.compile_peer)
        for _ in range(2):
            peer_step()
    session.device.synchronize()
    send.send(session.device.memory()[0])


def first_step_seconds(session: Session) -> dict[str, float]:
    """Seconds from starting the program until its first step is recorded, with a cold and with a warm compile cache."""
    taken = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("cold", "warm"):
            taken[name] = round(_first_step(session, Path(folder) / name, Path(folder) / "cache"), 2)
    return taken


def _first_step(session: Session, workdir: Path, cache: Path) -> float:
    changes = {"steps": 1, "eval_every": "0", "save_every": "0", "log_every": "1 steps", "data.name": "synthetic"}
    words = [w for w in sys.argv[1:] if not w.startswith(("--mode", "--workdir", "--config.epochs"))]
    words += [f"--config.{k}={v}" for k, v in changes.items()]
    words += [f"--workdir={workdir}", f"--config.num_classes={session.config.num_classes or 1000}"]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    start = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, "-m", "pcpvt.main", *words], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
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
