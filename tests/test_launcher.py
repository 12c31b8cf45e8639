"""Runs of several processes from one command: exit codes, one line per error, and no process left behind."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import threading
from pathlib import Path

import miniature
import pytest
import torch
from miniature import run

from pcpvt import devices
from pcpvt.checkpoints import checkpoint
from pcpvt.distributed import group, launch, peers, signals
from pcpvt.errors import PeerError, UserError

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
LONG = {"steps": 5000, "eval_every": "0", "save_every": "0", "log_every": "1 step"}


def test_killed_rank_is_named_and_neither_state_is_lost_nor_a_process_left(tmp_path):
    data = miniature.image_folder(tmp_path / "data")
    words = miniature.words(
        tmp_path / "run", "cpu2,folder", data__path=data, image_size=32, batch_size=8, augment__randaugment="",
        data__workers=1, **LONG,
    )  # fmt: skip
    ended = run(words, {"at": "step", "n": 3, "do": "SIGKILL", "rank": 1})
    assert ended.code == 128 + 9
    assert "pcpvt: error: rank 1 was killed by SIGKILL; the others were stopped" in ended.err.splitlines()
    assert "Traceback" not in ended.err
    assert list(checkpoint.steps(tmp_path / "run" / "checkpoints")) == [3]  # rank 0 has saved what was done


def test_error_in_one_rank_is_one_line_that_names_it(tmp_path):
    data = miniature.image_folder(tmp_path / "data")
    (data / "train/cat/3.png").write_bytes(b"no image")
    words = miniature.words(
        tmp_path / "run", "cpu2,folder", data__path=data, image_size=32, batch_size=2, mixup=0.0, cutmix=0.0,
        data__workers=0, **LONG,
    )  # fmt: skip
    ended = run(words)
    assert ended.code == 2
    assert "cat/3.png" in ended.error and "rank " in ended.error


def test_error_of_all_ranks_is_printed_once(tmp_path):
    ended = run(miniature.words(tmp_path, "cpu2", frozen="matches_no_parameter"))
    assert ended.code == 2 and "config.frozen" in ended.error


def test_rank_that_never_joins_is_named(tmp_path):
    absent = {"at": "join", "n": 1, "do": "sleep:60", "rank": 1}
    ended = run(miniature.words(tmp_path, "cpu2", timeout=3, **LONG), absent)
    assert ended.code == signals.PEER_LOST and "rank 1 gave no answer" in ended.error


def test_error_of_a_rank_before_they_have_joined_is_one_line(tmp_path):
    """Of rank 1, which rank 0 would wait for; an error of rank 0 is said as one of a single process."""
    ended = run(miniature.words(tmp_path, "cpu2"), {"at": "start of a mode", "n": 1, "do": "EDQUOT", "rank": 1})
    assert ended.code == 2 and "quota" in ended.error, ended.err


def test_error_of_communication_outside_a_collective_names_the_lost_rank(tmp_path):
    """As HCCL and NCCL report it: a later operation that reads from the device fails."""
    failed = {"at": "inside step", "n": 3, "do": "error:HCCL function error, error code is 6", "rank": 0}
    ended = run(
        miniature.words(tmp_path, "cpu2", **LONG), failed, {"at": "inside step", "n": 3, "do": "SIGKILL", "rank": 1}
    )
    assert "rank 0: rank 1 lost: HCCL function error" in ended.err and "Traceback" not in ended.err


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        ("[/x/gloo/transport/tcp/pair.cc:553] Connection closed by peer", True),
        ("NCCL communicator was aborted on rank 0", True),
        ("EI0006: Getting socket times out", True),
        ("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory", False),
        ("CUDA error: an illegal memory access was encountered", False),
    ],
)
def test_only_errors_of_communication_are_lost_peers(text, lost, monkeypatch):
    joined = group.Group()
    joined.store = torch.distributed.HashStore()
    monkeypatch.setattr(group, "joined", joined)
    monkeypatch.setattr(peers, "_roll_call", lambda asks: [1])
    monkeypatch.setattr(peers.dist, "is_initialized", lambda: True)
    with pytest.raises(PeerError if lost else RuntimeError) as caught, peers.peer_errors():
        raise RuntimeError(text)
    assert isinstance(caught.value, PeerError) == lost and ("rank 1" in str(caught.value)) == lost


def test_run_of_several_processes_leaves_no_temporary_files(two_ranks):
    assert list((two_ranks.parent / "tmp").iterdir()) == []


def test_child_processes_are_found_while_threads_end(monkeypatch):
    """Each thread has its own list of children in /proc, which vanishes when the thread ends."""
    read, own = Path.read_text, f"/proc/self/task/{threading.get_native_id()}/children"

    def vanished(path):
        if str(path) == own:
            raise FileNotFoundError
        return read(path)

    monkeypatch.setattr(Path, "read_text", vanished)
    started, done = queue.Queue(), threading.Event()

    def start():
        started.put(subprocess.Popen(["sleep", "60"]))
        done.wait()  # when this thread ends, its children move to the list of another thread

    thread = threading.Thread(target=start)
    thread.start()
    child = started.get()
    try:
        assert child.pid in signals.children() and child.pid in signals.descendants()
    finally:
        child.kill()
        child.wait()
        done.set()
        thread.join()


# ---- under torchrun


def torchrun(processes: int, words: list[str]) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run(
        [*command, "-m", "pcpvt.main", *words],
        cwd=miniature.ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_process_count_is_torchruns_if_arg_has_none(tmp_path):
    ended = torchrun(2, miniature.words(tmp_path, "cpu", steps=2))
    assert ended.returncode == 0, ended.stderr
    assert "2 x cpu" in ended.stdout


def test_process_count_other_than_torchruns_is_a_one_line_error(tmp_path):
    ended = torchrun(2, miniature.words(tmp_path, "cpu3"))
    assert ended.returncode != 0
    errors = [line for line in ended.stderr.splitlines() if line.startswith("pcpvt: error: ")]
    assert errors == [
        "pcpvt: error: config.processes: 3 but 2 processes were started: write :cpu2, or :cpu for as many as there are"
    ]


def test_without_arg_the_count_is_torchruns(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "16")
    assert devices.detect().endswith("16")


# ---- before any process is started


@pytest.mark.skipif(hasattr(torch, "npu"), reason="this machine has an NPU backend")
def test_missing_torch_npu_is_a_one_line_error(pcpvt):
    ended = pcpvt("--config=configs/pcpvt_s.py:npu8", check=False)
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1
    assert "torch_npu is not installed" in ended.stderr


def test_more_gpus_than_present_is_an_error():
    with pytest.raises(UserError, match=r"cuda|GPU"):
        devices.get("cuda").require(1000)


def test_backend_that_cannot_be_imported_is_a_one_line_error(pcpvt, tmp_path):
    """`import torch` behaves like this when torch_npu is installed without CANN."""
    (tmp_path / "broken_backend.py").write_text("raise ImportError('libascendcl.so: cannot open shared object file')")
    info = tmp_path / "broken_backend-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken_backend\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[torch.backends]\nbroken_backend = broken_backend:start\n")
    ended = pcpvt("--config=configs/pcpvt_s.py:cpu", check=False, env={"PYTHONPATH": str(tmp_path)})
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1, ended.stderr
    assert "libascendcl.so" in ended.stderr and "set_env.sh" in ended.stderr


class Failure:
    def __init__(self, exitcode: int, timestamp: int):
        self.exitcode, self.timestamp = exitcode, timestamp


@pytest.mark.parametrize(
    ("failures", "code", "message"),
    [
        ({0: Failure(76, 5), 1: Failure(-9, 5)}, 137, "rank 1 was killed by SIGKILL"),
        ({0: Failure(-15, 7), 3: Failure(1, 5)}, 1, "rank 3 failed with exit code 1"),
        ({0: Failure(2, 5), 1: Failure(-15, 5)}, 2, ""),
        ({0: Failure(75, 5), 1: Failure(75, 5)}, 75, ""),
        ({0: Failure(76, 5), 1: Failure(-9, 35)}, 76, ""),
        ({2: Failure(76, 5), 1: Failure(75, 5)}, 76, ""),
    ],
)
def test_exit_code_is_that_of_the_first_rank_with_an_error_of_its_own(failures, code, message, capsys):
    assert launch._exit_code(failures, Path("debug")) == code
    err = capsys.readouterr().err
    assert message in err and bool(err) == bool(message)


def test_loader_processes_end_when_the_run_is_killed(tmp_path):
    data = miniature.image_folder(tmp_path / "data")
    words = miniature.words(
        tmp_path / "run", "cpu,folder", data__path=data, image_size=32, batch_size=8, augment__randaugment="",
        data__workers=1, **LONG,
    )  # fmt: skip
    assert run(words, {"at": "step", "n": 2, "do": "SIGKILL"}).code == -9
