"""Counts the kernels that one step launches on an NPU, with the real torch_npu wheel and without an NPU.

    python tests/wheel/launches.py [-v]

The last line of the output is one JSON object: product to step (`train`, `train_ema`: with a moving average, `eval`) to
launches, for S at 224 px, batch 128, with the recipe of `configs/pcpvt_s.py:npu1`. With `-v` a table by operator, with
the shapes of copies, and the host's waits for the device come before it. What happens inside one aclnn operator is not
counted.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

PRODUCTS = ("Ascend910B2", "Ascend910A")
STEPS = ("train", "train_ema", "eval")
WAITS = ("aclrtSynchronizeStream", "aclrtSynchronizeStreamWithTimeout", "aclrtSynchronizeDevice", "aclrtMemcpy")
ROOT = Path(__file__).parents[2]


class Launches(NamedTuple):
    """What one step calls."""

    operators: Counter[str]  # by name, such as aclnnMm
    copies: Counter[str]  # aclnnInplaceCopy by dtype, shape and strides of target and source
    gelus: Counter[str]  # by operator and form: `aclnnGeluV2 none`; aclnnGelu and its backward are the tanh form
    waits: Counter[str]  # functions in which the host waits for the device

    @property
    def total(self) -> int:
        return sum(self.operators.values())


def count(product: str, step: str) -> Launches:
    """The calls of one step, in a process whose torch_npu is the wheel's."""
    import real_torch_npu

    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        environment = real_torch_npu.environment(product, record=True)
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment["PYTHONPATH"]])
        command = [sys.executable, "-W", "ignore", __file__, "--record", step, str(log)]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        if ended.returncode:
            raise RuntimeError(f"{product}, {step}: exit {ended.returncode}\n{ended.stdout}\n{ended.stderr[-4000:]}")
        return parse(log.read_text())


def parse(log: str) -> Launches:
    found = Launches(Counter(), Counter(), Counter(), Counter())
    for line in log.splitlines():
        name, _, arguments = line.partition(" ")
        if match := re.fullmatch(r"(aclnn\w+)GetWorkspaceSize", name):
            found.operators[match[1]] += 1
            if match[1] == "aclnnInplaceCopy":
                found.copies[arguments] += 1
            elif "Gelu" in match[1]:
                found.gelus[f"{match[1]} {arguments.split()[0] if match[1].endswith('V2') else 'tanh'}"] += 1
        elif name.startswith(("aclopCompile", "aclopExecute")):
            found.operators[arguments] += 1
        elif name in WAITS:
            found.waits[name] += 1
    return found


def record(step: str, log: str) -> None:
    """Runs one step of the real program's set-up twice, and records the second time; see `count`."""
    import torch

    read = torch.Tensor.tolist
    # What the optimizer reads once per step: a step that is not skipped, divisor 1. The true values are meaningless.
    torch.Tensor.tolist = lambda tensor: (read(tensor), [0.0, 1.0])[1]

    from pcpvt.bench.parts import Bench
    from pcpvt.functional.step import make_eval_step
    from pcpvt.runtime import session as sessions

    sys.path.insert(0, str(ROOT / "configs"))
    config = importlib.import_module("pcpvt_s").get_config("npu1")
    config.num_classes, config.ema = 1000, 0.9999 if step == "train_ema" else 0.0
    session = sessions.start(config, Path())
    bench = Bench(session)
    batch, state = bench.batch, bench.state
    run: Callable[[], object] = lambda: bench.advance(batch)  # noqa: E731
    if step == "eval":
        evaluate, params = make_eval_step(session.predictor(bench.model)), session.inference(state.params)
        valid = torch.ones(len(batch["label"]), dtype=torch.bool, device=session.device.torch)
        run = lambda: evaluate(params, {**batch, "valid": valid})  # noqa: E731
    run()
    recorder = ctypes.CDLL(os.environ["PCPVT_NPU_RECORDER"])
    session.device.synchronize()
    recorder.record_start(log.encode())
    run()
    recorder.record_stop()


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["--record"]:
        record(*arguments[1:])
        return
    totals: dict[str, dict[str, int]] = {}
    for product in PRODUCTS:
        found = {step: count(product, step) for step in STEPS}
        totals[product] = {step: launches.total for step, launches in found.items()}
        for step, (operators, copies, gelus, waits) in found.items():
            if "-v" in arguments:
                print(f"\n{product}, {step}: {sum(operators.values())} launches; the host waits: {dict(waits)}")
                print(*(f"{number:6} {name}" for name, number in operators.most_common()), sep="\n")
                print("GELU:", dict(gelus))
                print("copies (to, from):", *(f"{n:6} {what}" for what, n in copies.most_common()), sep="\n")
    print(json.dumps(totals))


if __name__ == "__main__":
    main(sys.argv[1:])
