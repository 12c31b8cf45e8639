"""Compiles the stand-in once per torch version; the library is cached by content, outside the checkout."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent


def available() -> str | None:
    """The reason why the stand-in cannot be built on this machine, or None."""
    if not sys.platform.startswith("linux"):
        return "the npu stand-in is for Linux"
    if shutil.which(_compiler()) is None:
        return f"the npu stand-in needs a C++20 compiler, and {_compiler()} is not on PATH (CXX names another)"
    return None


def library() -> Path:
    """The path of the shared library; builds it if it is not in the cache (20 to 40 s).

    Raises:
        subprocess.CalledProcessError: when the compiler fails, which must not be hidden by skipping a test.
    """
    torch = Path(importlib.util.find_spec("torch").origin).parent  # importing it is not needed to build against it
    version = importlib.metadata.version("torch")
    sources = [(FOLDER / name).read_bytes() for name in ("device.h", "standin.cpp")]
    tag = hashlib.sha256(b"".join(sources) + f"{version} {torch}".encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pcpvt"
    compiled = cache / f"npu_standin-{tag}.so"
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / "npu_standin.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several test processes may call this at once
        if not compiled.exists():
            unfinished = compiled.with_suffix(".part")
            include = torch / "include"
            flags = ["-std=c++20", "-O1", "-w", "-fPIC", "-shared", "-DUSE_DISTRIBUTED"]
            folders = [f"-I{include}", f"-I{include}/torch/csrc/api/include", f"-L{torch}/lib"]
            libraries = ["-lc10", "-ltorch_cpu", "-ltorch"]
            command = [_compiler(), *flags, *folders, str(FOLDER / "standin.cpp"), "-o", str(unfinished), *libraries]
            subprocess.run(command, check=True)
            unfinished.rename(compiled)
    return compiled


def _compiler() -> str:
    return os.environ.get("CXX", "g++")
