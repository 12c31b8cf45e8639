"""docs/pods.md: its commands run, and what it says of exit codes is what the fake schedulers do."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import miniature
import pytest
import schedulers
import test_schedulers
from test_documents import commands
from test_schedulers import CONTROLLERS, JOBS, LOOPBACK, SBATCH, fake  # noqa: F401 - a fixture

ROOT = Path(__file__).parent.parent
DOCUMENT = (ROOT / "docs" / "pods.md").read_text()
LINES = {line.split()[0]: shlex.split(line) for line in commands(DOCUMENT) if not line.startswith("kubectl")}


def test_a_dry_run_prints_a_script(fake):  # noqa: F811
    done = subprocess.run(LINES["launch/npu_pod.sh"], cwd=ROOT, env=fake, capture_output=True, text=True)
    assert done.returncode == 0 and "export PET_NODE_RANK=1" in done.stdout, done.stderr


def test_the_job_for_slurm_runs(fake, tmp_path):  # noqa: F811
    _, nodes, script, *words = LINES["sbatch"]
    assert f"#SBATCH {nodes}" in SBATCH.read_text() and ROOT / script == SBATCH
    env = fake | LOOPBACK | {"PLAN": "0,0", "START": "0"}
    assert schedulers.sbatch(SBATCH, words, tmp_path, lambda start: env) == [0]


def test_each_manifest_is_named():
    named = [line.split()[-1] for line in commands(DOCUMENT) if line.startswith("kubectl")]
    assert sorted(named) == [f"launch/{name}" for name in sorted(JOBS)]


def test_the_command_with_variables_of_torchrun_runs(tmp_path):
    words = LINES["PET_NNODES=1"]
    given = dict(word.split("=", 1) for word in words[:2])
    assert words[2:5] == ["python", "-m", "pcpvt.main"]
    # The document's --config, at miniature size.
    small = miniature.words(tmp_path, "cpu", steps=1, eval_every="0", save_every="0")[1:]
    ended = miniature.run([words[5], *small], env=given)
    assert ended.code == 0 and "device: 2 x cpu" in ended.out, ended.err


ROWS = re.findall(r"^\| (\d+|128 \+ n) \| [^|]+ \| ([^|]+) \| `(\w+)` \| ([^|]+) \|$", DOCUMENT, re.M)


def test_the_table_has_each_exit_code():
    assert [row[0] for row in ROWS] == ["0", "2", "75", "76", "128 + n", "77", "1"]


@pytest.mark.parametrize(("code", "slurm", "volcano", "operators"), ROWS)
def test_the_table_of_exit_codes_is_what_schedulers_do(code, slurm, volcano, operators, fake, tmp_path):  # noqa: F811
    number = 137 if "n" in code else int(code)
    event = schedulers.FAILED if number else schedulers.COMPLETED
    policies = JOBS["volcano_npu.yaml"]["spec"]["policies"]
    assert schedulers.volcano_action(policies, event, number) == volcano
    env = fake | LOOPBACK | {"START": "0"}
    plans = [f"{number},{number}", "0,0"]
    starts = schedulers.sbatch(SBATCH, test_schedulers.NPU16, tmp_path, lambda start: env | {"PLAN": plans[start]})
    assert (len(starts) == 2) == slurm.startswith("queued again")
    told = [int(operators.split(",")[0])] if operators[0].isdecimal() else [number]
    _, count = CONTROLLERS["ascendjob_npu.yaml"](JOBS["ascendjob_npu.yaml"], lambda start: [0] if start else told)
    assert (count == 2) == operators.endswith("starts again")
