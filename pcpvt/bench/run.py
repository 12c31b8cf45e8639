"""`--mode=bench`: how fast the parts are, alone and beside a peer in the same run, as JSON and as a table.

Train step, evaluation step, input pipeline, the whole loop, single-image latency, peak memory, time to the first step,
and the fraction of the device's measured matrix-product rate that the steps reach; or, with `config.bench.scaling`, how
the steps' cost grows. No checkpoint is read or written.
"""

import time
from typing import Any

from pcpvt.bench import exports, parts, scaling
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
    for peer in parts.peers(config):
        exports.check(peer)
        if not exports.is_export(peer) and config.model.name == "pcpvt_nano":
            raise UserError("config.bench.against: timm has no pcpvt_nano: choose another model or leave it empty")
    if config.bench.scaling:
        return scaling.run(session, console)
    result = measure(session)
    records.write_json(session.workdir / parts.RESULT, result)
    console.say(table(result))
    console.say(f"written to {session.workdir / parts.RESULT}")
    return 0


def measure(session: Session) -> dict[str, Any]:
    """The result: our figures by part, the peers' under `peers`, and by peer the ratios of our speed to its."""
    began, data, bench = time.perf_counter(), session.config.data.name, parts.Bench(session)
    images = bench.plan.local_batch
    steps = {part: bench.measure(part) for part in STEPS}
    peak, per_image = parts.matmul_flops(session), utilisation.forward_flops(bench.model, session.size)
    workers, inputs = bench.input_pipelines() if data in ("folder", "digits") else (0, {})
    whole_loop = parts.measure_loop(session)
    sides: dict[str, dict[str, Any]] = {}
    for side in ("ours", *bench.peers):
        measured = [part for part in STEPS if side in steps[part]]  # graphs are not trained
        sizes = {"train": images, "eval": images, "latency": 1}
        entry: dict[str, Any] = {part: figures(steps[part][side], sizes[part]) for part in measured}
        for part, passes in (("train", 3), ("eval", 1)):
            if part not in entry:
                continue
            rate = entry[part]["images_per_sec"]
            entry[part]["matmul_fraction"] = round(rate * passes * per_image / peak, 4)
        pipelines = {split: figures(r[side], parts.TIMED * images) for split, r in inputs.items() if side in r}
        if pipelines:
            entry["input"] = {"workers": workers, **pipelines}
        elif side == "ours":
            entry["input"] = {"skipped": f"config.data.name is {data!r}: nothing is decoded"}
        if side in bench.graphs:
            entry["precision"] = bench.graphs[side].precision
        if "train" in entry:
            entry["peak_memory_bytes"] = parts.peak_memory(session, side)
        sides[side] = entry
    timings = steps | {f"input {split}": rounds for split, rounds in inputs.items()}
    ours, ratios = sides.pop("ours"), dict[str, dict[str, Any]]()
    for peer, entry in sides.items():
        ratios[peer] = {part: ratio(rounds[peer], rounds["ours"]) for part, rounds in timings.items() if peer in rounds}
        if "peak_memory_bytes" in entry:
            memory = ours["peak_memory_bytes"] / entry["peak_memory_bytes"]
            ratios[peer]["memory"] = {"median": round(memory, 4)}
    return {
        **parts.result_header(session), "matmul_flops": round(peak),
        **ours, "loop": whole_loop, "peers": sides,
        "ratios": {peer: {part: r["median"] for part, r in of_peer.items()} for peer, of_peer in ratios.items()},
        "ratio_quartiles": {
            peer: {part: r.get("quartiles") for part, r in of_peer.items()} for peer, of_peer in ratios.items()
        },
        "first_step_seconds": parts.first_step_seconds(session), "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip


def table(result: dict[str, Any]) -> str:
    """The figures of `measure` as text."""
    height, width = result["image_size"]
    rows = [
        f"{result['model']} {height}x{width} batch {result['batch']}, {result['precision']}",
        f"{result['device']}, compile {result['compile']}, matrix product {result['matmul_flops'] / 1e9:.0f} GFLOP/s",
    ]
    wide = max(5, *(len(peer) for peer in result["peers"])) if result["peers"] else 5
    for side, entry in (("ours", result), *result["peers"].items()):
        for part in (part for part in STEPS if part in entry):
            f = entry[part]
            share = f"  {100 * f['matmul_fraction']:.1f} % of the matrix rate" if "matmul_fraction" in f else ""
            mark = f"  ({f['disturbed_rounds']} disturbed)" if f["disturbed_rounds"] else ""
            rows.append(f"{side:{wide}} {part:8} {f['images_per_sec']:10.1f} images/s {f['ms']:10.1f} ms{share}{mark}")
        for split in ("train", "val"):
            if split in entry.get("input", {}):
                rate = entry["input"][split]["images_per_sec"]
                rows.append(f"{side:{wide}} input {split:5} {rate:7.1f} images/s")
        if "peak_memory_bytes" in entry:
            memory = entry["peak_memory_bytes"] / 1e9
            rows.append(f"{side:{wide}} memory   {memory:10.2f} GB at the peak of a training step")
    f = result["loop"]
    mark = "  (disturbed)" if f["disturbed"] else ""
    waiting = f"{100 * f['waiting']:.1f} % of the time waiting for data, {f['workers']} loader processes"
    rows.append(f"{'ours':{wide}} {'loop':8} {f['images_per_sec']:10.1f} images/s  {waiting}{mark}")
    for peer, of_peer in result["ratios"].items():
        rows.append(f"ours over {peer}: " + "  ".join(f"{part} {value:.3f}" for part, value in of_peer.items()))
    first = result["first_step_seconds"]
    rows.append(f"first step after {first['cold']} s with a cold compile cache, {first['warm']} s with a warm one")
    return "\n".join(rows)
