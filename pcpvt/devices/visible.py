"""Cards of this host: their device files, the variables that hide some, and errors about them. Imports no torch."""

import functools
import glob
import os
from collections.abc import Callable
from typing import Any

from pcpvt.errors import UserError, one_line

FILES = {"npu": "/dev/davinci", "cuda": "/dev/nvidia"}  # and the card's number
VARIABLES = {"npu": "ASCEND_RT_VISIBLE_DEVICES", "cuda": "CUDA_VISIBLE_DEVICES"}
NOUNS = {"npu": "NPUs", "cuda": "GPUs"}
CHECKS = {"npu": "npu-smi info", "cuda": "nvidia-smi"}


def count(kind: str) -> int:
    """Cards that a program on this host sees, from device files and environment; no driver is loaded.

    A list in the environment ends at the first name that is no card, as CUDA reads it.
    """
    numbers, named = _numbers(kind), _named(kind)
    if not numbers or named is None:
        return len(numbers)
    seen = 0
    for name in named:
        # A number counts from 0, or is that of the file where a container has some of the host's cards. Else a UUID.
        if not (int(name) in {*numbers, *range(len(numbers))} if name.isdecimal() else name[:4] in ("GPU-", "MIG-")):
            break
        seen += 1
    return seen


def check_named(kind: str) -> None:
    """Raises UserError where the environment names cards that do not exist: a mistake, no wish to hide all."""
    if _numbers(kind) and _named(kind) and not count(kind):
        raise no_card(kind)


def no_card(kind: str, reason: str = "no card is found", remedy: str = "") -> UserError:
    """The error where no card is seen: what hides them, or else the reason, and the remedy beside `:cpu`."""
    variable, files = VARIABLES[kind], len(_numbers(kind))
    if _named(kind) == []:
        reason = f"{variable}={os.environ[variable]!r} hides all cards"
    elif _named(kind) and files and not count(kind):
        reason = f"{variable}={os.environ[variable]!r} names none of this host's {files} cards"
    else:
        return UserError(f"config.device: {kind!r} but {reason}: use :cpu, or {remedy or f'check with {CHECKS[kind]}'}")
    return UserError(f"config.device: {kind!r} but {reason}: correct or unset it, or use :cpu")


def too_few(kind: str, wanted: int, have: int) -> UserError:
    """The error where this host has some cards, but fewer than are asked for."""
    named = _named(kind) is not None
    shown = f" visible ({VARIABLES[kind]}={os.environ[VARIABLES[kind]]!r})" if named else ""
    pod = ", or launch/npu_pod.sh for several hosts" if kind == "npu" else ""
    return UserError(
        f"config.processes: {wanted} {NOUNS[kind]} are asked for on this host and it has {have}{shown}: "
        f"use :{kind}{have}{pod}"
    )


def driver_errors(method: Callable) -> Callable:
    """A device's method whose driver's errors become one line for the user."""

    @functools.wraps(method)
    def wrapper(self: Any, *args: Any) -> Any:
        try:
            return method(self, *args)
        except (RuntimeError, OSError, AssertionError) as error:  # torch asserts that it was built for the device
            raise UserError(
                f"config.device: {self.name!r}: the driver says {one_line(error)!r}: check with {CHECKS[self.name]}, "
                "or use :cpu"
            ) from error

    return wrapper


def _numbers(kind: str) -> list[int]:
    """Numbers of the device files."""
    prefix = FILES[kind]
    return [int(n) for path in glob.glob(f"{prefix}*") if (n := path.removeprefix(prefix)).isdecimal()]


def _named(kind: str) -> list[str] | None:
    """The cards that the environment names; none where it hides all; None where it is silent."""
    value = os.environ.get(VARIABLES[kind])
    if value is None:
        return None
    names = [name.strip() for name in value.split(",")]
    return [] if names[0] in ("", "-1", "NoDevFiles") else names
