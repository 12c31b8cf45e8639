"""What each scheduler makes of the files in launch/: one run of all pods, and starts that follow the exit codes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import miniature
import pytest
import schedulers
from test_launch_real import free_port

from pcpvt.distributed import hosts

yaml = pytest.importorskip("yaml")

LAUNCH = Path(__file__).resolve().parent.parent / "launch"
SBATCH = LAUNCH / "slurm_npu.sbatch"
NPU16 = ["--config=configs/pcpvt_s.py:npu16", "--workdir=unused"]
LOOPBACK = {"MASTER_ADDR": "127.0.0.1"}
JOBS = {path.name: yaml.safe_load(path.read_text()) for path in sorted(LAUNCH.glob("*.yaml"))}
ENVIRONMENTS = {
    "volcano_npu.yaml": schedulers.volcano_environments,
    "ascendjob_npu.yaml": schedulers.ascend_environments,
    "pytorchjob_npu.yaml": schedulers.pytorch_environments,
}
CONTROLLERS = {
    "volcano_npu.yaml": schedulers.volcano,
    "ascendjob_npu.yaml": schedulers.exit_code_policy,
    "pytorchjob_npu.yaml": schedulers.exit_code_policy,
}
# Ends with the code that PLAN has for this start and node: `75,75 0,0` are two starts of two nodes. The second ends a
# little later. PCPVT_RETRY_CODE acts as in `hosts.exit_code`.
FAKE_PYTHON = """#!/usr/bin/env bash
IFS=' ' read -ra starts <<<"$PLAN"; IFS=, read -ra codes <<<"${starts[START]:-${starts[-1]}}"
sleep "0.$((PET_NODE_RANK * 3))"
code=${codes[PET_NODE_RANK]}
case $code in 0 | 2) ;; *) code=${PCPVT_RETRY_CODE:-$code} ;; esac
exit "$code"
"""

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which("bash"), reason="the launch scripts need bash on Linux"
)


@pytest.fixture
def fake(tmp_path: Path) -> dict[str, str]:
    """A clean environment with the fake `python` and with CANN."""
    (tmp_path / "python").write_text(FAKE_PYTHON)
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "set_env.sh").touch()
    path = f"{tmp_path}:/usr/local/bin:/usr/bin:/bin"
    return {"PATH": path, "HOME": str(tmp_path), "CANN_SET_ENV": str(tmp_path / "set_env.sh")}


def templates(job: dict) -> list[dict]:
    """The pod templates of a job, one per kind of pod."""
    spec = job["spec"]
    named = spec.get("replicaSpecs") or spec.get("pytorchReplicaSpecs") or {}
    return [replica["template"] for replica in [*named.values(), *spec.get("tasks", [])]]


def pods(name: str) -> tuple[list[str], list[dict[str, str]]]:
    """The command of a manifest's pods, and the variables that the scheduler sets in each."""
    commands = {json.dumps(t["spec"]["containers"][0]["command"] + t["spec"]["containers"][0]["args"])
                for t in templates(JOBS[name])}  # fmt: skip
    (command,) = map(json.loads, commands)
    return command, ENVIRONMENTS[name](JOBS[name])


