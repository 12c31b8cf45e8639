"""Slurm, Volcano and the operators of AscendJob and PyTorchJob, as far as they set variables and follow exit codes.

Each rule names the file that it was read from: volcano-sh/volcano ed72c7c, kubeflow/training-operator v1.9.0, Ascend's
mind-cluster (component/ascend-operator) and SchedMD/slurm 284c3b9 (doc/man/man1).
"""

from __future__ import annotations

import math
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

Run = Callable[[int], "list[int]"]  # from the number of a start, from 0, to the exit code of each pod

FAILED, EVICTED, COMPLETED = "PodFailed", "PodEvicted", "TaskCompleted"
CARDS = "huawei.com/Ascend910"


# ---- Volcano: pkg/controllers/job, pkg/webhooks/admission/jobs/validate/util.go


def volcano_environments(job: dict) -> list[dict[str, str]]:
    """What the plugins env and svc set in each pod."""
    (task,) = job["spec"]["tasks"]
    assert {"env", "svc"} <= set(job["spec"]["plugins"])
    hosts = [f"pcpvt-x-{task['name']}-{i}.pcpvt-x" for i in range(task["replicas"])]
    return [
        {"VC_TASK_INDEX": str(i), f"VC_{task['name'].upper()}_HOSTS": ",".join(hosts)} for i in range(task["replicas"])
    ]


def volcano_admits(policies: list[dict]) -> bool:
    """Whether the admission controller takes the policies (validatePolicies)."""
    events = [event for policy in policies for event in [*policy.get("events", []), policy.get("event")] if event]
    codes = [policy["exitCode"] for policy in policies if "exitCode" in policy]
    alone = all(("exitCode" in policy) != bool(policy.get("event") or policy.get("events")) for policy in policies)
    known = {"*", FAILED, EVICTED, "PodPending", "Unknown", COMPLETED, "TaskFailed", "JobUpdated"}
    actions = {"AbortJob", "RestartJob", "RestartTask", "RestartPod", "TerminateJob", "CompleteJob", "ResumeJob"}
    unique = len(set(events)) == len(events) and len(set(codes)) == len(codes) and 0 not in codes
    return alone and unique and set(events) <= known and {policy["action"] for policy in policies} <= actions


def volcano_action(policies: Iterable[dict], event: str, code: int) -> str:
    """What the job controller does about a pod's event (applyPolicies)."""
    for policy in policies:
        if event in [*policy.get("events", []), policy.get("event")] or policy.get("exitCode") == code:
            return policy["action"]
    return "SyncJob"


def volcano(job: dict, run: Run) -> tuple[str, int]:
    """The phase in which a job ends, and how often it was started (state/running.go, state/restarting.go)."""
    spec, retries = job["spec"], 0
    while True:
        codes = run(retries)
        failed = [code for code in codes if code]
        event, code = (FAILED, failed[0]) if failed else (COMPLETED, 0)
        action = volcano_action(spec["policies"], event, code)
        if action != "RestartJob":
            return {"TerminateJob": "Terminated", "CompleteJob": "Completed"}[action], retries + 1
        retries += 1
        if retries >= spec["maxRetry"]:
            return "Failed", retries


# ---- AscendJob and PyTorchJob


def ascend_environments(job: dict) -> list[dict[str, str]]:
    """What Ascend Operator sets in each pod (setPytorchEnv in env.go, localRankStr in utils.go)."""
    replicas = job["spec"]["replicaSpecs"]
    container = _container(replicas["Master"], "ascend")
    cards, nodes = container["resources"]["requests"][CARDS], sum(spec["replicas"] for spec in replicas.values())
    (port,) = (port["containerPort"] for port in container["ports"] if port["name"] == "ascendjob-port")
    return [
        {
            "MASTER_ADDR": "10.96.0.7", "MASTER_PORT": str(port), "RANK": str(i), "WORLD_SIZE": str(cards * nodes),
            "LOCAL_WORLD_SIZE": str(cards), "LOCAL_RANK": ",".join(map(str, range(cards))),
        }
        for i in range(nodes)
    ]  # fmt: skip


