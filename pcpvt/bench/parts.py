"""What the benchmark measures: steps, single-image latency, input pipelines, the whole loop, matrix products."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from pcpvt.bench import baseline
from pcpvt.bench.timing import Round, interleave, once
from pcpvt.data.loader import EvalBatches, TrainBatches
from pcpvt.data.sources import Dataset, synthetic
from pcpvt.devices.base import cores
from pcpvt.functional.objective import Batch
from pcpvt.runtime import session as sessions
from pcpvt.runtime.session import Session
from pcpvt.train import setup

STEPS = ("train", "eval", "latency")  # train step, evaluation of the whole batch, evaluation of one image
TIMED = 8  # batches drawn for one timing of an input pipeline
EPOCH = 1 << 20  # examples that the plan of a synthetic batch assumes, about as many as ImageNet has


class Bench:
    """The configured training on a data set, and the measured parts of each side ("ours", and "peer" if configured).

    Without a data set, it is one synthetic batch.
    """

    def __init__(self, session: Session, source: Dataset | None = None):
        config, examples = session.config, EPOCH if source is None else len(source)
        if source is None:
            source = synthetic("train", session.size, config.num_classes or 1000, min(256, config.batch_size))
        self.session, self.rounds = session, config.bench.steps
        self.sides = ("ours", "peer") if config.bench.against else ("ours",)
        self.model = sessions.build_model(config, sessions.count_classes(config, source))
        self.plan = setup.plan_run(session, self.model, examples)
        self.batches = setup.train_batches(session, self.model, source)
        params, _ = setup.init_params(session, self.model)
        optimizer = setup.optimizer(session, self.plan, params)
        self.state = setup.init_state(session, params, optimizer)
        self._step = setup.train_step(session, self.model, self.plan, optimizer)

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
        return interleave(self.session.device, {side: self.step(side, part) for side in self.sides}, rounds)

    def step(self, side: str, part: str) -> Callable[[], object]:
        """A side's step of one of STEPS, as a function to call repeatedly."""
        session, batch = self.session, self.batch
        if part == "train":
            if side == "peer":
                return baseline.train_step(session, self.plan, batch)
            return lambda: self.advance(batch)
        if part == "latency":
            batch = {name: batch[name][:1] for name in ("image", "label")}
        if side == "peer":
            return baseline.forward(session, self.plan.num_classes, batch)
        predict, weights = session.predictor(self.model), session.inference(self.state.params)
        return lambda: predict(weights, batch["image"])

    def input_pipelines(self) -> tuple[int, dict[str, dict[str, list[Round]]]]:
        """Loader processes, and timings of TIMED batches by split and side, of the input pipelines on all cores."""
        session, data = self.session, self.session.config.data
        workers = data.workers
        if workers < 0:
            workers = 0 if sessions.open_data(session, "train").in_memory else cores()
        timings: dict[str, dict[str, list[Round]]] = {}
        for split in ("train", "val"):
            streams = {"ours": self._stream(split, workers)}
            if "peer" in self.sides and data.name == "folder":
                streams["peer"] = baseline.loader(session, self.plan, split, workers)
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
            batches = EvalBatches(source, session.size, session.config.eval.crop, size, 0, 1, "error")
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


def result_header(session: Session) -> dict[str, Any]:
    """What is measured and where: the first entries of every result."""
    config, device = session.config, session.device.describe()
    return {
        "mode": "bench", "model": config.model.name, "device": device, "precision": str(session.policy),
        "batch": config.batch_size, "image_size": list(session.size), "compile": config.compile,
        "against": config.bench.against or None, "torch": torch.__version__, "threads": torch.get_num_threads(),
    }  # fmt: skip
