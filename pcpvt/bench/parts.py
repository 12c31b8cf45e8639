"""What the benchmark measures: train step, evaluation step, single-image latency, input pipelines, matrix products."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from pcpvt.bench import baseline
from pcpvt.bench.timing import Timings, interleave, once, ratio
from pcpvt.data.loader import EvalBatches, Loader, TrainBatches
from pcpvt.data.sources import synthetic
from pcpvt.devices.base import cores
from pcpvt.functional.objective import Batch
from pcpvt.runtime import session as sessions
from pcpvt.runtime.session import Session
from pcpvt.train import setup

STEPS = ("train", "eval", "latency")  # train step, evaluation of the whole batch, evaluation of one image
TIMED = 8  # batches drawn for one timing of an input pipeline
EPOCH = 1 << 20  # examples that the plan of a synthetic batch assumes, about as many as ImageNet has


class Training:
    """The configured training: model, plan, train step, and the state that it advances.

    Args:
        examples: training images per epoch, for the plan.
    """

    def __init__(self, session: Session, num_classes: int, examples: int):
        self.model = sessions.build_model(session.config, num_classes)
        self.plan = setup.plan_run(session, self.model, examples)
        params, _ = setup.init_params(session, self.model)
        optimizer = setup.optimizer(session, self.plan, params)
        self.state = setup.init_state(session, params, optimizer)
        self._step = setup.train_step(session, self.model, self.plan, optimizer)

    def advance(self, batch: Batch) -> None:
        """Takes one train step."""
        self.state, _ = self._step(self.state, batch)


class Bench:
    """The measured parts of each side ("ours", and "peer" if one is configured), on one synthetic batch."""

    def __init__(self, session: Session):
        config = session.config
        self.session, self.rounds = session, config.bench.steps
        self.sides = ("ours", "peer") if config.bench.against else ("ours",)
        self.training = Training(session, config.num_classes or 1000, EPOCH)
        self.plan = self.training.plan
        source = synthetic("train", session.size, self.plan.num_classes, min(256, self.plan.batch))
        batches = setup.train_batches(session, self.training.model, source)
        self.batch = next(session.device.prefetch([batches[0]]))

    def measure(self, part: str) -> dict[str, Timings]:
        """Timings by side of one of STEPS."""
        rounds = max(self.rounds, 20) if part == "latency" else self.rounds
        return interleave(self.session.device, {side: self.step(side, part) for side in self.sides}, rounds)

    def step(self, side: str, part: str) -> Callable[[], object]:
        """A side's step of one of STEPS, as a function to call repeatedly."""
        session, batch = self.session, self.batch
        if part == "train":
            if side == "peer":
                return baseline.train_step(session, self.plan, batch)
            return lambda: self.training.advance(batch)
        if part == "latency":
            batch = {name: batch[name][:1] for name in ("image", "label")}
        if side == "peer":
            return baseline.forward(session, self.plan.num_classes, batch)
        predict, weights = session.predictor(self.training.model), session.inference(self.training.state.params)
        return lambda: predict(weights, batch["image"])

    def input_pipelines(self) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
        """Figures of each side's training and evaluation pipelines alone, on all cores, and the ratios of the sides."""
        session, config = self.session, self.session.config
        if config.data.name not in ("folder", "digits"):
            return {"ours": {"skipped": f"config.data.name is {config.data.name!r}: nothing is decoded"}}, {}
        in_memory = sessions.open_data(session, "train").in_memory
        workers = config.data.workers if config.data.workers >= 0 else 0 if in_memory else cores()
        sides = self.sides if config.data.name == "folder" else ("ours",)
        figures: dict[str, dict[str, Any]] = {side: {"workers": workers} for side in sides}
        ratios = {}
        for split in ("train", "val"):
            streams = {"ours": self._stream(split, workers)}
            if "peer" in sides:
                streams["peer"] = baseline.loader(session, self.plan, split, workers)
            timings = {side: Timings([], []) for side in sides}
            for _ in range(self.rounds):
                for side, stream in streams.items():
                    _draw(stream, 2 * workers + 1)  # what was read ahead while the other side was timed
                    seconds = timings[side].add(*once(session.device, functools.partial(_draw, stream, TIMED)))
                    time.sleep(seconds)  # lets its workers read ahead again before the other side is timed
            for side in sides:
                figures[side][split] = timings[side].figures(TIMED * self.plan.local_batch)
            if "peer" in sides:
                ratios[f"input {split}"] = ratio(timings["peer"], timings["ours"])
        return figures, ratios

    def _stream(self, split: str, workers: int) -> Iterator[Batch]:
        """Our batches of a split, without end."""
        session, size = self.session, self.plan.local_batch
        source = sessions.open_data(session, split)
        batches: TrainBatches | EvalBatches = setup.train_batches(session, self.training.model, source)
        indices = range(1 << 30)
        if split == "val":
            batches = EvalBatches(source, session.size, session.config.eval.crop, size, 0, 1, "error")
            indices = range(max(1, len(source) // size))  # full batches only
        loader = Loader(batches, indices, workers, start=session.device.worker_start)
        while True:
            yield from loader


def _draw(batches: Iterable, count: int) -> None:
    for _ in itertools.islice(batches, count):
        pass


def matmul_flops(session: Session) -> float:
    """Floating-point operations per second of a large linear map by the device's kernel: the best of ten."""
    device, dtype = session.device, session.policy.compute
    side = 8192 if device.name == "cuda" else 2048
    a = torch.randn(side, side, dtype=torch.float32, device=device.torch).to(dtype)
    linear, bias = session.kernels.linear, a[0].contiguous()
    with torch.no_grad():
        linear(a, a, bias)
        seconds = min(once(device, lambda: linear(a, a, bias))[0] for _ in range(10))
    return 2 * side**3 / seconds


def result_header(session: Session) -> dict[str, Any]:
    """What is measured and where: the first entries of every result."""
    config = session.config
    return {
        "mode": "bench",
        "model": config.model.name,
        "device": session.device.describe(),
        "precision": str(session.policy),
        "batch": config.batch_size,
        "image_size": list(session.size),
        "compile": config.compile,
        "against": config.bench.against or None,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
