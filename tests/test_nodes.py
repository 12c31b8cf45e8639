"""Checks before the first step: what is found out about cards, memory, clocks, workdir and data, and what follows."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import miniature
import pytest
import test_launch_real

from pcpvt.devices import visible
from pcpvt.distributed.group import World
from pcpvt.errors import UserError
from pcpvt.nodes import cards, check, host
from pcpvt.nodes.host import Report

CHECKS = (Path(__file__).parent.parent / "launch" / "checks.txt").read_text()

# As npu-smi prints it; NPU 1 has a second chip, as on an A3.
NPU_SMI = """\
+------------------------------------------------------------------------------------------------+
| npu-smi 24.1.0                   Version: 24.1.0                                               |
+---------------------------+---------------+----------------------------------------------------+
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip                      | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
+===========================+===============+====================================================+
| 0     910B1               | OK            | 89.1        32                0    / 0             |
| 0                         | 0000:C1:00.0  | 0           0    / 0          3437 / 65536         |
+===========================+===============+====================================================+
| 1     Ascend910           | OK            | 90.0        33                0    / 0             |
| 0     2                   | 0000:01:00.0  | 0           0    / 0          3378 / 65536         |
| 1     Ascend910           | Alarm         | 90.0        33                0    / 0             |
| 1     3                   | 0000:02:00.0  | 0           0    / 0          3378 / 65536         |
+===========================+===============+====================================================+
| NPU     Chip              | Process id    | Process name             | Process memory(MB)      |
+===========================+===============+====================================================+
| 0       0                 | 812           | python                   | 120                     |
"""
NVIDIA_SMI = """\
0, 81559, 0
1, 81559, 3
2, [Unknown Error], [Unknown Error]
3, 24564, [N/A]
"""


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """Puts a program of a name and an output alone on PATH."""
    for name in visible.VARIABLES.values():
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))

    def place(name: str, output: str, code: int = 0) -> None:
        (tmp_path / name).write_text(f"#!{sys.executable}\nprint({output!r}, end='')\nraise SystemExit({code})\n")
        (tmp_path / name).chmod(0o755)

    return place


def test_health_of_npus(tool, monkeypatch):
    assert cards.health("npu") == {}  # no npu-smi
    tool("npu-smi", NPU_SMI)
    assert cards.health("npu") == {"0": "OK", "1": "Alarm"}
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "0")
    assert cards.health("npu") == {"0": "OK"}
    tool("npu-smi", "dcmi module initialize failed. ret is -8005\n", code=1)
    assert cards.health("npu") == {}


def test_health_of_gpus(tool, monkeypatch):
    tool("nvidia-smi", NVIDIA_SMI, code=15)
    assert cards.health("cuda") == {
        "0": "OK", "1": "3 uncorrected memory errors", "2": "memory [Unknown Error]", "3": "OK",
    }  # fmt: skip
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,0")
    assert cards.health("cuda") == {"0": "OK", "3": "OK"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8c1f")
    assert len(cards.health("cuda")) == 4


def test_a_tool_that_hangs_is_given_up(tool, monkeypatch):
    tool("npu-smi", "")
    monkeypatch.setattr(cards, "LIMIT", 0)
    assert cards.health("npu") == {}


def test_memory_is_that_of_the_container(tmp_path, monkeypatch):
    whole = host.available_memory()
    (tmp_path / "max").write_text("3000000\n")
    (tmp_path / "current").write_text("2900000\n")
    (tmp_path / "memory.stat").write_text("anon 1000000\ninactive_file 1900000\nactive_file 0\n")
    monkeypatch.setattr(host, "CGROUPS", [(tmp_path, "max", "current", "inactive_file")])
    assert host.available_memory() == 2_000_000 < whole, "what is cached of files can be had"
    (tmp_path / "max").write_text("max\n")
    assert host.available_memory() > 2_000_000


def test_a_file_is_seen_only_with_its_text(tmp_path, monkeypatch):
    monkeypatch.setattr(host, "PATIENCE", 0.0)
    (tmp_path / "file").write_text("text")
    assert host.sees(tmp_path / "file", "text")
    assert not host.sees(tmp_path / "file", "other") and not host.sees(tmp_path / "none", "text")


def reports(**changed: object) -> list[Report]:
    """Those of two hosts with two processes each; rank 2, the first on host b, differs in what is given."""
    made = [Report(rank, "ab"[rank // 2], 2, [0.0, 1.0], "/w", True, "/d", [60, 40], "digest") for rank in range(4)]
    firsts = {"memory": 8 * 10**9, "shm": 6 * 10**9, "disk": 10**12, "cards": {"0": "OK", "1": "OK"}}
    made = [r if r.rank % 2 else r._replace(**firsts) for r in made]
    made[2] = made[2]._replace(**changed)
    return [host.load(report.dump()) for report in made]


CASES = {
    "healthy": ({}, check.of_cards, ("npu",), "cards: 4 of 4 healthy (npu-smi info)", "", ""),
    "one sick": (
        {"cards": {"0": "OK", "1": "Alarm"}}, check.of_cards, ("npu",), "cards: 3 of 4 healthy",
        "b: npu-smi info says Alarm of card 1: leave it out with ASCEND_RT_VISIBLE_DEVICES", "",
    ),
    "all sick": (
        {"cards": {"0": "Alarm", "1": "Critical"}}, check.of_cards, ("npu",), "cards: 2 of 4 healthy", "says Alarm",
        "config.device: 'npu': no card of b is healthy (0 Alarm, 1 Critical): use other nodes",
    ),
    "unknown": ({"cards": {}}, check.of_cards, ("cuda",), "2 of 2 healthy (nvidia-smi); not known on b", "", ""),
    "room": (
        {"disk": 5 * 10**9}, check.of_memory, (True,),
        "on each node at least 8 GB of memory, 6 GB of /dev/shm, 5 GB of the workdir's disk free", "", "",
    ),
    "little memory": ({"memory": 10**9}, check.of_memory, (True,), "1 GB of", "b: 1 GB of memory free for 2 pro", ""),
    "little shm": ({"shm": 64 * 10**6}, check.of_memory, (True,), "0.064 GB", "0.064 GB of /dev/shm free", ""),
    "shm unused": ({"shm": 64 * 10**6}, check.of_memory, (False,), "0.064 GB", "", ""),
    "clocks": ({"clock": [0.2, 3.0]}, check.of_clocks, (), "clocks: at most 0.2 s apart", "", ""),
    "a clock ahead": (
        {"clock": [70.2, 71.1]}, check.of_clocks, (), "clocks: at most 70 s apart",
        "the clock of rank 2 on b differs by +70.1 s from that of rank 0 on a: set both by NTP", "",
    ),
    "one workdir": ({}, check.of_workdir, (), "workdir: one folder for all 4 processes", "", ""),
    "two workdirs": (
        {"shared": False}, check.of_workdir, (), "", "",
        "--workdir: /w: rank 2 on b does not see what rank 0 on a writes there",
    ),
    "data": ({}, check.of_data, (), "data: 60 training and 40 validation images in each process", "", ""),
    "fewer files": (
        {"data": [59, 40]}, check.of_data, (), "", "",
        "config.data.path: /d: rank 0 on a finds 60 training and 40 validation images, rank 2 on b 59 and 40: give",
    ),
    "other classes": ({"classes": "x"}, check.of_data, (), "", "", "rank 2 on b other classes: give all hosts"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_follows_from_the_reports(case):
    changed, judge, more, line, doubt, certain = CASES[case]
    finding = judge(reports(**changed), *more)
    assert line in finding.line
    assert len(finding.doubts) <= 2 and bool(finding.doubts) == bool(doubt) and doubt in "".join(finding.doubts)
    assert bool(finding.certain) == bool(certain) and certain in "".join(finding.certain)


def test_a_slow_all_reduce_is_a_doubt():
    assert check.of_reduction(0.0012, "npu") == ("all-reduce: 4.2 MB in 1.2 ms", [], [])
    assert (
        "HCCL_SOCKET_IFNAME" in check.of_reduction(0.2, "npu").doubts[0] and not check.of_reduction(0.2, "cpu").doubts
    )


class Data(list):
    """A data set without images."""

    classes, in_memory = ("a",), True


def one_process(tmp_path: Path, device: str) -> SimpleNamespace:
    """The session of a run of one process."""
    config = SimpleNamespace(data=SimpleNamespace(path="/d", workers=0))
    return SimpleNamespace(config=config, device=SimpleNamespace(name=device), world=World(), workdir=tmp_path)


def test_one_process_prints_nothing_and_ends_without_a_healthy_card(tmp_path, tool, capsys):
    check.before_start(one_process(tmp_path / "none", "cpu"), Data(), Data(), print)
    assert capsys.readouterr() == ("", "")
    tool("npu-smi", NPU_SMI.replace("OK", "Alarm"))
    with pytest.raises(UserError, match=r"no card of .* is healthy \(0 Alarm, 1 Alarm\)"):
        check.before_start(one_process(tmp_path, "npu"), Data(), Data(), print)


def test_each_check_prints_a_line_and_a_wrong_clock_is_a_warning(tmp_path):
    words = miniature.words(tmp_path, "cpu2", steps=1, eval_every="0", save_every="0")
    ended = miniature.run(words, {"at": "clock", "do": "60", "rank": 1})
    assert ended.code == 0, ended.err
    printed = re.findall(r"^check: ([\w-]+): ", ended.out, re.M)
    assert ["cards", *printed] == re.findall(r"^- ([\w-]+): ", CHECKS, re.M)
    assert re.search(r"warning: the clock of rank 1 on \S+ differs by \+\d\d\.\d s", ended.err)
    assert not list(tmp_path.glob(".shared*"))


def test_hosts_with_other_workdirs_and_data_end_before_the_first_step(tmp_path):
    """Two hosts, with a data folder and a workdir each, and a file less in one."""
    nodes = []
    place = ["--nnodes=2", "--master_addr=127.0.0.1", f"--master_port={test_launch_real.free_port()}"]
    for rank in (0, 1):
        data = miniature.image_folder(tmp_path / f"data{rank}")
        if rank:
            (data / "train/cat/3.png").unlink()
        words = miniature.words(
            tmp_path / f"run{rank}", "cpu2,folder", data__path=data, image_size=32, batch_size=8, data__workers=0
        )
        nodes.append(test_launch_real.start("npu_pod.sh", [*place, f"--node_rank={rank}", *words]))
    ended = test_launch_real.end(*nodes)
    assert [node.code for node in ended] == [2, 2], ended
    (line,) = (line for node in ended for line in node.err.splitlines() if "error: " in line)
    assert "rank 1 on " in line and "does not see what rank 0 on " in line
    assert "finds 32 training and 32 validation images" in line and " 31 and 32" in line
    assert not any("step " in node.out for node in ended)


@pytest.mark.parametrize("script", ["npu_pod.sh --config=c.py:cpu2 --nproc_per_node=2", "cpu.sh --nproc=2"])
def test_a_dry_run_says_what_is_checked(script, tmp_path):
    name, *words = script.split()
    (ended,) = test_launch_real.end(test_launch_real.start(name, [*words, "--dry_run"]))
    assert ended.code == 0 and "".join(f"# {line}\n" for line in CHECKS.splitlines()) in ended.out