@pytest.mark.parametrize("name", JOBS)
def test_all_pods_of_a_manifest_are_one_run(name, fake):
    command, environments = pods(name)
    places = []
    for env in environments:
        done = subprocess.run(
            [*command, "--dry_run"], cwd=LAUNCH.parent, env=fake | env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        exports = dict(re.findall(r"^export (\w+)=(\S+)$", done.stdout, re.M))
        places.append(hosts.from_environment(exports))
        if "WORLD_SIZE" in env:  # the program without the script
            assert not hosts.is_rank(env)
            assert hosts.from_environment(env)[:4] == places[-1][:4]
    (total,) = re.findall(r":npu(\d+)", str(command))
    assert [place.rank for place in places] == list(range(len(environments)))
    assert len({(place.number, place.endpoint, place.run_id) for place in places}) == 1 and places[0].endpoint
    assert places[0].number == len(environments) > 1 and places[0].processes_in_all() == int(total)


@pytest.mark.parametrize("name", JOBS)
def test_a_manifest_is_consistent(name):
    job = JOBS[name]
    for template in templates(job):
        pod = template["spec"]
        (container,) = pod["containers"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        assert container["resources"]["requests"] == container["resources"]["limits"]
        for env in container.get("env", []):
            annotation = re.search(r"annotations\['(.+)'\]", env["valueFrom"]["fieldRef"]["fieldPath"])
            assert annotation and annotation[1] in container["resources"]["requests"]
        chip = job["metadata"].get("labels", {}).get("ring-controller.atlas")
        assert template.get("metadata", {}).get("labels", {}).get("ring-controller.atlas") == chip
    spec = job["spec"]
    least = spec.get("minAvailable") or spec["runPolicy"].get("schedulingPolicy", {}).get("minAvailable")
    assert least in (None, len(ENVIRONMENTS[name](job)))


# Codes by start and node, and how often each scheduler starts the job.
PLANS = {
    "done": ("0,0", 1, True),
    "an error of the user": ("2,2", 1, False),
    "stopped after saving": ("75,75 75,75 0,0", 3, True),
    "faults": ("76,1 137,76 0,0", 3, True),
    "a fault, then an error of the user": ("1,76 2,2", 2, False),
}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", JOBS)
def test_starts_of_a_manifest_follow_the_exit_codes(name, plan, fake):
    command, environments = pods(name)
    codes, starts, succeeds = PLANS[plan]

    def run(start: int) -> list[int]:
        told = {"PLAN": codes, "START": str(start)}
        started = [subprocess.Popen(command, cwd=LAUNCH.parent, env=fake | env | told) for env in environments]
        return [process.wait(60) for process in started]

    end, count = CONTROLLERS[name](JOBS[name], run)
    assert count == starts and (end in ("Completed", "Succeeded")) == succeeds, end


@pytest.mark.parametrize("name", JOBS)
def test_a_fault_without_end_is_not_started_for_ever(name):
    told = 1 if name == "volcano_npu.yaml" else 138
    end, count = CONTROLLERS[name](JOBS[name], lambda start: [told, told])
    assert end == "Failed" and 20 <= count <= 21


def test_volcano_admits_the_policies_and_acts_on_each():
    policies = JOBS["volcano_npu.yaml"]["spec"]["policies"]
    assert schedulers.volcano_admits(policies)
    assert not schedulers.volcano_admits([*policies, {"exitCode": 2, "action": "RestartJob"}])
    assert schedulers.volcano_action(policies, schedulers.EVICTED, 0) == "RestartJob"


@pytest.mark.parametrize(("fewest", "limit"), [(8, 0), (0, 60)])
def test_slurm_lets_the_other_nodes_go_on_where_the_run_does(fewest, limit, fake, tmp_path):
    (tmp_path / "srun").write_text('#!/bin/sh\necho "$*"\n')
    (tmp_path / "srun").chmod(0o755)
    done = subprocess.run(
        ["bash", SBATCH, *NPU16, f"--config.elastic={fewest}"], env=fake, capture_output=True, text=True
    )
    assert f" --wait={limit} " in done.stdout and done.returncode == 0, done


@pytest.mark.parametrize("plan", PLANS)
def test_slurm_queues_the_job_again_after_the_exit_codes(plan, fake, tmp_path):
    codes, starts, _ = PLANS[plan]
    ended = schedulers.sbatch(
        SBATCH, NPU16, tmp_path, lambda start: fake | LOOPBACK | {"PLAN": codes, "START": str(start)}
    )
    assert len(ended) == starts
    assert ended[-1] == max(map(int, codes.split()[-1].split(",")))


def test_slurm_ends_a_job_that_has_too_many_faults_but_not_one_that_is_stopped_often(fake, tmp_path):
    told = fake | LOOPBACK | {"START": "0"}
    assert len(schedulers.sbatch(SBATCH, NPU16, tmp_path, lambda start: told | {"PLAN": "1,1"}, before=18)) == 2
    stopped = ["75,75", "75,75", "0,0"]
    assert (
        len(schedulers.sbatch(SBATCH, NPU16, tmp_path, lambda start: told | {"PLAN": stopped[start]}, before=18)) == 3
    )


def real(fault: dict | None) -> dict[str, str]:
    """The environment of a start of the real program, on a free port."""
    place = LOOPBACK | {"MASTER_PORT": str(free_port())}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    faults = {"PYTHONPATH": str(miniature.FAULTS), "FAULTS": json.dumps([fault] if fault else [])}
    return {**os.environ, **place, **faults, "PATH": path, "OMP_NUM_THREADS": "1"}


def test_a_job_at_its_time_limit_goes_on_in_its_next_start(tmp_path, two_ranks):
    stopped = {"at": "step", "n": 6, "do": "SIGTERM", "rank": 1}
    words = miniature.words(tmp_path / "run", "cpu2")
    codes = schedulers.sbatch(SBATCH, words, tmp_path, lambda start: real(None if start else stopped))
    assert codes == [75, 0]
    miniature.assert_same_run(tmp_path / "run", two_ranks)


@pytest.mark.slow
def test_pods_of_an_ascend_job_come_back_after_a_fault(tmp_path, two_ranks):
    killed = {"at": "step", "n": 6, "do": "SIGKILL", "rank": 1}
    words = ["launch/npu_pod.sh", "--retry_code=138", *miniature.words(tmp_path / "run", "cpu2")]
    seen = []

    def run(start: int) -> list[int]:
        env = real(None if start else killed)
        job = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        nodes = [
            subprocess.Popen(words, cwd=LAUNCH.parent, env=env | job | {"RANK": str(i)}, start_new_session=True)
            for i in (0, 1)
        ]
        seen.append([node.wait(150) for node in nodes])
        return seen[-1]

    assert schedulers.exit_code_policy(JOBS["ascendjob_npu.yaml"], run) == ("Succeeded", 2)
    assert set(seen[0]) <= {137, 138}
    miniature.assert_same_run(tmp_path / "run", two_ranks)
