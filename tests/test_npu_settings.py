"""The environment variables of NPU processes: one table, seen by the ranks, which the user's own values override."""

from __future__ import annotations

import json
from pathlib import Path

import miniature
import npu_standin
import pytest

from pcpvt.devices import npu_settings
from pcpvt.devices.cpu import Cpu

ONCE = {"steps": 1, "eval_every": "0", "save_every": "0"}
SHOW = {"at": "inside step", "n": 1, "do": "environ", "rank": 1}


def shown(out: str) -> dict[str, str]:
    """The environment that a rank has printed."""
    (line,) = (line for line in out.splitlines() if line.startswith("environ "))
    return json.loads(line.removeprefix("environ "))


@pytest.mark.skipif(npu_standin.available() is not None, reason=str(npu_standin.available()))
def test_ranks_on_npus_see_the_table_and_what_the_user_has_set(tmp_path):
    made = npu_standin.environment()
    given = {name: value for name, value in made.items() if "NPU_STANDIN" in name}
    given["PYTHONPATH"] = f"{npu_standin.SITE}:{miniature.FAULTS}"
    words = miniature.words(tmp_path, "npu2,digits", timeout=700, **ONCE)
    ended = miniature.run(words, SHOW, env=given | {"TASK_QUEUE_ENABLE": "1"})
    assert ended.code == 0, ended.err
    seen = shown(ended.out)
    assert {name: seen.get(name) for name in npu_settings.SETTINGS} == {
        "HCCL_EXEC_TIMEOUT": "600", "HCCL_CONNECT_TIMEOUT": "600", "HCCL_WHITELIST_DISABLE": "1",
        "PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True", "TASK_QUEUE_ENABLE": "1", "CPU_AFFINITY_CONF": "1",
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip


def test_ranks_on_cpus_see_none_of_it(two_ranks):
    seen = shown((two_ranks.parent / "stdout.txt").read_text())
    assert set(seen) & set(npu_settings.SETTINGS) == {"OMP_NUM_THREADS"}  # set by `miniature`
    assert Cpu().environment(2100) == {}


def test_limits_of_hccl_follow_the_timeout_within_its_ranges():
    limits = [npu_settings.environment(timeout) for timeout in (10, 2100, 100_000)]
    assert [limit["HCCL_EXEC_TIMEOUT"] for limit in limits] == ["68", "1800", "17340"]
    assert [limit["HCCL_CONNECT_TIMEOUT"] for limit in limits] == ["120", "1800", "7200"]


def test_the_document_has_the_table():
    rows = [
        f"| `{name}` | {s.value if s.of_timeout else f'`{s.value}`'} | {s.why} | {s.source} |"
        for name, s in npu_settings.SETTINGS.items()
    ]
    text = (Path(__file__).parent.parent / "docs" / "pods.md").read_text()
    assert "\n".join(rows) in text
