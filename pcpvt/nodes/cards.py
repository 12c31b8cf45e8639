"""The health of this host's cards, as `npu-smi info` and `nvidia-smi` tell it."""

import os
import re
import subprocess

from pcpvt.devices.visible import CHECKS, VARIABLES

LIMIT = 60  # seconds for the tool, which takes up to 2; a driver that hangs takes for ever
QUERY = ("--query-gpu=index,memory.total,ecc.errors.uncorrected.volatile.total", "--format=csv,noheader,nounits")
HEALTHY = "OK"
# Of the two lines per chip the first: `| 0     910B3   | OK            | 93.6        40         0    / 0   |`.
NPU = re.compile(r"^\|\s*(\d+)\s+(?=\S*[A-Za-z])\S+\s*\|\s*([A-Za-z]+)\s*\|", re.M)


def health(kind: str) -> dict[str, str]:
    """Each visible card's health by number, `OK` or what is wrong; empty where the tool is missing or silent."""
    command = ["nvidia-smi", *QUERY] if kind == "cuda" else CHECKS[kind].split()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    found = _gpus(done.stdout) if kind == "cuda" else _npus(done.stdout)
    named = [name.strip() for name in os.environ.get(VARIABLES[kind], "").split(",")]
    visible = {card: state for card, state in found.items() if card in named}
    return visible or found  # names that are no numbers (GPU-...), or those of a container


def _npus(table: str) -> dict[str, str]:
    """An NPU may have several chips, with a line each: its health is that of the worst."""
    found: dict[str, str] = {}
    for number, state in NPU.findall(table):
        if found.get(number, HEALTHY) == HEALTHY:
            found[number] = state
    return found


def _gpus(lines: str) -> dict[str, str]:
    """Cards by index; the memory of a card that has failed is no number, and ECC counts are missing on many."""
    found = {}
    for line in lines.splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) == 3 and fields[0].isdecimal():
            errors = int(fields[2]) if fields[2].isdecimal() else 0
            lost = "" if fields[1].isdecimal() else f"memory {fields[1]}"
            found[fields[0]] = lost or (f"{errors} uncorrected memory errors" if errors else HEALTHY)
    return found
