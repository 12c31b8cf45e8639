"""`--config.bench.scaling`: how the cost of our steps grows with the batch, the image size and the processes.

Each point is measured in a process of its own: that is what its peak memory belongs to, and one that runs out of memory
ends alone. Mixing is off, because it pairs samples and a batch of 1 has none to pair.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from pcpvt.bench.run import Bench, surroundings
from pcpvt.bench.subprocess import KILLED, OutOfMemory, lacks_memory, run_in_subprocess, training
from pcpvt.checkpoints.atomic import write_atomically
from pcpvt.errors import UserError
from pcpvt.models.pcpvt import STRIDE
from pcpvt.report import run as report
from pcpvt.report.charts import Series, chart
from pcpvt.report.page import render_charts
from pcpvt.runtime import records
from pcpvt.runtime.console import Console
from pcpvt.runtime.session import Session

BATCHES = (1, 2, 4, 8, 16, 32, 64)
SIZES = (224, 256, 320, 384, 448, 512)
PROCESSES = (1, 2, 4)
PARTS = {"train": "training", "eval": "evaluation"}
UNMIXED = {"mixup": 0.0, "cutmix": 0.0, "accumulate": 0}

Point = dict[str, Any]


def run(session: Session, console: Console) -> int:
    """Measures, prints each point, writes `result.json` and `report.html`; returns the exit code."""
    began, config = time.perf_counter(), session.config
    rows = [f"{config.model.name}, {session.policy}, {session.device.describe()}, compile {config.compile}"]
    console.say(rows[0])

    def tell(point: Point) -> Point:
        rows.append(row(point))
        console.say(rows[-1])
        return point

    sides = sizes(config.image_size)
    scaling = {
        "batch": [tell(measure(config, {"batch_size": batch})) for batch in BATCHES],
        "size": [tell(measure(config, {"image_size": side, "image_width": side})) for side in sides],
        "processes": [tell(together(session, count)) for count in PROCESSES if has(session, count)],
    }
    result = {**surroundings(session), "scaling": scaling, "seconds": round(time.perf_counter() - began, 1)}
    records.write_json(session.workdir / "result.json", result)
    text = page(f"{config.model.name}: how cost grows", scaling, "\n".join(rows))
    write_atomically(session.workdir / report.FILE, lambda temporary: temporary.write_text(text))
    console.say(f"written to {session.workdir}: result.json, {report.FILE}")
    return 0


def sizes(configured: int) -> list[int]:
    """Sides of the images in pixels: SIZES, or from a smaller configured size on, in multiples of the stride."""
    if configured >= SIZES[0]:
        return list(SIZES)
    wanted = (configured * halves / 2 for halves in range(2, 2 + len(SIZES)))
    return sorted({-int(-side // STRIDE) * STRIDE for side in wanted})


def measure(config: ConfigDict, changes: dict[str, int]) -> Point:
    """Our training and evaluation steps with `changes` of the config, and the peak memory of training."""
    changed = ConfigDict(config)
    changed.update(UNMIXED | changes)
    point: Point = {
        "batch": changed.batch_size,
        "image_size": [changed.image_size, changed.image_width or changed.image_size],
    }
    try:
        return point | run_in_subprocess(timed, changed)
    except OutOfMemory:
        return point | {"out_of_memory": True}


def timed(session: Session) -> Point:
    """The figures of one point, for a process of its own."""
    bench = Bench(session)
    train = bench.train()["ours"]
    memory = session.device.memory_stats()[0]  # before the evaluation, which takes a batch whole
    evaluation = bench.evaluation()["ours"]
    images = bench.plan.batch
    return {"train": train.figures(images), "eval": evaluation.figures(images), "peak_memory_bytes": memory}


def has(session: Session, count: int) -> bool:
    """Whether this host has devices for so many processes; those of a CPU share its cores."""
    try:
        session.device.require(count)
    except UserError:
        return False
    return True


def together(session: Session, count: int) -> Point:
    """A short training of `count` processes with the configured batch each, through the launcher."""
    batch, steps = count * session.config.batch_size, session.config.bench.steps
    point: Point = {"processes": count, "batch": batch, "image_size": list(session.size)}
    # One step more than is measured: the run leaves its first one out.
    changes = {"processes": count, "batch_size": batch, "steps": steps + 1, **UNMIXED}
    changes |= {"augment.randaugment": "", "tensorboard": False, "data.workers": 0}
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(training(session, Path(folder), changes), capture_output=True, text=True)
        if done.returncode == 0:
            rate = json.loads((Path(folder) / "result.json").read_text())["images_per_sec"]
            return point | {"train": {"images_per_sec": rate, "ms": round(1e3 * batch / rate, 3)}}
    if done.returncode in KILLED or lacks_memory(done.stderr):
        return point | {"out_of_memory": True}
    said = done.stderr.strip().rpartition("\n")[2].removeprefix("pcpvt: error: ")
    raise UserError(f"--mode=bench: the training with config.processes={count} failed: {said}")


def row(point: Point) -> str:
    """A point's line in the table; of several processes, `4 x 16` is four with 16 images each."""
    height, width = point["image_size"]
    processes = f"  {point['processes']} x {point['batch'] // point['processes']}" if "processes" in point else ""
    text = f"batch {point['batch']:4}{processes:9}{height:4}x{width:<4}"
    if "out_of_memory" in point:
        return f"{text}  out of memory"
    for part in PARTS:
        if part in point:
            text += f"  {part} {point[part]['images_per_sec']:8.1f} images/s {point[part]['ms']:9.1f} ms"
    if "peak_memory_bytes" in point:
        text += f"  peak {point['peak_memory_bytes'] / 1e9:6.2f} GB"
    disturbed = any(point[part].get("disturbed_rounds") for part in PARTS if part in point)
    return f"{text}  (disturbed)" if disturbed else text


def page(title: str, scaling: dict[str, list[Point]], table: str) -> str:
    """The report: speed and memory against batch, pixels and processes, and the table."""
    batch, size, processes = ([p for p in points if "out_of_memory" not in p] for points in scaling.values())
    costs = curves(size, pixels, lambda p, part: p[part]["ms"] / p["batch"])
    costs += [Series(f"{s.name}, in proportion", line(s.points), s.color, True) for s in costs if s.points]
    charts = (
        ("Images/s against batch", "batch", curves(batch, lambda p: p["batch"], rate)),
        ("Images/s against processes", "processes", curves(processes, lambda p: p["processes"], rate)[:1]),
        ("Peak memory of training in GB against batch", "batch", curves(batch, lambda p: p["batch"], memory)[:1]),
        ("Peak memory of training in GB against thousand pixels", "thousand pixels", curves(size, pixels, memory)[:1]),
        ("ms per image against thousand pixels", "thousand pixels", costs),
    )
    return render_charts(title, [chart(name, series, x=x, zero=True) for name, x, series in charts], table)


def curves(points: Sequence[Point], x: Callable[[Point], float], y: Callable[[Point, str], float]) -> list[Series]:
    """A curve for each of PARTS that the points have."""
    return [
        Series(name, [(x(p), y(p, part)) for p in points if part in p], color)
        for color, (part, name) in enumerate(PARTS.items())
    ]


def rate(point: Point, part: str) -> float:
    return point[part]["images_per_sec"]


def memory(point: Point, part: str) -> float:
    return point["peak_memory_bytes"] / 1e9


def pixels(point: Point) -> float:
    """Thousands of them, which fit below an axis."""
    height, width = point["image_size"]
    return height * width / 1000


def line(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """What cost in proportion to pixels would be, from the first point on."""
    x, y = points[0]
    return [(at, y * at / x) for at, _ in points]
