"""Runs of the real program at miniature size, with injected faults, and comparisons between runs."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import warm
from absl import flags
from PIL import Image

from pcpvt import main
from pcpvt.checkpoints import checkpoint
from pcpvt.config import cli
from pcpvt.errors import UserError

ROOT = Path(__file__).parent.parent
FAULTS = Path(__file__).parent / "faults"
MARK = "MINIATURE_RUN"  # in the environment of a run and all that it starts
TIMINGS = (
    "images_per_sec", "waiting", "seconds", "mfu", "slowest_rank", "slowest_computing", "slowest_reading",
    "slowest_waiting", "slowness",
)  # fmt: skip
RECIPE = {
    "model.name": "pcpvt_nano", "precision": "float32", "steps": 12, "batch_size": 48, "lr": 2e-3,
    "warmup_epochs": 0.1, "model.drop_path": 0.1, "mixup": 0.2, "eval_every": "8 steps", "save_every": "4 steps",
    "log_every": "3 steps", "restarts": 0,
}  # fmt: skip


class Ended(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The line that says why; among several processes the launcher may add one."""
        lines = self.err.splitlines()
        assert all(line.startswith("pcpvt: ") for line in lines), self.err
        errors = [line for line in lines if line.startswith("pcpvt: error: ")]
        assert 1 <= len(errors) <= 2, self.err
        return "; ".join(errors)


def words(workdir: Path, arg: str = "cpu", **fields: object) -> list[str]:
    """The command line of a miniature run; a dot in a field's name is written `__`."""
    named = {**RECIPE, **{name.replace("__", "."): value for name, value in fields.items()}}
    return [
        f"--config=configs/pcpvt_s.py:{arg}",
        *[f"--config.{n}={v}" for n, v in named.items()],
        f"--workdir={workdir}",
    ]


def start(
    command: Sequence[str], *faults: dict, under: Sequence[str] = (), env: dict | None = None, cold: bool = False
) -> subprocess.Popen | warm.Process:
    """Starts the binary in a session of its own; see `faults/sitecustomize.py`. `env` holds further variables.

    It is forked from a server of `warm`; with `cold`, or with a command `under` which it runs, by a new interpreter.
    """
    mark = uuid.uuid4().hex
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(FAULTS), "FAULTS": json.dumps(faults), MARK: mark, **(env or {})}
    if under or cold:
        process = subprocess.Popen(
            [*under, sys.executable, "-m", "pcpvt.main", *command],
            cwd=ROOT,
            env={**os.environ, **own},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=_restore_sighup,
        )
    else:
        process = warm.Process(["-m", "pcpvt.main", *command], {**os.environ, **own}, ROOT)
    process.mark = mark
    return process


def _restore_sighup() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup the tests would pass its ignored SIGHUP on


def end(process: subprocess.Popen | warm.Process, timeout: float = 120) -> Ended:
    """Waits for a run; fails when any process of it outlives it, and ends that."""
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        left = members(process)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
    assert not left, f"processes left: {left}\n{out}\n{err}"
    return Ended(process.returncode, out, err)


def run(
    command: Sequence[str], *faults: dict, under: Sequence[str] = (), env: dict | None = None, cold: bool = False
) -> Ended:
    return end(start(command, *faults, under=under, env=env, cold=cold))


def members(process: subprocess.Popen | warm.Process, patience: float = 10.0) -> dict[int, str]:
    """Processes of a run, at any depth, in any session, that do not end within `patience` seconds.

    They have its mark in their environment, or, forked from it without a new program, are in its session.
    """
    deadline, mark = time.monotonic() + patience, f"{MARK}={process.mark}"
    while True:
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # of another user, or ended
                marked = mark in (folder / "environ").read_text(errors="replace").split("\0")
                state, _, _, session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
                if marked or (int(session) == process.pid and state != "Z"):
                    found[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")[:100]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.05)


def refusal(command: Sequence[str]) -> str:
    """The error of a command line whose config is refused, found without starting the program."""
    with pytest.raises(UserError) as caught:
        main.read_config(cli.parse(["pcpvt", *command], main.MODES, flags.FlagValues()))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def await_line(process: subprocess.Popen | warm.Process, text: str) -> str:
    """Reads the output until a line that holds `text`; returns what was read."""
    read = ""
    for line in process.stdout:
        read += line
        if text in line:
            return read
    raise AssertionError(f"no {text!r} in\n{read}\n{process.stderr.read()}")


def records(workdir: Path) -> list[dict]:
    """The metrics file without timings and restarts."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in lines if line["kind"] != "restart"]


def restarts(workdir: Path) -> list[dict]:
    """The records of restarts in the metrics file."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "restart"]


def newest(workdir: Path) -> checkpoint.Checkpoint:
    return checkpoint.read(list(checkpoint.steps(workdir / "checkpoints").values())[-1])


def assert_same_run(workdir: Path, reference: Path) -> None:
    """Everything that a run leaves is equal to the bit, timings apart."""
    ours, theirs = newest(workdir), newest(reference)
    assert ours.tensors.keys() == theirs.tensors.keys()
    assert [name for name in ours.tensors if not torch.equal(ours.tensors[name], theirs.tensors[name])] == []
    for name in ("step", "metrics", "best", "window", "examples", "classes"):
        assert ours.meta[name] == theirs.meta[name], name
    lines = [run.meta["records"] - len(restarts(folder)) for run, folder in ((ours, workdir), (theirs, reference))]
    assert lines[0] == lines[1]
    assert records(workdir) == records(reference)
    results = [json.loads((folder / "result.json").read_text()) for folder in (workdir, reference)]
    for name in ("acc1", "acc5", "loss", "best_step", "images", "epochs", "steps", "last"):
        assert results[0][name] == results[1][name], name


def image_folder(root: Path, per_class: int = 16) -> Path:
    """A folder of noise images of two classes."""
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(per_class):
                pixels = generator.integers(0, 256, (40, 48, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root
