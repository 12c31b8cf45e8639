"""Injects faults into the real program: Python imports this file at start when its folder is on PYTHONPATH.

The environment variable FAULTS holds a JSON list of objects: `at` (a key of PLACES), `n` (at which call, from 1),
`do` (a signal's name, `sleep:SECONDS`, `hold:SECONDS` which no signal interrupts, `error:TEXT` for a RuntimeError,
`cores` to print those it may use, `environ` to print the variables as JSON, or an errno's name to be raised), and
optionally `rank`, `local_rank`, `again` (at every call from the n-th on), `to` (`self`, `group`, `child`, `launcher` or
`node`: a launcher and all below it), `restarted` (also in ranks that were started again) and `once` (a file that the
fault creates, and without which only it happens). Bits that are flipped and constants have no `do`.

`{"at": "samples", "folder": FOLDER}` is no fault: each rank appends a line to a file of FOLDER at the begin of a step:
the time, its launcher's process id, the attempt, its rank, the steps done and the ids of its samples, as JSON.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import importlib.abc
import importlib.util
import json
import os
import signal
import sys
import time


def happen(fault: dict) -> None:
    if "once" in fault:
        try:
            os.close(os.open(fault["once"], os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
    what, _, amount = fault["do"].partition(":")
    os.write(1, f"fault: {fault['do']}\n".encode())
    if what == "sleep":
        time.sleep(float(amount))
    elif what == "hold":  # like a collective that never returns: in C, where no Python signal handler runs
        # Those of the launcher's stop: any of them would end this sleep, and no collective.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2))
        ctypes.CDLL(None).sleep(int(amount))
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    elif what.startswith("SIG"):
        number = getattr(signal, what)
        if fault.get("to") == "group":
            os.killpg(0, number)
        elif fault.get("to") == "child":
            from pcpvt.distributed.signals import descendants

            os.kill(descendants()[-1], number)
        elif fault.get("to") == "launcher":
            os.kill(os.getppid(), number)
        elif fault.get("to") == "node":
            from pcpvt.distributed.signals import descendants

            launcher = os.getppid()
            others = [pid for pid in descendants(launcher) if pid != os.getpid()]
            for pid in (launcher, *others, os.getpid()):
                os.kill(pid, number)
        else:
            os.kill(os.getpid(), number)
            time.sleep(0.05)  # for the handler
    elif what == "cores":
        os.write(1, f"cores {' '.join(map(str, sorted(os.sched_getaffinity(0))))}\n".encode())
    elif what == "environ":
        os.write(1, f"environ {json.dumps(dict(os.environ))}\n".encode())
    elif what == "error":
        raise RuntimeError(amount)
    else:
        raise OSError(getattr(errno, what), os.strerror(getattr(errno, what)), "injected")


def counted(function, fault: dict, count: list[int], after: bool = False):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        value = function(*args, **kwargs) if after else None
        count[0] += 1
        if count[0] == fault["n"] or (fault.get("again") and count[0] > fault["n"]):
            happen(fault)
        return value if after else function(*args, **kwargs)

    return wrapper


def in_module(module: str, path: str, after: bool = False):
    """A fault before (or after) a function of a module that is not imported yet."""

    def arm(fault: dict) -> None:
        def patch(loaded) -> None:
            *owners, name = path.split(".")
            owner = functools.reduce(getattr, owners, loaded)
            setattr(owner, name, counted(getattr(owner, name), fault, [0], after))

        sys.meta_path.insert(0, AfterImport(module, patch))

    return arm


def in_system(*names: str):
    """A fault before calls of these functions of `os`, counted together."""

    def arm(fault: dict) -> None:
        count = [0]
        for name in names:
            setattr(os, name, counted(getattr(os, name), fault, count))

    return arm


class AfterImport(importlib.abc.MetaPathFinder):
    """Calls `patch` with a module once it is imported."""

    def __init__(self, module: str, patch):
        self.module, self.patch = module, patch

    def find_spec(self, name, path=None, target=None):
        if name != self.module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            self.patch(module)

        spec.loader.exec_module = exec_module
        return spec


def poison(fault: dict) -> None:
    """This rank's gradients are nan in the n-th step."""

    def patch(collectives) -> None:
        original, count = collectives.psum, [0]

        def psum(tensors):
            count[0] += 1
            hit = count[0] == fault["n"] or (fault.get("again") and count[0] > fault["n"])
            return original([t * float("nan") for t in tensors] if hit else tensors)

        collectives.psum = psum

    sys.meta_path.insert(0, AfterImport("pcpvt.distributed.collectives", patch))


