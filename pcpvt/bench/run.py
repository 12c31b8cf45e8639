"""`--mode=bench`: how fast the parts are, alone and beside a peer in the same run, as JSON and as a table.

Train step, evaluation step, input pipeline, the whole loop, single-image latency, peak memory, time to the first step,
and the fraction of the device's measured matrix-product rate that the steps reach; or, with `config.bench.scaling`, how
the steps' cost grows. No checkpoint is read or written.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import torch

from pcpvt.bench import loop as bench_loop
from pcpvt.bench.subprocess import first_step_seconds, peak_memory
from pcpvt.bench.timing import Measured, interleave, once, ratio
from pcpvt.config.plan import Plan, make_plan
from pcpvt.data.loader import EvalBatches, Loader
from pcpvt.data.sources import synthetic
from pcpvt.devices.base import cores
from pcpvt.errors import UserError
from pcpvt.runtime import records
from pcpvt.runtime import session as sessions
from pcpvt.runtime.console import Console
from pcpvt.runtime.session import Session
from pcpvt.train import setup, utilisation

TIMED = 8  # batches drawn for one timing of an input pipeline


def run(session: Session) -> int:
    """Measures, prints a table, writes `result.json`; returns the exit code."""
    config, console = session.config, Console(session.world.is_main)
    if session.world.size > 1:
        raise UserError("--mode=bench: measures one device: give ARG with one, e.g. npu1,perf")
    if config.bench.scaling:
        from pcpvt.bench import scaling as bench_scaling

        return bench_scaling.run(session, console)
    began = time.perf_counter()
    against = config.bench.against
    if against and config.model.name == "pcpvt_nano":
        raise UserError("config.bench.against: timm has no pcpvt_nano: choose another model or leave it empty")
    bench = Bench(session)
    measured = {"train": bench.train(), "eval": bench.evaluation(), "latency": bench.latency()}
    images = {"train": bench.plan.local_batch, "eval": bench.plan.local_batch, "latency": 1}
    sides: dict[str, dict[str, Any]] = {
        side: {part: m[side].figures(images[part]) for part, m in measured.items()}
        for side in (["ours", "peer"] if against else ["ours"])
    }
    peak = matmul_flops(session)
    per_image = utilisation.forward_flops(bench.model, session.size)
    for figures in sides.values():
        for part, passes in (("train", 3), ("eval", 1)):
            rate = figures[part]["images_per_sec"]
            figures[part]["matmul_fraction"] = round(rate * passes * per_image / peak, 4)
    ratios: dict[str, Any] = {}
    if against:
        ratios = {part: ratio(m["peer"], m["ours"]) for part, m in measured.items()}
    sides_input, input_ratios = bench.input()
    for side, figures in sides_input.items():
        sides[side]["input"] = figures
    ratios |= input_ratios
    loop = bench_loop.measure(session)
    for side in sides:
        sides[side]["peak_memory_bytes"] = peak_memory(session, side)
    if against:
        ratios["memory"] = {"median": round(sides["ours"]["peak_memory_bytes"] / sides["peer"]["peak_memory_bytes"], 4)}
    result = {
        **surroundings(session),
        "matmul_flops": round(peak),
        **sides["ours"],
        "loop": loop,
        "peer": sides.get("peer"),
        "ratios": {name: value["median"] for name, value in ratios.items()},
        "ratio_quartiles": {name: value.get("quartiles") for name, value in ratios.items()},
        "first_step_seconds": first_step_seconds(session),
        "seconds": round(time.perf_counter() - began, 1),
    }
    records.write_json(session.workdir / "result.json", result)
    console.say(table(result, sides))
    console.say(f"written to {session.workdir / 'result.json'}")
    return 0


def surroundings(session: Session) -> dict[str, Any]:
    """What was measured, and where: the head of every result."""
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


class Bench:
    """The measured parts, on one synthetic batch of the configured recipe."""

    def __init__(self, session: Session):
        config = session.config
        self.session, self.rounds = session, config.bench.steps
        classes = config.num_classes or 1000
        self.model = sessions.build_model(config, classes)
        blocks = self.model.branches // 2
        micro = session.device.micro_batch(session.size, session.policy.compute, blocks)
        self.plan: Plan = make_plan(config, examples=1 << 20, num_classes=classes, micro_batch=micro)
        source = synthetic("train", session.size, classes, min(256, self.plan.batch))
        self.batch = next(session.device.prefetch([setup.train_batches(session, self.model, source)[0]]))
        params, _ = setup.init_params(session, self.model)
        self.optimizer = setup.optimizer(session, self.plan, params)
        self.state = setup.init_state(session, params, self.optimizer)

    def train(self) -> dict[str, Measured]:
        step = setup.train_step(self.session, self.model, self.plan, self.optimizer)

        def ours() -> None:
            self.state, _ = step(self.state, self.batch)

        subjects: dict[str, Callable[[], object]] = {"ours": ours}
        if self.session.config.bench.against:
            from pcpvt.bench import baseline as bench_peer

            subjects["peer"] = bench_peer.train_step(self.session, self.plan, self.batch)
        return interleave(self.session.device, subjects, self.rounds)

    def evaluation(self) -> dict[str, Measured]:
        return self._forward(self.batch, self.rounds)

    def latency(self) -> dict[str, Measured]:
        one = {name: value[:1] for name, value in self.batch.items() if name in ("image", "label")}
        return self._forward(one, max(self.rounds, 20))

    def _forward(self, batch: dict, rounds: int) -> dict[str, Measured]:
        session = self.session
        predict = session.predictor(self.model)
        weights = session.inference(self.state.params)
        subjects: dict[str, Callable[[], object]] = {"ours": lambda: predict(weights, batch["image"])}
        if session.config.bench.against:
            from pcpvt.bench import baseline as bench_peer

            subjects["peer"] = bench_peer.forward(session, self.plan.num_classes, batch)
        return interleave(session.device, subjects, rounds)

    def input(self) -> tuple[dict[str, dict], dict[str, Any]]:
        """Images/s of the training and evaluation pipelines alone, on all cores: nothing else runs."""
        session, config = self.session, self.session.config
        if config.data.name not in ("folder", "digits"):
            return {"ours": {"skipped": f"config.data.name is {config.data.name!r}: nothing is decoded"}}, {}
        source = sessions.open_data(session, "train")
        workers = config.data.workers if config.data.workers >= 0 else 0 if source.in_memory else cores()
        figures: dict[str, dict] = {"ours": {"workers": workers}, "peer": {"workers": workers}}
        ratios: dict[str, Any] = {}
        for split in ("train", "val"):
            subjects = {"ours": self._pull(self._ours(split, workers), workers)}
            if config.bench.against and config.data.name == "folder":
                from pcpvt.bench import baseline as bench_peer

                subjects["peer"] = self._pull(bench_peer.loader(session, self.plan, split, workers), workers)
            taken: dict[str, Measured] = {name: Measured([], []) for name in subjects}
            for _ in range(self.rounds):
                for name, (fill, timed) in subjects.items():
                    fill()
                    seconds, disturbed = once(session.device, timed)
                    taken[name].seconds.append(seconds)
                    taken[name].disturbed.append(disturbed)
                    time.sleep(seconds)  # its workers read ahead again: not while the other side is timed
            for name, measured in taken.items():
                figures[name][split] = measured.figures(TIMED * self.plan.local_batch)
            if "peer" in taken:
                ratios[f"input {split}"] = ratio(taken["peer"], taken["ours"])
        return {s: f for s, f in figures.items() if "train" in f}, ratios

    def _ours(self, split: str, workers: int):
        session, config = self.session, self.session.config
        source = sessions.open_data(session, split)
        if split == "train":
            training = setup.train_batches(session, self.model, source)
            yield from Loader(training, range(1 << 30), workers, start=session.device.worker_start)
        batches = EvalBatches(source, session.size, config.eval.crop, self.plan.local_batch, 0, 1, "error")
        full = range(max(1, len(source) // self.plan.local_batch))
        loader = Loader(batches, full, workers, start=session.device.worker_start)
        while True:
            yield from loader

    @staticmethod
    def _pull(batches, workers: int) -> tuple[Callable[[], None], Callable[[], None]]:
        """(draw what was read ahead while the other side was measured, draw TIMED batches)."""

        def pull(count: int) -> None:
            for _ in itertools.islice(batches, count):
                pass

        return lambda: pull(2 * workers + 1), lambda: pull(TIMED)


def matmul_flops(session: Session, side: int = 2048) -> float:
    """Floating-point operations per second of a large linear map by the device's kernel: the best of ten."""
    device, dtype = session.device, session.policy.compute
    side = 8192 if device.name == "cuda" else side
    a = torch.randn(side, side, dtype=torch.float32, device=device.torch).to(dtype)
    linear, bias = session.kernels.linear, a[0].contiguous()
    with torch.no_grad():
        linear(a, a, bias)
        seconds = min(once(device, lambda: linear(a, a, bias))[0] for _ in range(10))
    return 2 * side**3 / seconds


