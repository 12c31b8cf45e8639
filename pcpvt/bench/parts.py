"""The benchmark's measurements: steps, single-image latency, input pipelines, the whole loop, matrix products.

Peak memory, whatever may run out of it, and the time to the first step are measured in separate processes.
"""

import copy
import functools
import itertools
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from ml_collections import ConfigDict

from pcpvt.bench import baseline, exports
from pcpvt.bench.timing import Round, interleave, once
from pcpvt.data.loader import EvalBatches, TrainBatches
from pcpvt.data.sources import Dataset, Files, synthetic
from pcpvt.devices.base import cores
from pcpvt.errors import UserError
from pcpvt.functional.objective import Batch
from pcpvt.runners.classifier import classifier
from pcpvt.runners.runner import Runner
from pcpvt.runtime import records
from pcpvt.runtime import session as sessions
from pcpvt.runtime.session import Session
from pcpvt.train import parameters, setup

STEPS = ("train", "eval", "latency")  # train step, evaluation of the whole batch, evaluation of one image
COMPILED = "timm-compiled"
RESULT = "result-bench.json"  # in the workdir; a training's `result.json` stays
TIMED = 8  # batches drawn for one timing of an input pipeline
EPOCH = 1 << 20  # examples that the plan of a synthetic batch assumes, about as many as ImageNet has
KILLED = (-signal.SIGKILL, 128 + signal.SIGKILL)  # exit codes of a process that the kernel killed for lack of memory


def peers(config: ConfigDict) -> list[str]:
    """What is measured beside "ours"."""
    return [word for word in config.bench.against.split(",") if word]


