"""Imports the real torch_npu wheel on a machine that has neither an NPU nor CANN.

    python tests/wheel/real_torch_npu.py [--soc Ascend910B2] script.py ARGS

torch_npu links against CANN's libraries. Stubs in which every function returns 0 replace them, so its operators, their
schemas and its Python API are registered as on an Ascend host, but no kernel computes anything: with fake tensors
dispatch, shapes and errors can be tested, but not values. pip downloads the wheel (42 MB) once, to ~/.cache/pcpvt.

With `record=True` the stubs have the operators' kernels too, which do nothing but leave a line (recorder.c), so that a
program runs on real tensors whose values are meaningless; `launches.py` counts these lines.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

# Functions that must do more than return 0: they return names, counts, handles that may not be null, or memory.
STUBS = r"""
#include <stdlib.h>
#include <string.h>
static long pool[1 << 16];
static int handle(void** out) { static unsigned next; *out = &pool[next++ % (1 << 16)]; return 0; }
static int reserve(void** out, size_t bytes) { return posix_memalign(out, 512, bytes + 512); }
static const char* soc(void) { return getenv("PCPVT_REAL_NPU_SOC"); }
const char* aclrtGetSocName(void) { return soc() ? soc() : "Ascend910B2"; }
int aclrtGetDeviceCount(unsigned* n) { *n = soc() != 0; return 0; }
int aclrtGetDevice(int* index) { *index = 0; return 0; }
int aclrtGetMemInfo(int kind, size_t* available, size_t* total) { *available = *total = 64ul << 30; return 0; }
const char* aclGetRecentErrMsg(void) { return "stub"; }
size_t aclGetCompileoptSize(int option) { return 64; }
int aclGetCompileopt(int option, char* value, size_t size) { strncpy(value, "disable", size); return 0; }
int aclrtGetCurrentContext(void** out) { return handle(out); }
int aclrtCreateStream(void** out) { return handle(out); }
int aclrtCreateStreamWithConfig(void** out, unsigned priority, unsigned flag) { return handle(out); }
int aclrtCreateEventWithFlag(void** out, unsigned flag) { return handle(out); }
int aclrtCreateEventExWithFlag(void** out, unsigned flag) { return handle(out); }
int aclrtMalloc(void** out, size_t bytes, int policy) { return reserve(out, bytes); }
int aclrtMallocAlign32(void** out, size_t bytes, int policy) { return reserve(out, bytes); }
int aclrtMallocWithCfg(void** out, size_t bytes, int policy, void* config) { return reserve(out, bytes); }
int aclrtMallocHost(void** out, size_t bytes) { return reserve(out, bytes); }
int aclrtFree(void* memory) { free(memory); return 0; }
int aclrtFreeHost(void* memory) { free(memory); return 0; }
int aclrtMemcpy(void* to, size_t most, const void* from, size_t bytes, int kind) { memcpy(to, from, bytes); return 0; }
int aclrtMemset(void* to, size_t most, int value, size_t bytes) { memset(to, value, bytes); return 0; }
"""
OPENED_LATER = {
    "libruntime.so",
    "libopapi.so",
    "libaml_fwk.so",
}  # with dlopen, so they are not among the linked libraries
RECORDED = """
void* record_tensor(); long record_call();
void* aclCreateTensor(const long* shape, unsigned long axes, int dtype, const long* strides) {
  return record_tensor(shape, axes, dtype, strides);
}
"""
# Names of functions that are looked up with dlsym, as in the binary. Those of kernels begin with aclnn.
BY_NAME = re.compile(rb"(?<=\0)(?:acl|Hccl|Hcom|rt|aml|dsmi|Prof|Msprof)\w{3,90}(?=\0)")
RECORDER = "libpcpvt_recorder.so"


class Unavailable(Exception):
    """The wheel cannot be used on this machine; the message is a reason to skip a test."""


def environment(soc: str | None = "Ascend910B2", *, record: bool = False) -> dict[str, str]:
    """This process's environment, changed so that `import torch` loads the real torch_npu; fills the cache if needed.

    Args:
        soc: product name of the one simulated device; None means no device.
        record: whether kernels exist and calls are recorded; PCPVT_NPU_RECORDER is then the recorder's path. Without,
            calling a kernel raises an error that names it.

    Raises:
        Unavailable: without a package index, pip or a compiler, or with a torch that torch_npu cannot be loaded into.
    """
    libraries = Path(importlib.util.find_spec("torch").origin).parent / "lib"
    if any((libraries / f"libtorch_{kind}.so").exists() for kind in ("cuda", "hip")):
        raise Unavailable("torch_npu loads only into a CPU build of torch")
    if missing := [tool for tool in ("gcc", "nm", "ldd") if shutil.which(tool) is None]:
        raise Unavailable(f"not on PATH: {', '.join(missing)}")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pcpvt" / "torch_npu"
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        site = _unpack(cache, _fetch(cache, importlib.metadata.version("torch").split("+")[0]))
        stubs = _build_stubs(cache, site, libraries, record)
    env = {**os.environ, **({"PCPVT_REAL_NPU_SOC": soc} if soc else {}), "PCPVT_NPU_RECORDER": str(stubs / RECORDER)}
    for name, folder in (("PYTHONPATH", site), ("LD_LIBRARY_PATH", stubs)):
        env[name] = os.pathsep.join([str(folder), *filter(None, [env.get(name)])])
    return env


def _fetch(cache: Path, torch: str) -> Path:
    series = ".".join(torch.split(".")[:2])
    pattern = f"torch_npu-{series}.*-cp{sys.version_info[0]}{sys.version_info[1]}-*.whl"
    if not list(cache.glob(pattern)):
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        ended = _run(*command, "--dest", str(cache), f"torch_npu=={series}.*")
        if ended.returncode:
            raise Unavailable(f"pip download torch_npu=={series}.*: {ended.stderr.strip().splitlines()[-1]}")
    return sorted(cache.glob(pattern))[-1]


def _unpack(cache: Path, wheel: Path) -> Path:
    site = cache / wheel.stem
    if not site.exists():
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            unfinished = Path(folder) / "site"
            zipfile.ZipFile(wheel).extractall(unfinished)
            unfinished.rename(site)
    return site


def _build_stubs(cache: Path, site: Path, torch_libraries: Path, record: bool) -> Path:
    """One stub library for each missing one; each defines all functions that no other library defines."""
    recorder = Path(__file__).with_name("recorder.c")
    key = f"{site.name} {torch_libraries} {importlib.metadata.version('torch')} {record}".encode()
    key += Path(__file__).read_bytes() + recorder.read_bytes()
    stubs = cache / f"stubs-{hashlib.sha256(key).hexdigest()[:16]}"
    if stubs.exists():
        return stubs
    extension = next(site.glob("torch_npu/_C*.so"))
    linked, missing = {extension}, set(OPENED_LATER)
    for line in _run("ldd", str(extension), LD_LIBRARY_PATH=str(torch_libraries)).stdout.splitlines():
        name, _, path = line.strip().partition(" => ")
        if path == "not found":
            missing.add(name)
        elif (file := Path((path or name).split(" (")[0])).is_absolute():
            linked.add(file.resolve())
    own = [file for file in linked if file.is_relative_to(site)]
    wanted = set().union(*(_symbols(file, "undefined") for file in own))
    wanted -= set().union(*(_symbols(file, "defined") for file in linked))
    wanted |= {name.decode() for file in own for name in BY_NAME.findall(file.read_bytes())}
    wanted = {name for name in wanted if record or not name.startswith("aclnn")}
    given = STUBS + RECORDED * record
    wanted -= set(re.findall(r"(\w+)\([^)]*\) \{", given))
    wanted = {name for name in wanted if not name.startswith(("Py", "_Py"))}  # defined by the interpreter
    body = 'return record_call("%s", a, b, c, d, e, f);' if record else "return 0;"
    functions = "".join(
        f"long {name}(long a, long b, long c, long d, long e, long f) {{ {body.replace('%s', name)} }}\n"
        for name in sorted(wanted)
    )
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        unfinished = Path(folder) / "stubs"
        unfinished.mkdir()
        source = Path(folder) / "stubs.c"
        source.write_text(given + functions)
        command = ["gcc", "-w", "-O1", "-fPIC", "-fno-builtin", "-shared"]
        subprocess.run([*command, "-o", str(unfinished / RECORDER), str(recorder), "-lpthread"], check=True)
        linked_to = [f"-L{unfinished}", f"-l:{RECORDER}"] if record else []
        for library in sorted(missing):
            target = ["-o", str(unfinished / library), f"-Wl,-soname,{library}"]
            subprocess.run([*command, *target, str(source), *linked_to], check=True)
        unfinished.rename(stubs)
    return stubs


def _symbols(file: Path, kind: str) -> set[str]:
    entries = [line.split()[-2:] for line in _run("nm", "-D", f"--{kind}-only", str(file)).stdout.splitlines()]
    return {name.split("@")[0] for letter, name in entries if kind == "defined" or letter not in "wv"}


def _run(*command: str, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C", **variables})


if __name__ == "__main__":
    arguments, product = sys.argv[1:], None
    if arguments[:1] == ["--soc"]:
        product, arguments = arguments[1], arguments[2:]
    os.execve(sys.executable, [sys.executable, *arguments], environment(product))
