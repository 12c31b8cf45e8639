"""The launch scripts with real processes: rendezvous, core binding and signals. The trainer is replaced by a script."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parent.parent / "launch"

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which("bash"), reason="the launch scripts need bash on Linux"
)

ALL_REDUCE = """
import os
import torch
import torch.distributed as dist

dist.init_process_group("gloo")
total = torch.tensor(dist.get_rank() + 1)
dist.all_reduce(total)
cores = ",".join(str(core) for core in sorted(os.sched_getaffinity(0)))
# A single write, so that lines of several processes do not mix.
os.write(1, f"rank {dist.get_rank()} of {dist.get_world_size()} sum {int(total)} cores {cores}\\n".encode())
dist.destroy_process_group()
"""


@pytest.fixture
def real(tmp_path: Path) -> dict[str, str]:
    """An environment whose `python` is this interpreter; the test writes `pcpvt.main` to tmp_path/pcpvt."""
    python = tmp_path / "bin/python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    (tmp_path / "pcpvt").mkdir()
    (tmp_path / "pcpvt/__init__.py").touch()
    return {"PATH": f"{python.parent}:{os.environ['PATH']}", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}


def ranks(output: str) -> dict[str, tuple[str, str]]:
    """Rank to ("of N sum S", cores), from the lines that ALL_REDUCE prints."""
    rows = [line.split() for line in output.splitlines() if line.startswith("rank ")]
    return {words[1]: (" ".join(words[2:6]), words[7]) for words in rows}


def test_two_nodes_of_two_cpu_processes_join_one_group(tmp_path: Path, real: dict[str, str]) -> None:
    (tmp_path / "pcpvt/main.py").write_text(ALL_REDUCE)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    call = [str(LAUNCH / "npu_pod.sh"), "--nnodes=2", "--master_addr=127.0.0.1", f"--master_port={port}"]
    nodes = [
        subprocess.Popen(
            [*call, f"--node_rank={rank}", "--config=configs/pcpvt_s.py:cpu4"],
            env=real,
            cwd=tmp_path,
            text=True,
            stdout=subprocess.PIPE,
        )
        for rank in (1, 0)  # rank 1, which waits for rank 0, starts first
    ]
    try:
        outputs = [node.communicate(timeout=120)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0]
    by_node = [ranks(output) for output in outputs]
    assert [len(node) for node in by_node] == [2, 2]
    sums = {rank: text for rank, (text, _) in (by_node[0] | by_node[1]).items()}
    assert sums == dict.fromkeys("0123", "of 4 sum 10")


def test_cpu_processes_join_one_group_and_have_their_own_cores(tmp_path: Path, real: dict[str, str]) -> None:
    (tmp_path / "pcpvt/main.py").write_text(ALL_REDUCE)
    call = [str(LAUNCH / "cpu.sh"), "--config=c.py:cpu2"]
    run = subprocess.run(call, env=real, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    by_rank = ranks(run.stdout)
    assert {rank: text for rank, (text, _) in by_rank.items()} == {"0": "of 2 sum 3", "1": "of 2 sum 3"}
    if "share all" not in run.stderr:  # printed on a machine with one core
        assert not set(by_rank["0"][1].split(",")) & set(by_rank["1"][1].split(","))


def test_failed_cpu_process_fails_the_launch(tmp_path: Path, real: dict[str, str]) -> None:
    (tmp_path / "pcpvt/main.py").write_text("import os, sys\nsys.exit(os.environ['RANK'] == '1')\n")
    call = [str(LAUNCH / "cpu.sh"), "--nproc=2"]
    run = subprocess.run(call, env=real, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert run.returncode == 1


def test_single_cpu_process_gets_signals_and_determines_the_status(tmp_path: Path, real: dict[str, str]) -> None:
    (tmp_path / "pcpvt/main.py").write_text(
        "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(41))\n"
        "print('up', flush=True)\ntime.sleep(60)\n"
    )
    call = [str(LAUNCH / "cpu.sh")]
    with subprocess.Popen(call, env=real, cwd=tmp_path, text=True, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 41
