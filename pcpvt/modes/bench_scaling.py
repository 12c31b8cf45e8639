"""`--config.bench.scaling`: how the cost of our steps grows with the batch, the image size and the processes.

Each point is measured in a process of its own: that is what its peak memory belongs to, and one that runs out of memory
ends alone. Mixing is off, because it pairs samples and a batch of 1 has none to pair.
"""

from __future__ import annotations

import html
import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from pcpvt.errors import UserError
from pcpvt.models.pcpvt import STRIDE
from pcpvt.modes import report, report_page
from pcpvt.modes.bench import Bench, surroundings
from pcpvt.modes.bench_process import OutOfMemory, alone, training
from pcpvt.modes.console import Console
from pcpvt.modes.report_charts import Series, chart
from pcpvt.modes.session import Session
from pcpvt.store import records
from pcpvt.store.durable import write_atomically

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

    def tell(text: str) -> None:
        rows.append(text)
        console.say(text)

    console.say(rows[0])
    scaling: dict[str, list[Point]] = {"batch": [], "size": [], "processes": []}
    for batch in BATCHES:
        scaling["batch"].append(measure(config, {"batch_size": batch}))
        tell(row(scaling["batch"][-1]))
    for side in sizes(config.image_size):
        scaling["size"].append(measure(config, {"image_size": side, "image_width": side}))
        tell(row(scaling["size"][-1]))
    for count in PROCESSES:
        if has(session, count):
            scaling["processes"].append(together(session, count))
            tell(row(scaling["processes"][-1]))
    result = {**surroundings(session), "scaling": scaling, "seconds": round(time.perf_counter() - began, 1)}
    records.write_json(session.workdir / "result.json", result)
    text = page(f"{config.model.name}: how cost grows", scaling, rows)
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
        return point | alone(steps, changed)
    except OutOfMemory:
        return point | {"out_of_memory": True}


def steps(session: Session) -> Point:
    """The figures of one point, for a process of its own."""
    bench = Bench(session)
    train = bench.train()["ours"]
    memory = session.device.memory()[0]  # before the evaluation, which takes a batch whole
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
    if "SIGKILL" in done.stderr or "memory" in done.stderr:
        return point | {"out_of_memory": True}
    raise UserError(f"--mode=bench: the run of {count} processes failed: {done.stderr[-300:]}")


def row(point: Point) -> str:
    """A point's line in the table."""
    height, width = point["image_size"]
    processes = f"  {point['processes']} processes" if "processes" in point else ""
    head = f"batch {point['batch']:4}  {height:4}x{width:<4}{processes}"
    if "out_of_memory" in point:
        return f"{head}  out of memory"
    for part in PARTS:
        if part in point:
            head += f"  {part} {point[part]['images_per_sec']:8.1f} images/s {point[part]['ms']:9.1f} ms"
    return head + (f"  {point['peak_memory_bytes'] / 1e9:6.2f} GB" if "peak_memory_bytes" in point else "")


def page(title: str, scaling: dict[str, list[Point]], rows: Sequence[str]) -> str:
    """The report: speed and memory against batch, pixels and processes, and the table."""
    batch, size, processes = ([p for p in points if "out_of_memory" not in p] for points in scaling.values())
    costs = curves(size, pixels, lambda p, part: p[part]["ms"] / p["batch"])
    costs += [Series(f"{s.name}, in proportion", line(s.points), s.color, True) for s in costs if s.points]
    charts = (
        ("Images/s against batch", "batch", curves(batch, lambda p: p["batch"], rate)),
        ("Images/s against processes", "processes", curves(processes, lambda p: p["processes"], rate)[:1]),
        ("Peak memory of training in GB against batch", "batch", curves(batch, lambda p: p["batch"], memory)[:1]),
        ("Peak memory of training in GB against pixels", "pixels", curves(size, pixels, memory)[:1]),
        ("ms per image against pixels", "pixels", costs),
    )
    drawn = "".join(chart(name, series, x=x, zero=True) for name, x, series in charts)
    text = html.escape("\n".join(rows))
    table = f'<section class="card scroll"><pre>{text}</pre></section>'
    return report_page.document(title, f'<h1>{html.escape(title)}</h1><section class="grid">{drawn}</section>{table}')


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


def pixels(point: Point) -> int:
    height, width = point["image_size"]
    return height * width


def line(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """What cost in proportion to pixels would be, from the first point on."""
    x, y = points[0]
    return [(at, y * at / x) for at, _ in points]
