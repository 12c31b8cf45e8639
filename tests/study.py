"""The study behind docs/results.md: what more accuracy per hour costs, arm by arm, with seeds, on small images.

Not part of the test suite. `python tests/study.py DATA WORKDIR [--arms NAME ...] [--seeds N ...] [--jobs N]` trains
what WORKDIR/runs.jsonl does not hold yet and prints the table. DATA is an image folder of small images with train/ and
val/. Each run is a process of its own with one thread that reads its own images; its time is that process's CPU time
from the command to the last evaluation, without the imports, which suits a machine that others use too; of a
distillation with the teacher's answers, without its training. Nothing is chosen on the seeds of the table: TUNING are
others, and accuracies are those of the last step.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import resource
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"  # before torch

import learning_gate
import timm.data
import timm.models.twins  # noqa: F401 - what follows too: before the processes fork
import torch

import pcpvt.main
import pcpvt.train.run

STEPS, SEEDS, TUNING = 200, (0, 1, 2, 3, 4), (100, 101)
FEWER = {"steps": 125}
SIZES = {"size_schedule": "16@0,24@0.3,32@0.6"}
PURE = {"mixup": 0.0, "cutmix": 0.0}
SCHEDULE = {"lr": 2 * learning_gate.LR, "warmup_steps": 15}
FAST = PURE | SCHEDULE | {"augment.crop_pad": 2}
MUON = {"optimizer": "muon"}
PLAIN_LOOP, DISTILLATION = "timm loop", "distillation"
TEACHER = ("teacher", 200)  # an arm and its seed

REFERENCE: dict[str, Any] = learning_gate.RECIPE | {"steps": STEPS, "eval_every": "1000000 steps", "data.workers": 0}
ARMS: dict[str, dict[str, Any]] = {
    "reference": {},
    "reference, fewer steps": FEWER,
    "fast": FAST | {"steps": 110},
    "fast, all steps": FAST,
    "schedule of fast": SCHEDULE | {"steps": 110},
    "no mixing": PURE,
    "no mixing, fewer steps": PURE | FEWER,
    "Muon": MUON,
    "fast, Muon": FAST | MUON | {"steps": 110},
    "sizes": SIZES,
    DISTILLATION: {},
    "3-Augment": {"augment.randaugment": "3a", "augment.color_jitter": 0.3},
    "EMA": {"ema": 0.999},
    TEACHER[0]: PURE | {"steps": 2 * STEPS},
}


class Run(NamedTuple):
    """One training."""

    arm: str
    seed: int
    acc1: float  # of the last step, in %
    cpu: float  # seconds, user and system
    wall: float  # seconds, on a machine that others use too


def train(arm: str, seed: int, data: Path, workdir: Path) -> Run:
    """Train one arm in this process, which must be a fresh one."""
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    if arm == PLAIN_LOOP:
        acc1 = learning_gate.plain(data, seed, STEPS, workers=0)
    else:
        folder = folder_of(workdir, arm, seed)
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was interrupted, whose time is lost
        folder.mkdir(parents=True)
        fields = REFERENCE | ARMS[arm] | {"data.path": data, "seed": seed}
        if arm == DISTILLATION:
            fields["distill.teacher"] = folder_of(workdir, *TEACHER)
        words = [f"--config.{name}={value}" for name, value in fields.items()]
        sys.argv = ["pcpvt", "--config=configs/pcpvt_s.py:cpu,folder", *words, f"--workdir={folder}"]
        with open(folder / "log.txt", "w") as log, contextlib.redirect_stdout(log), contextlib.suppress(SystemExit):
            pcpvt.main.entry()
        acc1 = json.loads((folder / "result.json").read_text())["last"]["acc1"]
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Run(arm, seed, acc1, round(cpu, 2), round(time.perf_counter() - began, 2))


def folder_of(workdir: Path, arm: str, seed: int) -> Path:
    return workdir / f"{arm}-{seed}".replace(" ", "-").replace(",", "")


def table(runs: Sequence[Run]) -> str:
    """A Markdown table: accuracy and CPU time of each arm, the latter also as a share of the reference's."""
    arms: dict[str, list[Run]] = {}
    for run in runs:
        arms.setdefault(run.arm, []).append(run)
    reference = statistics.mean(run.cpu for run in arms["reference"]) if "reference" in arms else float("nan")
    lines = ["| arm | runs | top-1, % | CPU time, s | of the reference's |", "|---|---|---|---|---|"]
    for arm, those in arms.items():
        acc1, cpu = ([getattr(run, name) for run in those] for name in ("acc1", "cpu"))
        columns = (arm, len(those), spread(acc1), spread(cpu), f"{statistics.mean(cpu) / reference:.2f}")
        lines.append(f"| {' | '.join(map(str, columns))} |")
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds."""
    mean = f"{statistics.mean(values):.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--arms", nargs="*", default=[PLAIN_LOOP, *(arm for arm in ARMS if arm != TEACHER[0])])
    parser.add_argument("--seeds", nargs="*", type=int, default=SEEDS)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    args = parser.parse_args()
    args.workdir.mkdir(parents=True, exist_ok=True)
    record = args.workdir / "runs.jsonl"
    done = [Run(**json.loads(line)) for line in record.read_text().splitlines()] if record.exists() else []
    known = {(run.arm, run.seed) for run in done}
    todo = [(arm, seed) for seed in args.seeds for arm in args.arms if (arm, seed) not in known]
    if DISTILLATION in args.arms and TEACHER not in known:
        todo.insert(0, TEACHER)
    torch.set_num_threads(1)
    with multiprocessing.get_context("fork").Pool(args.jobs, maxtasksperchild=1) as pool:
        for part in ([run for run in todo if run == TEACHER], [run for run in todo if run != TEACHER]):
            results = [pool.apply_async(train, (*each, args.data, args.workdir)) for each in part]
            for result in results:
                done.append(result.get())
                with record.open("a") as file:
                    file.write(json.dumps(done[-1]._asdict()) + "\n")
    wanted = [run for arm in args.arms for run in done if run.arm == arm and run.seed in args.seeds]
    print(table(wanted))


if __name__ == "__main__":
    main()
