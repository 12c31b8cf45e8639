"""`--config.bench.scaling`: how the cost of our steps grows with the batch, the image size and the processes.

Each point is measured in a process of its own, so that its peak memory is its own and running out of memory ends
that point only. Mixing is off, because it pairs samples and a batch of 1 has none to pair.
"""

import contextlib
import time
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from pcpvt.bench.parts import RESULT, Bench, OutOfMemory, images_per_sec, result_header, run_in_subprocess
from pcpvt.bench.timing import figures
from pcpvt.checkpoints.atomic import write_atomically
from pcpvt.errors import UserError
from pcpvt.models.pcpvt import STRIDE
from pcpvt.report.charts import Series, chart
from pcpvt.report.run import render
from pcpvt.runtime import records
from pcpvt.runtime import session as sessions
from pcpvt.runtime.console import Console
from pcpvt.runtime.session import Session

BATCHES = (1, 2, 4, 8, 16, 32, 64)
SIZES = (224, 256, 320, 384, 448, 512)
PROCESSES = (1, 2, 4)
PAGE = "bench.html"
PARTS = {"train": "training", "eval": "evaluation"}
UNMIXED = {"mixup": 0.0, "cutmix": 0.0, "accumulate": 0}
CHARTS = (  # title, points, horizontal and vertical quantity (see `quantities`)
    ("Images/s against batch", "batch", "batch", "images/s"),
    ("Images/s against processes", "processes", "processes", "images/s"),
    ("Peak memory of training in GB against batch", "batch", "batch", "GB"),
    ("Peak memory of training in GB against thousand pixels", "size", "thousand pixels", "GB"),
    ("ms per image against thousand pixels", "size", "thousand pixels", "ms per image"),
)

Point = dict[str, Any]


def run(session: Session, console: Console) -> int:
    """Measures, prints each point, writes `result-bench.json` and `bench.html`; returns the exit code."""
    began, config = time.perf_counter(), session.config
    rows = [f"{config.model.name}, {session.policy}, {session.device.describe()}, compile {config.compile}"]
    console.say(rows[0])
    counts = []  # on a CPU, processes share its cores
    for count in PROCESSES:
        with contextlib.suppress(UserError):
            session.device.require(count)
            counts.append(count)
    subjects = {
        "batch": (measure(config, {"batch_size": batch}) for batch in BATCHES),
        "size": (measure(config, {"image_size": n, "image_width": n}) for n in sizes(config.image_size)),
        "processes": (measure_processes(session, n) for n in counts),
    }
    scaling: dict[str, list[Point]] = {name: [] for name in subjects}
    for name, points in subjects.items():
        for point in points:  # is measured here
            scaling[name].append(point)
            rows.append(row(point))
            console.say(rows[-1])
    result = {**result_header(session), "scaling": scaling, "seconds": round(time.perf_counter() - began, 1)}
    records.write_json(session.workdir / RESULT, result)
    text = page(f"{config.model.name}: how cost grows", scaling, "\n".join(rows))
    write_atomically(session.workdir / PAGE, lambda temporary: temporary.write_text(text))
    console.say(f"written to {session.workdir}: {RESULT}, {PAGE}")
    return 0


def sizes(configured: int) -> list[int]:
    """Image sides in pixels: SIZES, or 1 to 3.5 times a smaller configured side, in multiples of the stride."""
    if configured >= SIZES[0]:
        return list(SIZES)
    wanted = (configured * halves / 2 for halves in range(2, 2 + len(SIZES)))
    return sorted({-int(-side // STRIDE) * STRIDE for side in wanted})


def measure(config: ConfigDict, changes: dict[str, int]) -> Point:
    """Our training and evaluation steps with `changes` of the config, and the peak memory of training."""
    changed = ConfigDict(config)
    changed.update(UNMIXED | changes)
    point: Point = {"batch": changed.batch_size, "image_size": list(sessions.image_size(changed))}
    try:
        return point | run_in_subprocess(_measure_steps, changed)
    except OutOfMemory:
        return point | {"out_of_memory": True}


def _measure_steps(session: Session) -> Point:
    bench = Bench(session)
    train = bench.measure("train")["ours"]
    memory = session.device.memory_stats()[0]  # before the evaluation, which has no micro-batches
    steps = {"train": train, "eval": bench.measure("eval")["ours"]}
    return {part: figures(rounds, bench.plan.batch) for part, rounds in steps.items()} | {"peak_memory_bytes": memory}


def measure_processes(session: Session, count: int) -> Point:
    """A short training of `count` processes with the configured batch each, through the launcher."""
    batch, steps = count * session.config.batch_size, session.config.bench.steps
    point: Point = {"processes": count, "batch": batch, "image_size": list(session.size)}
    # One step more than is measured: a run's images/s leave out its first step.
    changes = {"processes": count, "batch_size": batch, "steps": steps + 1, **UNMIXED}
    changes |= {"augment.randaugment": "", "tensorboard": False, "data.workers": 0}
    try:
        rate = images_per_sec(session, changes)
    except OutOfMemory:
        return point | {"out_of_memory": True}
    return point | {"train": {"images_per_sec": rate, "ms": round(1e3 * batch / rate, 3)}}


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
    charts = []
    for name, points, x, y in CHARTS:
        series = []
        for color, part in enumerate(["train"] if y == "GB" else PARTS):
            values = [quantities(point, part) for point in scaling[points] if part in point]
            series.append(Series(PARTS[part], [(v[x], v[y]) for v in values], color))
        if y == "ms per image":
            costs = [s for s in series if s.points]
            series += [Series(f"{s.name}, in proportion", proportional(s.points), s.color, True) for s in costs]
        charts.append(chart(name, series, x=x, zero=True))
    return render(title, charts, table=table)


def quantities(point: Point, part: str) -> dict[str, float]:
    """What CHARTS show of one part of a point; an axis has room for thousands of pixels, not for pixels."""
    height, width = point["image_size"]
    return {
        "batch": point["batch"], "processes": point.get("processes", 1), "thousand pixels": height * width / 1000,
        "images/s": point[part]["images_per_sec"], "ms per image": point[part]["ms"] / point["batch"],
        "GB": point.get("peak_memory_bytes", 0) / 1e9,
    }  # fmt: skip


def proportional(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The costs if they grew in proportion to the pixels from the first point on."""
    x0, y0 = points[0]
    return [(x, y0 * x / x0) for x, _ in points]
