"""The launch scripts with the real program: several hosts on loopback, core binding, signals, and exit codes."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import miniature
import pytest

LAUNCH = Path(__file__).resolve().parent.parent / "launch"

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which("bash"), reason="the launch scripts need bash on Linux"
)


def start(script: str, words: list[str], *faults: dict) -> subprocess.Popen:
    """Starts a launch script with this interpreter as its `python`, in a session of its own."""
    env = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    env |= {"PYTHONPATH": str(miniature.FAULTS), "FAULTS": json.dumps(faults)}
    return subprocess.Popen(
        [str(LAUNCH / script), *words],
        env={**os.environ, **env},
        cwd=miniature.ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_hosts(count: int, words: list[str], *faults: dict) -> list[subprocess.Popen]:
    """Starts a run on so many hosts, all of them this one; the last begins first and waits for the first."""
    place = [f"--nnodes={count}", "--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    nodes = [start("npu_pod.sh", [*place, f"--node_rank={rank}", *words], *faults) for rank in reversed(range(count))]
    return nodes[::-1]


def end(*nodes: subprocess.Popen, timeout: float = 150) -> list[miniature.Ended]:
    try:
        outputs = [node.communicate(timeout=timeout) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    return [miniature.Ended(node.returncode, *output) for node, output in zip(nodes, outputs, strict=True)]


def test_a_rank_killed_on_one_of_two_hosts_is_started_again_on_both(tmp_path, two_ranks):
    killed = {"at": "step", "n": 6, "do": "SIGKILL", "rank": 1}
    ended = end(*start_hosts(2, miniature.words(tmp_path, "cpu2", restarts=2), killed))
    assert [node.code for node in ended] == [0, 0], [node.err for node in ended]
    assert sum("restart 1, from step-0000000" in node.err for node in ended) >= 1
    miniature.assert_same_run(tmp_path, two_ranks)
    assert [entry["restart"] for entry in miniature.restarts(tmp_path)] == [1]


def test_an_error_of_the_user_on_one_host_ends_all_with_its_code(tmp_path):
    wrong = {"at": "start of a mode", "n": 1, "do": "EDQUOT", "rank": 1}
    ended = end(*start_hosts(2, miniature.words(tmp_path, "cpu2", restarts=2, timeout=5), wrong))
    assert [node.code for node in ended] == [2, 2], ended
    assert sum("quota" in node.err for node in ended) == 1
    assert all(node.err.startswith("pcpvt: ") and "restart" not in node.err for node in ended if node.err)


def test_cpu_processes_have_their_own_cores(tmp_path):
    show = [{"at": "start of a mode", "n": 1, "do": "cores", "rank": rank} for rank in (0, 1)]
    words = miniature.words(tmp_path, "cpu2", steps=1, eval_every="0")
    (ended,) = end(start("cpu.sh", words, *show))
    assert ended.code == 0, ended.err
    cores = [set(line.split()[1:]) for line in ended.out.splitlines() if line.startswith("cores")]
    assert len(cores) == 2
    if "share all" not in ended.err:  # printed on a machine with one core
        assert not cores[0] & cores[1]


def test_a_stop_has_its_exit_code(tmp_path):
    """All others, and that signals reach the program because it replaces the script: test_launch.py."""
    stop = {"at": "step", "n": 3, "do": "SIGTERM", "rank": 1}
    (ended,) = end(start("cpu.sh", miniature.words(tmp_path, "cpu2"), stop))
    assert ended.code == 75, ended.err
