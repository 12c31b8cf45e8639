"""Whether the installed torch and torch_npu work together, told from their files, before torch is imported."""

import os
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from pcpvt.errors import UserError


def check() -> None:
    """Raises UserError where torch is a CUDA build and torch_npu is beside it: `import torch` would end the process.

    The package index has only CUDA builds of torch for x86_64, so `pip install torch_npu` brings one there.
    """
    torch, backend = _folder("torch"), _folder("torch_npu")
    if torch is None or backend is None or os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1") == "0":
        return
    if (torch / "lib" / "libtorch_cuda.so").exists() and any(backend.rglob("*.so")):
        version = metadata.version("torch").partition("+")[0]
        raise UserError(
            f"torch {version}: a CUDA build, which torch_npu cannot be loaded into: for NPUs pip install "
            f"torch=={version}+cpu --index-url https://download.pytorch.org/whl/cpu, for GPUs pip uninstall torch_npu"
        )


def _folder(package: str) -> Path | None:
    found = find_spec(package)
    return None if found is None or found.origin is None else Path(found.origin).parent