class Bench:
    """The configured training on a data set (default: noise), and measured parts of "ours" and of the peers."""

    def __init__(self, session: Session, source: Dataset | None = None):
        config, examples = session.config, EPOCH if source is None else len(source)
        if source is None:
            source = synthetic("train", session.size, config.num_classes or 1000, min(256, config.batch_size))
        self.session, self.rounds = session, config.bench.steps
        self.peers = peers(config)
        self.model = sessions.build_model(config, sessions.count_classes(config, source))
        self.plan = setup.plan_run(session, self.model, examples)
        self.batches = setup.train_batches(session, self.model, source)
        params, _ = parameters.init_params(session, self.model)
        groups = parameters.param_groups(session, params)
        optimizer = setup.optimizer(session, self.plan, groups)
        self.state = setup.init_state(session, params, groups, optimizer)
        self._step = setup.train_step(session, self.model, self.plan, optimizer)
        self.graphs: dict[str, Runner] = {}

    @functools.cached_property
    def batch(self) -> Batch:
        """The first training batch, on the device."""
        return next(self.session.device.prefetch([self.batches[0]]))

    def advance(self, batch: Batch) -> None:
        """Takes one train step."""
        self.state, _ = self._step(self.state, batch)

    def measure(self, part: str) -> dict[str, list[Round]]:
        """Timings by side of one of STEPS."""
        rounds = max(self.rounds, 20) if part == "latency" else self.rounds
        sides = ["ours", *(peer for peer in self.peers if part != "train" or not exports.is_export(peer))]
        return interleave(self.session.device, {side: self.step(side, part) for side in sides}, rounds)

    def step(self, side: str, part: str) -> Callable[[], object]:
        """A side's step of one of STEPS, as a function to call repeatedly."""
        session, batch = self.session, self.batch
        if part == "train":
            if side == "ours":
                return lambda: self.advance(batch)
            return baseline.train_step(session, self.plan, batch, side == COMPILED)
        if part == "latency":
            batch = {name: batch[name][:1] for name in ("image", "label")}
        if exports.is_export(side):
            if side not in self.graphs:
                self.graphs[side] = exports.open_peer(session, self.model, self.state.params, side)
            return lambda: self.graphs[side].predict(batch["image"])
        if side != "ours":
            return baseline.forward(session, self.plan.num_classes, batch, side == COMPILED)
        predict = classifier(session, self.model, self.state.params)
        return lambda: predict(batch["image"])

    def input_pipelines(self) -> tuple[int, dict[str, dict[str, list[Round]]]]:
        """Loader processes, and timings of TIMED batches by split and side, of the input pipelines on all cores."""
        session, data = self.session, self.session.config.data
        workers = data.workers
        if workers < 0:
            workers = 0 if sessions.open_data(session, "train").in_memory else cores()
        timings: dict[str, dict[str, list[Round]]] = {}
        for split in ("train", "val"):
            streams = {"ours": self._stream(split, workers)}
            source = sessions.open_data(session, split)
            timm = next((peer for peer in self.peers if not exports.is_export(peer)), "")  # compiled or not: one loader
            if timm and isinstance(source, Files) and source.places:  # class folders
                streams[timm] = baseline.loader(session, self.plan, split, source.root, workers)
            timings[split] = {side: [] for side in streams}
            for _, (side, stream) in itertools.product(range(self.rounds), streams.items()):
                _draw(stream, 2 * workers + 1)  # what was read ahead while the other side was timed
                timings[split][side].append(once(session.device, functools.partial(_draw, stream, TIMED)))
                time.sleep(timings[split][side][-1].value)  # lets its workers read ahead again
        return workers, timings

    def _stream(self, split: str, workers: int) -> Iterator[Batch]:
        """Our batches of a split, without end."""
        session, size = self.session, self.plan.local_batch
        source = sessions.open_data(session, split)
        batches: TrainBatches | EvalBatches = setup.train_batches(session, self.model, source)
        indices = range(1 << 30)
        if split == "val":
            batches = EvalBatches(source, session.size, session.config.eval.crop, size, 0, 1, "error", session.reading)
            indices = range(max(1, len(source) // size))  # full batches only
        loader = sessions.open_loader(session, batches, indices, workers)
        while True:
            yield from loader


def _draw(batches: Iterable, count: int) -> None:
    for _ in itertools.islice(batches, count):
        pass


def measure_loop(session: Session) -> dict[str, Any]:
    """Images/s of loader, transfer and train step together on the configured data, and the share of time waited."""
    steps, source = session.config.bench.steps, sessions.open_data(session, "train")
    bench, workers = Bench(session, source), sessions.workers(session, source)
    warm_up = 2 * workers + 2  # uses up what was read ahead while the first step started or was compiled
    loader = sessions.open_loader(session, bench.batches, range(warm_up + steps), workers)
    ready = iter(session.device.prefetch(loader))
    waits: list[float] = []  # seconds by step

    def advance(count: int) -> None:
        for _ in range(count):
            began = time.perf_counter()
            batch = next(ready)
            waits.append(time.perf_counter() - began)
            bench.advance(batch)

    advance(warm_up)
    waits.clear()
    seconds, disturbed = once(session.device, lambda: advance(steps))
    rate, waiting = round(steps * bench.plan.batch / seconds, 3), round(sum(waits) / seconds, 4)
    return {"images_per_sec": rate, "waiting": waiting, "workers": workers, "disturbed": disturbed}


def matmul_flops(session: Session) -> float:
    """Floating-point operations per second of a large linear map by the device's kernel: the best of ten."""
    device, dtype = session.device, session.policy.compute
    side = 8192 if device.name == "cuda" else 2048
    a = torch.randn(side, side, dtype=torch.float32, device=device.torch).to(dtype)
    linear, bias = session.kernels.linear, a[0].contiguous()
    with torch.no_grad():
        linear(a, a, bias)
        seconds = min(once(device, lambda: linear(a, a, bias)).value for _ in range(10))
    return 2 * side**3 / seconds


class OutOfMemory(Exception):
    """A measurement that the host or the device had too little memory for."""


def run_in_subprocess(measure: Callable[..., Any], config: ConfigDict, *args: Any) -> Any:
    """`measure(session, *args)` in a new process; raises OutOfMemory, its UserError, or one when the process died."""
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
    if side != "ours":
        del bench.state  # the peer holds its own parameters and moments
    step = bench.step(side, "train")
    for _ in range(2):
        step()
    session.device.synchronize()
    return session.device.memory_stats()[0]


def train_command(session: Session, workdir: Path, changes: dict[str, Any]) -> list[str]:
    """The command of a short training on noise images: this bench's config with `changes`, stored in the workdir."""
    config = copy.deepcopy(session.config)
    config.epochs = config.examples = None  # `changes` give the steps
    config.checkpoint, config.eval_every, config.save_every, config.data.name = "", "0", "0", "synthetic"
    config.num_classes, config.restarts = config.num_classes or 1000, 0  # a failure is a result
    config.update_from_flattened_dict(changes)
    workdir.mkdir(parents=True, exist_ok=True)
    records.write_json(workdir / "config.json", config.to_dict())
    return [sys.executable, "-m", "pcpvt.main", f"--workdir={workdir}"]


def images_per_sec(session: Session, changes: dict[str, Any]) -> float:
    """Images/s of a short training with `changes` of fields; OutOfMemory, or UserError with its error's last line."""
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


def result_header(session: Session) -> dict[str, Any]:
    """What is measured and where: the first entries of every result."""
    config, device = session.config, session.device.describe()
    return {
        "mode": "bench", "model": config.model.name, "device": device, "precision": str(session.policy),
        "batch": config.batch_size, "image_size": list(session.size), "compile": config.compile,
        "against": config.bench.against or None, "torch": torch.__version__, "threads": torch.get_num_threads(),
    }  # fmt: skip
