"""Python programs that start without delay: forks of a server that has imported the libraries, but nothing of pcpvt.

Importing torch, torchvision and timm takes 2 s of a core, and the tests start some 250 programs. A
program started here executes all of `python -m pcpvt.main`, from the first line of pcpvt on, in a process and a session
of its own, with its own arguments, environment, working directory, pipes, signals and exit code. Three things differ
from a new interpreter: the libraries are imported before the signal handlers are installed; /proc/PID/environ is the
server's; and OMP_NUM_THREADS, which OpenMP reads when it is loaded, is passed to torch by a call. Tests that depend on
these start a new interpreter (`cold=True` of the fixture `pcpvt` and of `miniature.start`). Ranks and loader processes
always do.
"""

from __future__ import annotations

import atexit
import concurrent.futures
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import types
from collections.abc import Mapping, Sequence
from pathlib import Path

LIBRARIES = (
    "absl.app", "ml_collections.config_flags", "safetensors.torch", "timm.data",
    "torch.distributed.launcher.api", "torch.utils.tensorboard",
)  # fmt: skip


class Process:
    """The part of `subprocess.Popen` that the tests use; `argv` begins with `-m MODULE` or `-c CODE`."""

    def __init__(self, argv: Sequence[str], env: Mapping[str, str], cwd: Path):
        request = json.dumps({"argv": [*argv], "env": dict(env), "cwd": str(cwd)}).encode()
        pipes = [os.pipe() for _ in range(3)]
        # `import torch` loads the stand-in for NPUs, which reads these variables then: one server per kind.
        npu = {name: value for name, value in env.items() if name.startswith("PCPVT_NPU_STANDIN")}
        if npu:
            npu["PYTHONPATH"] = env["PYTHONPATH"].split(os.pathsep)[0]
        socket.send_fds(_server(*npu.items()), [request], [write for _, write in pipes])
        for _, write in pipes:
            os.close(write)
        self.stdout, self.stderr, self._report = (os.fdopen(read, errors="backslashreplace") for read, _ in pipes)
        self.argv, self.returncode = argv, None
        self.pid = int(self._report.readline())

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._report], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.argv, timeout)
            self.returncode = int(self._report.readline())
            self._report.close()
        return self.returncode

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.wait(0)
        return None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        pool = concurrent.futures.ThreadPoolExecutor(2)
        reads = [pool.submit(stream.read) for stream in (self.stdout, self.stderr)]
        pool.shutdown(wait=False)
        try:
            out, err = (read.result(timeout) for read in reads)
        except concurrent.futures.TimeoutError:
            raise subprocess.TimeoutExpired(self.argv, timeout) from None
        self.stdout.close()
        self.stderr.close()
        self.wait(timeout)
        return out, err


def run(argv: Sequence[str], env: Mapping[str, str], cwd: Path, timeout: float) -> subprocess.CompletedProcess[str]:
    """Like `subprocess.run` with captured text."""
    process = Process(argv, env, cwd)
    try:
        out, err = process.communicate(timeout)
    finally:
        process.kill()
    return subprocess.CompletedProcess(argv, process.returncode, out, err)


@functools.cache
def _server(*variables: tuple[str, str]) -> socket.socket:
    """Starts a server with these variables in its environment, once; it ends when this end of the socket is closed."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    root = Path(__file__).parent.parent
    # With more than one thread, OpenBLAS would start them when it is imported.
    env = {**os.environ, "OMP_NUM_THREADS": "1", **dict(variables)}
    command = [sys.executable, __file__, str(theirs.fileno())]
    server = subprocess.Popen(command, cwd=root, env=env, pass_fds=[theirs.fileno()], start_new_session=True)
    theirs.close()
    atexit.register(lambda: (ours.close(), server.wait()))
    return ours


def _serve(requests: socket.socket) -> list[str]:
    """Forks for every request; returns in the fork only, with the arguments of the program to be run there."""
    sys.path[0] = os.getcwd()  # instead of this script's folder
    from pcpvt import torchvision_compat  # noqa: F401 - before timm

    for name in LIBRARIES:
        importlib.import_module(name)
    for name in [name for name in sys.modules if name.partition(".")[0] == "pcpvt"]:
        del sys.modules[name]
    assert len(os.listdir("/proc/self/task")) == 1, "a fork of several threads may hang"
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel removes the monitors that have ended
    while True:
        request, files, _, _ = socket.recv_fds(requests, 1 << 20, 3)
        if not request:
            os._exit(0)
        if os.fork() == 0:
            requests.close()
            _fork_program(files)
            atexit.register(gc.unfreeze)  # triton 3.9 reports every object that is not freed in the end
            return _prepare(json.loads(request), *files)
        for file in files:
            os.close(file)


def _fork_program(files: list[int]) -> None:
    """Forks again and returns in the program's process; its parent, the monitor, stays to report its exit code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if pid == 0:
        return
    for file in files[:2]:
        os.close(file)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.write(files[2], f"{code}\n".encode())
    os._exit(0)


def _prepare(request: dict, out: int, err: int, report: int) -> list[str]:
    """Gives this process what a new interpreter would have been given; returns its arguments."""
    import torch

    os.setsid()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests under nohup would pass on that it is ignored
    os.write(report, f"{os.getpid()}\n".encode())
    for file, number in ((os.open(os.devnull, os.O_RDONLY), 0), (out, 1), (err, 2)):
        os.dup2(file, number)
        os.close(file)
    os.close(report)
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    tempfile.tempdir = None
    torch.set_num_threads(int(request["env"]["OMP_NUM_THREADS"]))
    paths = request["env"].get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:1] = [request["cwd"], *(path for path in paths if path and path not in sys.path)]
    importlib.invalidate_caches()
    sys.modules.pop("sitecustomize", None)
    with contextlib.suppress(ImportError):  # as every interpreter does when it starts; see faults/sitecustomize.py
        import sitecustomize  # noqa: F401
    return request["argv"]


def _execute(option: str, program: str, *arguments: str) -> None:
    """What `python -m MODULE` and `python -c CODE` do."""
    sys.argv = [option, *arguments]
    if option == "-m":
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    else:
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(program, vars(sys.modules["__main__"]))


if __name__ == "__main__":
    _execute(*_serve(socket.socket(fileno=int(sys.argv[1]))))
