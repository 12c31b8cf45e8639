"""`--mode=bench`: how fast the parts are, alone and beside a peer in the same run, as JSON and as a table.

Train step, evaluation step, input pipeline, the whole loop, single-image latency, peak memory, time to the first step,
and the fraction of the device's measured matrix-product rate that the steps reach; or, with `config.bench.scaling`, how
the steps' cost grows. No checkpoint is read or written.
"""

import time
from typing import Any

from pcpvt.bench import parts, scaling
from pcpvt.bench.parts import STEPS
from pcpvt.bench.timing import figures, ratio
from pcpvt.errors import UserError
from pcpvt.runtime import records
from pcpvt.runtime.console import Console
from pcpvt.runtime.session import Session
from pcpvt.train import utilisation


def run(session: Session) -> int:
    """Measures, prints a table, writes `result-bench.json`; returns the exit code."""
    config, console = session.config, Console(session.world.is_main)
    if session.world.size > 1:
        raise UserError("--mode=bench: measures one device: give ARG with one, e.g. npu1,perf")
    if config.bench.against and config.model.name == "pcpvt_nano":
        raise UserError("config.bench.against: timm has no pcpvt_nano: choose another model or leave it empty")
    if config.bench.scaling:
        return scaling.run(session, console)
    result = measure(session)
    records.write_json(session.workdir / parts.RESULT, result)
    console.say(table(result))
    console.say(f"written to {session.workdir / parts.RESULT}")
    return 0


def measure(session: Session) -> dict[str, Any]:
    """The result: our figures by part, the peer's under `peer`, and the ratios of our speed to the peer's."""
    began, data, bench = time.perf_counter(), session.config.data.name, parts.Bench(session)
    images = bench.plan.local_batch
    steps = {part: bench.measure(part) for part in STEPS}
    peak, per_image = parts.matmul_flops(session), utilisation.forward_flops(bench.model, session.size)
    workers, inputs = bench.input_pipelines() if data in ("folder", "digits") else (0, {})
    whole_loop = parts.measure_loop(session)
    sides: dict[str, dict[str, Any]] = {}
    for side in bench.sides:
        entry = {part: figures(steps[part][side], 1 if part == "latency" else images) for part in STEPS}
        for part, passes in (("train", 3), ("eval", 1)):
            rate = entry[part]["images_per_sec"]
            entry[part]["matmul_fraction"] = round(rate * passes * per_image / peak, 4)
        pipelines = {split: figures(r[side], parts.TIMED * images) for split, r in inputs.items() if side in r}
        if pipelines:
            entry["input"] = {"workers": workers, **pipelines}
        elif side == "ours":
            entry["input"] = {"skipped": f"config.data.name is {data!r}: nothing is decoded"}
        sides[side] = entry | {"peak_memory_bytes": parts.peak_memory(session, side)}
    timings = steps | {f"input {split}": rounds for split, rounds in inputs.items()}
    ratios = {part: ratio(rounds["peer"], rounds["ours"]) for part, rounds in timings.items() if "peer" in rounds}
    if "peer" in sides:
        ratios["memory"] = {"median": round(sides["ours"]["peak_memory_bytes"] / sides["peer"]["peak_memory_bytes"], 4)}
    return {
        **parts.result_header(session), "matmul_flops": round(peak),
        **sides["ours"], "loop": whole_loop, "peer": sides.get("peer"),
        "ratios": {name: value["median"] for name, value in ratios.items()},
        "ratio_quartiles": {name: value.get("quartiles") for name, value in ratios.items()},
        "first_step_seconds": parts.first_step_seconds(session), "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip


def table(result: dict[str, Any]) -> str:
    """The figures of `measure` as text."""
    height, width = result["image_size"]
    rows = [
        f"{result['model']} {height}x{width} batch {result['batch']}, {result['precision']}",
        f"{result['device']}, compile {result['compile']}, matrix product {result['matmul_flops'] / 1e9:.0f} GFLOP/s",
    ]
    for side, entry in (("ours", result), ("peer", result["peer"])):
        if entry is None:
            continue
        for part in STEPS:
            f = entry[part]
            share = f"  {100 * f['matmul_fraction']:.1f} % of the matrix rate" if "matmul_fraction" in f else ""
            mark = f"  ({f['disturbed_rounds']} disturbed)" if f["disturbed_rounds"] else ""
            rows.append(f"{side:5} {part:8} {f['images_per_sec']:10.1f} images/s {f['ms']:10.1f} ms{share}{mark}")
        for split in ("train", "val"):
            if split in entry.get("input", {}):
                rate = entry["input"][split]["images_per_sec"]
                rows.append(f"{side:5} input {split:5} {rate:7.1f} images/s")
        rows.append(f"{side:5} memory   {entry['peak_memory_bytes'] / 1e9:10.2f} GB at the peak of a training step")
    f = result["loop"]
    mark = "  (disturbed)" if f["disturbed"] else ""
    waiting = f"{100 * f['waiting']:.1f} % of the time waiting for data, {f['workers']} loader processes"
    rows.append(f"{'ours':5} {'loop':8} {f['images_per_sec']:10.1f} images/s  {waiting}{mark}")
    if result["ratios"]:
        rows.append("ours over the peer's: " + "  ".join(f"{k} {v:.3f}" for k, v in result["ratios"].items()))
    first = result["first_step_seconds"]
    rows.append(f"first step after {first['cold']} s with a cold compile cache, {first['warm']} s with a warm one")
    return "\n".join(rows)