def pytorch_environments(job: dict) -> list[dict[str, str]]:
    """What the training operator sets in each pod (setPodEnv in pkg/controller.v1/pytorch/envvar.go)."""
    spec = job["spec"]
    nodes, each = sum(s["replicas"] for s in spec["pytorchReplicaSpecs"].values()), spec["nprocPerNode"]
    _container(spec["pytorchReplicaSpecs"]["Master"], "pytorch")
    return [
        {
            "MASTER_ADDR": "pcpvt-master-0", "PET_MASTER_ADDR": "pcpvt-master-0", "MASTER_PORT": "23456",
            "PET_MASTER_PORT": "23456", "RANK": str(i), "PET_NODE_RANK": str(i), "WORLD_SIZE": str(nodes * int(each)),
            "PET_NPROC_PER_NODE": each, "PET_NNODES": str(nodes),
        }
        for i in range(nodes)
    ]  # fmt: skip


def _container(replica: dict, name: str) -> dict:
    """The container that an operator looks for."""
    (found,) = (c for c in replica["template"]["spec"]["containers"] if c["name"] == name)
    return found


def exit_code_policy(job: dict, run: Run) -> tuple[str, int]:
    """The condition in which a job ends, and how often it was started; pods start again one by one, here together.

    IsRetryableExitCode in pkg/util/train/train_util.go; checkPodStatus in ascend-operator's pod.go calls it too.
    """
    spec = job["spec"]
    replicas = spec.get("replicaSpecs") or spec["pytorchReplicaSpecs"]
    assert all(replica["restartPolicy"] == "ExitCode" for replica in replicas.values())
    for start in range(spec["runPolicy"]["backoffLimit"] + 1):
        codes = run(start)
        if not any(codes):
            return "Succeeded", start + 1
        if any(0 < code < 128 for code in codes):
            return "Failed", start + 1
    return "Failed", start + 1


# ---- Slurm

SRUN = f"""#!{sys.executable}
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import schedulers; sys.exit(schedulers.srun(sys.argv[1:]))
"""


def srun(words: list[str]) -> int:
    """Runs a command once per node, here; returns the highest exit code (srun.1: --wait, --kill-on-bad-exit)."""
    count = next(i for i, word in enumerate(words) if not word.startswith("--"))
    options = dict(word[2:].split("=", 1) for word in words[:count])
    assert options["ntasks-per-node"] == "1"
    nodes = [
        subprocess.Popen(words[count:], env=os.environ | {"SLURM_NODEID": str(i)})
        for i in range(int(os.environ["SLURM_NNODES"]))
    ]
    deadline = None
    while any(node.poll() is None for node in nodes):
        ended = [node.returncode for node in nodes if node.poll() is not None]
        if ended and deadline is None:
            at_once = any(ended) and options["kill-on-bad-exit"] == "1"
            deadline = time.monotonic() + (0 if at_once else float(options["wait"]) or math.inf)
        if deadline is not None and time.monotonic() >= deadline:
            for node in nodes:
                node.terminate()
            deadline = float("inf")
        time.sleep(0.02)
    return max(128 - node.returncode if node.returncode < 0 else node.returncode for node in nodes)


def sbatch(
    script: Path, words: list[str], folder: Path, environment: Callable[[int], dict[str, str]], before: int = 0
) -> list[int]:
    """Runs a batch script until it is not queued again; the exit code of each start.

    Args:
        folder: for the fakes `srun` and `scontrol`, which come first on PATH.
        environment: the variables of a start, by its number from 0.
        before: starts before the first.
    """
    lines = [line.split()[1] for line in script.read_text().splitlines() if line.startswith("#SBATCH ")]
    options = dict(line.removeprefix("--").partition("=")[::2] for line in lines)
    queued = folder / "requeue"
    for name, text in (("srun", SRUN), ("scontrol", f'#!/bin/sh\necho "$*" > {shlex.quote(str(queued))}\n')):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    codes: list[int] = []
    while True:
        given = environment(len(codes))
        slurm = {"SLURM_JOB_ID": "4321", "SLURM_NNODES": options["nodes"], "PATH": f"{folder}:{given['PATH']}"}
        slurm |= {"SLURM_RESTART_COUNT": str(before + len(codes))} if before or codes else {}
        done = subprocess.run(
            ["bash", str(script), *words], env=given | slurm, cwd=script.parent.parent, capture_output=True, text=True
        )
        codes.append(done.returncode)
        if not queued.exists():
            return codes
        assert "requeue" in options and queued.read_text().split() == ["requeue", "4321"], done.stderr
        assert f"exit code {done.returncode} in start {before + len(codes)}" in done.stderr
        queued.unlink()
