"""`environment.json`: versions, device, processes and precision of a training run, written when it starts."""

import importlib.metadata
import platform
import time
from typing import Any

import torch

from pcpvt.runtime.session import Session

FILE = "environment.json"
PACKAGES = ("pcpvt", "torch", "torch_npu", "torchvision", "timm", "einops", "numpy", "pillow", "ml_collections")


def describe(session: Session) -> dict[str, Any]:
    """The environment of a session as JSON values, without packages that are not installed."""
    return {
        "device": session.device.describe(), "processes": session.world.size,
        "precision": str(session.policy), "compile": session.config.compile,
        "python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}",
        # torch's own version names its build (+cpu, +cu130); that of its package does not always.
        "versions": {n: v for n in PACKAGES if (v := _version(n))} | {"torch": str(torch.__version__)},
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }  # fmt: skip


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