def table(result: dict, sides: dict[str, dict]) -> str:
    """The figures for a person."""
    height, width = result["image_size"]
    rate = result["matmul_flops"] / 1e9
    rows = [
        f"{result['model']} {height}x{width} batch {result['batch']}, {result['precision']}",
        f"{result['device']}, compile {result['compile']}, matrix product {rate:.0f} GFLOP/s",
    ]
    for side, figures in sides.items():
        for part in ("train", "eval", "latency"):
            f = figures[part]
            share = f"  {100 * f['matmul_fraction']:.1f} % of the matrix rate" if "matmul_fraction" in f else ""
            mark = f"  ({f['disturbed_rounds']} disturbed)" if f["disturbed_rounds"] else ""
            rows.append(f"{side:5} {part:8} {f['images_per_sec']:10.1f} images/s {f['ms']:10.1f} ms{share}{mark}")
        for split in ("train", "val"):
            if split in figures.get("input", {}):
                f = figures["input"][split]
                rows.append(f"{side:5} input {split:5} {f['images_per_sec']:7.1f} images/s")
        rows.append(f"{side:5} memory   {figures['peak_memory_bytes'] / 1e9:10.2f} GB at the peak of a training step")
    loop = result["loop"]
    mark = "  (disturbed)" if loop["disturbed"] else ""
    waiting = f"{100 * loop['waiting']:.1f} % of the time waiting for data, {loop['workers']} loader processes"
    rows.append(f"{'ours':5} {'loop':8} {loop['images_per_sec']:10.1f} images/s  {waiting}{mark}")
    if result["ratios"]:
        rows.append("ours over the peer's: " + "  ".join(f"{k} {v:.3f}" for k, v in result["ratios"].items()))
    first = result["first_step_seconds"]
    rows.append(f"first step after {first['cold']} s with a cold compile cache, {first['warm']} s with a warm one")
    return "\n".join(rows)