def flip(module: str, path: str, of=lambda args, value: value):
    """Flips bit number `bit` (default 0) of element `index` (default 100) of a float32 tensor that a function gives.

    Args:
        of: the tensor, of the function's arguments and its value.
    """

    def arm(fault: dict) -> None:
        def patch(loaded) -> None:
            *owners, name = path.split(".")
            owner = functools.reduce(getattr, owners, loaded)
            function, count = getattr(owner, name), [0]

            @functools.wraps(function)
            def wrapper(*args, **kwargs):
                import torch

                value = function(*args, **kwargs)
                count[0] += 1
                if count[0] == fault["n"] or (fault.get("again") and count[0] > fault["n"]):
                    bits = of(args, value).detach().view(-1).view(torch.int32)
                    bits[fault.get("index", 100)] ^= 1 << fault.get("bit", 0)
                return value

            setattr(owner, name, wrapper)

        sys.meta_path.insert(0, AfterImport(module, patch))

    return arm


def constant(fault: dict) -> None:
    """Another value of a constant: `module`, `name`, `value`."""
    sys.meta_path.insert(0, AfterImport(fault["module"], lambda loaded: setattr(loaded, fault["name"], fault["value"])))


def shift_clock(fault: dict) -> None:
    """The clock of this rank's checks is `do` seconds ahead."""

    def patch(check) -> None:
        check.clock = lambda: time.time() + float(fault["do"])

    sys.meta_path.insert(0, AfterImport("pcpvt.nodes.check", patch))


def at_step(fault: dict) -> None:
    """A fault after the n-th step of the run, also where the run was resumed."""

    def patch(stacks) -> None:
        original = stacks.at_step

        def wrapper(step):
            original(step)
            if step == fault["n"]:
                happen(fault)

        stacks.at_step = wrapper

    sys.meta_path.insert(0, AfterImport("pcpvt.distributed.stacks", patch))


def samples(what: dict) -> None:
    """Writes down which samples this rank sees in which step."""

    def patch(setup) -> None:
        original = setup.train_step

        def train_step(*args, **kwargs):
            step = original(*args, **kwargs)

            def wrapper(state, batch):
                entry = [time.time(), os.getppid(), os.environ.get("PCPVT_ATTEMPT"), int(os.environ.get("RANK", 0))]
                entry += [int(state.step), batch["id"].tolist()]
                with open(os.path.join(what["folder"], f"{os.getpid()}.jsonl"), "a") as file:
                    file.write(json.dumps(entry) + "\n")
                return step(state, batch)

            return wrapper

        setup.train_step = train_step

    sys.meta_path.insert(0, AfterImport("pcpvt.train.setup", patch))


PLACES = {
    "begin": happen,
    "launch": in_module("pcpvt.distributed.launch", "launch"),
    "join": in_module("pcpvt.distributed.collectives", "join"),
    "step": in_module("pcpvt.train.history", "add_step", after=True),
    "before the sum": in_module("pcpvt.functional.flat", "Flat.gather"),
    "reading": in_module("pcpvt.data.loader", "TrainBatches.of_rank"),
    "inside step": in_module("pcpvt.functional.optim", "gradients"),
    "evaluation": in_module("pcpvt.functional.metrics", "sums"),
    "start": in_module("pcpvt.train.setup", "train_step"),
    "start of a mode": in_module("pcpvt.runtime.records", "open_workdir"),
    "save": in_module("pcpvt.checkpoints.checkpoint", "write_tensors"),
    "disk": in_system("fsync", "replace", "unlink"),
    "gradient": poison,
    "bit of a gradient": flip("pcpvt.functional.flat", "Flat.gather"),
    "bit of a weight": flip("pcpvt.functional.flat", "Flat.gather", lambda args, value: args[0].flat),
    "bit of an activation": flip("pcpvt.models.layers", "Peg.forward"),
    "bit of a batch": flip("pcpvt.data.loader", "TrainBatches.of_rank", lambda args, value: value["image"]),
    "constant": constant,
    "clock": shift_clock,
    "at step": at_step,
    "samples": samples,
}

PLACE = ("rank", "local_rank")

for fault in json.loads(os.environ.get("FAULTS", "[]")):
    if "PCPVT_RESTART" in os.environ and not (fault.get("restarted") or "once" in fault or fault["at"] == "samples"):
        continue
    ours = all(str(fault.get(key, os.environ.get(key.upper()))) == str(os.environ.get(key.upper())) for key in PLACE)
    if ours:
        PLACES[fault["at"]](fault)
