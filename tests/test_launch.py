"""The launch scripts without processes: values from each scheduler, variables that are kept, and errors.

A fake `python` prints what would be started; tests/test_launch_real.py starts real processes.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parent.parent / "launch"
POD2 = "npu_pod.sh --config=c.py:npu16 --nnodes=2 --node_rank=1 --master_addr=127.0.0.1"
CPU2 = "cpu.sh --nproc=2"

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which("bash"), reason="the launch scripts need bash on Linux"
)

# Prints its arguments and the relevant variables, then exits with FAKE_EXIT.
FAKE_PYTHON = """#!/usr/bin/env bash
echo "$*"; env | grep -E '^(HCCL|GLOO|OMP|CPU_AFF|TASK|PET_|PCPVT_|FROM_CANN|MALLOC|LD_PRELOAD)' | sort
exit "${FAKE_EXIT:-0}"
"""


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def fake(tmp_path: Path) -> dict[str, str]:
    """A clean environment with the fake `python` and with CANN."""
    executable(tmp_path / "bin/python", FAKE_PYTHON)
    cann = tmp_path / "set_env.sh"
    cann.write_text('export FROM_CANN="$((1 + 1))$NOT_SET_ANYWHERE"\n')
    path = f"{tmp_path / 'bin'}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    return {"PATH": path, "HOME": str(tmp_path), "CANN_SET_ENV": str(cann)}


def launch(line: str, env: dict[str, str], *more: str) -> subprocess.CompletedProcess[str]:
    """Runs a line of the form `NAME=value ... script argument ...` with `more` arguments."""
    words = shlex.split(line)
    variables = dict(word.split("=", 1) for word in words if re.match("[A-Z][A-Za-z_]*=", word))
    script, *args = words[len(variables) :]
    return subprocess.run(
        [str(LAUNCH / script), *args, *more], env=env | variables, capture_output=True, text=True, timeout=60
    )


def dry_run(line: str, env: dict[str, str]) -> tuple[dict[str, str], list[str]]:
    """The exported variables and the command that `--dry_run` prints."""
    run = launch(line, env, "--dry_run")
    assert run.returncode == 0, run.stderr
    lines = [shlex.split(line) for line in run.stdout.splitlines()]
    exports = dict(words[1].split("=", 1) for words in lines if words[0] == "export")
    assert list(exports) == sorted(exports)
    assert lines[-1][0] == "exec"
    return exports, lines[-1][1:]


def settings(exports: dict[str, str], *names: str) -> list[str]:
    """Exported variables of torchrun's options; empty where one is not exported."""
    return [exports.get(f"PET_{name}", "") for name in names]


# Each is rank 1 of 2. srun --mpi=pmi2 sets PMI_* besides SLURM_*; under OpenMPI, SLURM_* describes mpirun itself.
OPENMPI = "OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_LOCAL_SIZE=1 SLURM_NODEID=0"
SLURM = "SLURM_JOB_ID=4321 SLURM_NNODES=2 SLURM_NODEID=1 SLURM_JOB_NODELIST=n[003-004] PMI_SIZE=9 PMI_RANK=8"
SCHEDULERS = {
    "arguments": ("npu_pod.sh --nnodes=2 --node_rank 1 --master_addr=h0 --master_port=1234", "h0:1234"),
    "environment": ("MASTER_ADDR=h0 MASTER_PORT=77 npu_pod.sh --nnodes=2 --node_rank=1", "h0:77"),
    "slurm": (f"{SLURM} npu_pod.sh", "n003:29821"),
    "volcano": ("VC_TASK_INDEX=1 VC_WORKER_NUM=2 VC_WORKER_HOSTS=j-0.j,j-1.j npu_pod.sh", "j-0.j:29500"),
    "indexed job": ("JOB_COMPLETION_INDEX=1 npu_pod.sh --nnodes=2 --master_addr=svc", "svc:29500"),
    "openmpi": (
        f"{OPENMPI} OMPI_MCA_orte_hnp_uri='7.0;tcp://10.9.0.1,10.8.0.1:3' npu_pod.sh",
        "10.9.0.1:29500",
    ),
    "pytorch job": (
        "PET_NNODES=2 PET_NODE_RANK=1 PET_NPROC_PER_NODE=8 PET_MASTER_ADDR=h0 PET_MASTER_PORT=23456 RANK=1 "
        "WORLD_SIZE=16 npu_pod.sh",
        "h0:23456",
    ),
    "ascend job": (
        "RANK=1 WORLD_SIZE=16 LOCAL_WORLD_SIZE=8 LOCAL_RANK=0,1,2,3,4,5,6,7 MASTER_ADDR=h0 MASTER_PORT=2222 npu_pod.sh",
        "h0:2222",
    ),
    "hydra": ("PMI_SIZE=2 PMI_RANK=1 MPI_LOCALNRANKS=1 MASTER_ADDR=h0 npu_pod.sh", "h0:29500"),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_node_count_rank_and_master_of_each_scheduler(name: str, fake: dict[str, str]) -> None:
    line, endpoint = SCHEDULERS[name]
    exports, command = dry_run(f"{line} --config=c.py:npu16 '--workdir=a b'", fake)
    assert command == ["python", "-m", "pcpvt.main", "--config=c.py:npu16", "--workdir=a b"]
    assert settings(exports, "NNODES", "NODE_RANK", "NPROC_PER_NODE", "RDZV_ENDPOINT") == ["2", "1", "8", endpoint]


def test_arguments_override_the_scheduler(fake: dict[str, str]) -> None:
    args = "--nnodes=4 --node_rank=0 --master_addr=z --nproc_per_node=4 --config=c.py:npu16"
    exports, _ = dry_run(f"{SLURM} npu_pod.sh {args}", fake)
    assert settings(exports, "NNODES", "NODE_RANK", "NPROC_PER_NODE", "RDZV_ENDPOINT") == ["4", "0", "4", "z:29821"]


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n3,b", "n3"), ("n[03-10,12]", "n03"), ("n[03,7],z", "n03"), ("r[1-2]n[3-4],z", "r1n3")],
)
def test_first_host_of_a_slurm_node_list(nodes: str, first: str, fake: dict[str, str]) -> None:
    exports, _ = dry_run(f"SLURM_NNODES=2 SLURM_NODEID=0 SLURM_JOB_NODELIST={nodes} npu_pod.sh --config=c:npu2", fake)
    assert settings(exports, "RDZV_ENDPOINT") == [f"{first}:29500"]


def test_without_a_scheduler_there_is_one_node(fake: dict[str, str]) -> None:
    exports, command = dry_run("npu_pod.sh --config c.py:npu8,perf", fake)
    assert settings(exports, "NNODES", "NPROC_PER_NODE", "RDZV_ENDPOINT") == ["1", "8", ""]
    assert command[:3] == ["python", "-m", "pcpvt.main"]


def test_process_count_is_the_number_of_visible_cards(fake: dict[str, str]) -> None:
    exports, _ = dry_run("ASCEND_RT_VISIBLE_DEVICES=1,3,10 npu_pod.sh", fake)
    assert settings(exports, "NPROC_PER_NODE") == ["3"]


@pytest.mark.parametrize("line", [POD2, CPU2])
def test_variables_already_set_are_kept(line: str, fake: dict[str, str]) -> None:
    exports = dry_run(f"LD_PRELOAD=/none/libtcmalloc.so {line}", fake)[0]
    decided = {name: value for name, value in exports.items() if name.startswith(("PET_", "PCPVT_"))}
    already_set = {name: f"value{i}" for i, name in enumerate(exports) if name not in decided}
    assert already_set
    assert dry_run(f"LD_PRELOAD=/none/libtcmalloc.so {line}", fake | already_set)[0] == already_set | decided


def test_network_interface_on_the_route_to_the_master_is_used(tmp_path: Path, fake: dict[str, str]) -> None:
    executable(tmp_path / "bin/getent", "#!/bin/sh\necho '10.0.0.1 STREAM h0'\n")
    route = "10.0.0.1 via 10.0.1.1 dev bond0 src 10.0.1.7 uid 0 \\ cache"
    executable(tmp_path / "bin/ip", f"#!/bin/sh\n[ \"$3\" = addr ] || echo '{route}'\n")
    line = "npu_pod.sh --nnodes=2 --node_rank=1 --master_addr=h0 --config=c.py:npu2"
    exports, _ = dry_run(line, fake)
    assert (exports["GLOO_SOCKET_IFNAME"], exports["HCCL_IF_IP"]) == ("bond0", "10.0.1.7")
    assert settings(exports, "LOCAL_ADDR") == ["10.0.1.7"]
    assert "HCCL_IF_IP" not in dry_run(f"HCCL_SOCKET_IFNAME=eth1 {line}", fake)[0]


@pytest.mark.parametrize("line", [f"{POD2} '--workdir=a b'", f"{CPU2} '--workdir=a b'"])
def test_dry_run_is_repeatable_and_prints_what_a_run_executes(line: str, fake: dict[str, str]) -> None:
    printed = launch(line, fake, "--dry_run").stdout
    assert launch(line, fake, "--dry_run").stdout == printed
    replayed = subprocess.run(["bash", "-c", printed], env=fake, capture_output=True, text=True)
    real = launch(line, fake)
    assert real.stdout == replayed.stdout and "PET_NNODES=" in real.stdout
    assert replayed.returncode == real.returncode == 0


@pytest.mark.parametrize("line", [POD2, CPU2, "cpu.sh"])
def test_exit_status_is_that_of_the_command(line: str, fake: dict[str, str]) -> None:
    assert launch(f"FAKE_EXIT=37 {line}", fake).returncode == 37


@pytest.mark.parametrize("line", [POD2, CPU2, "cpu.sh"])
def test_script_is_replaced_by_its_command_so_that_signals_reach_it(
    line: str, tmp_path: Path, fake: dict[str, str]
) -> None:
    executable(tmp_path / "bin/python", "#!/bin/sh\necho $$\n")
    script, *args = shlex.split(line)
    with subprocess.Popen([str(LAUNCH / script), *args], env=fake, stdout=subprocess.PIPE, text=True) as process:
        assert process.communicate(timeout=60)[0] == f"{process.pid}\n"


@pytest.mark.parametrize("how", ["CANN_SET_ENV", "ASCEND_HOME_PATH", "install info"])
def test_cann_is_found_and_sourced(how: str, tmp_path: Path, fake: dict[str, str]) -> None:
    toolkit = tmp_path / "opt/ascend-toolkit"
    toolkit.mkdir(parents=True)
    shutil.move(fake.pop("CANN_SET_ENV"), toolkit / "set_env.sh")
    if how == "install info":
        (tmp_path / "Ascend").mkdir()
        (tmp_path / "Ascend/ascend_cann_install.info").write_text(f"Install_Path={tmp_path / 'opt'}\n")
    else:
        fake[how] = str(toolkit / {"CANN_SET_ENV": "set_env.sh", "ASCEND_HOME_PATH": "latest"}[how])
    run = launch(POD2, fake)
    assert run.returncode == 0 and "FROM_CANN=2" in run.stdout, run.stderr


def test_missing_cann_is_a_one_line_error_for_npu_only(fake: dict[str, str]) -> None:
    fake["CANN_SET_ENV"] = "/nowhere/set_env.sh"
    run = launch(POD2, fake)
    assert (run.returncode, run.stdout, run.stderr.count("\n")) == (2, "", 1)
    assert "CANN: /nowhere/set_env.sh not found" in run.stderr
    on_cpu = launch(POD2.replace("npu16", "cpu4"), fake)
    assert on_cpu.returncode == 0 and "HCCL" not in on_cpu.stdout


POD = "npu_pod.sh --config=c:npu16"
MPI = "OMPI_COMM_WORLD_SIZE=16 OMPI_COMM_WORLD_RANK=3 OMPI_COMM_WORLD_LOCAL_SIZE=8"
ERRORS = [
    ("npu_pod.sh", "--nproc_per_node: no NPU seen here"),
    (f"{POD} --nnodes", "--nnodes: no value"),
    (f"{POD} --nnode=2", "--nnode=2: no such option"),
    ("cpu.sh --nprocs=2", "--nprocs=2: no such option"),
    (f"{POD} --nnodes=two", "--nnodes: two"),
    (f"{POD} --nnodes=2", "--node_rank: not given"),
    (f"{POD} --nnodes=2 --node_rank=2", "--node_rank: 2: give 0 to 1"),
    (f"{POD} --nnodes=2 --node_rank=0", "--master_addr: not given"),
    (f"{POD} --master_port=60007", "--master_port: 60007: HCCL uses"),
    (POD2.replace("npu16", "npu15"), "npu15: does not divide over 2 nodes"),
    (f"{POD2} --nproc_per_node=4", "npu16: 2 nodes of 4 are 8"),
    (f"{POD} --config.processes=0", "npu: 0: give 1 to"),
    ("ASCEND_RT_VISIBLE_DEVICES=3,1 npu_pod.sh --config=c:npu2", "3,1: list the cards in ascending order"),
    ("ASCEND_RT_VISIBLE_DEVICES=1,3 npu_pod.sh --config=c:npu3", "3: this node shows 2 cards"),
    (f"{MPI} {POD}", "OpenMPI: 8 tasks on this node"),
    (f"VC_TASK_INDEX=0 VC_A_HOSTS=a VC_B_HOSTS=b {POD}", "Volcano: 2 tasks with hosts"),
    (f"JOB_COMPLETION_INDEX=0 {POD}", "--nnodes: not given"),
    ("cpu.sh --nproc=0", "--nproc: '0'"),
    ("cpu.sh --nproc=2 --config=c:cpu4", "--nproc: 2: --config says cpu4"),
    ("cpu.sh --config=c:npu4", "--config: npu: this launcher is for cpu"),
]


@pytest.mark.skipif(Path("/dev/davinci0").exists(), reason="expects the errors of a host without NPUs")
@pytest.mark.parametrize(("line", "message"), ERRORS)
def test_wrong_arguments_give_one_line_and_status_2(line: str, message: str, fake: dict[str, str]) -> None:
    run = launch(line, fake)
    assert (run.returncode, run.stdout, run.stderr.count("\n")) == (2, "", 1)
    assert re.match(r"(npu_pod|cpu)\.sh: ", run.stderr) and message in run.stderr


def test_allocator_is_preloaded_first(tmp_path: Path, fake: dict[str, str]) -> None:
    library = executable(tmp_path / "env/lib/libtcmalloc_minimal.so.4", "")
    line = f"VIRTUAL_ENV={tmp_path / 'env'} LD_PRELOAD=%s cpu.sh"
    assert dry_run(line % "/none/libother.so", fake)[0]["LD_PRELOAD"] == f"{library}:/none/libother.so"
    exports = dry_run(line % "/none/libjemalloc.so", fake)[0]
    assert "LD_PRELOAD" not in exports and "MALLOC_CONF" in exports


def test_processes_get_physical_cores_of_one_numa_node(tmp_path: Path, fake: dict[str, str]) -> None:
    # 2 sockets of 2 cores of 2 threads; sibling threads are adjacent, nodes interleaved; CPU 7 is not allowed.
    rows = "\\n".join(f"{cpu // 2 % 2},{cpu // 2 % 2},{cpu // 2},{cpu}" for cpu in range(8))
    executable(tmp_path / "bin/lscpu", f"#!/bin/sh\nprintf '# NODE,SOCKET,CORE,CPU\\n{rows}\\n'\n")
    only_0_to_6 = 'case "$1" in /^Cpus*) echo 0-6 ;; *) exec {} "$@" ;; esac'.format(shutil.which("awk"))
    executable(tmp_path / "bin/awk", f"#!/bin/sh\n{only_0_to_6}\n")
    exports, _ = dry_run(CPU2, fake)
    assert exports["PCPVT_CORES"] == "0,4 2,6"
    assert exports["OMP_NUM_THREADS"] == "2"


def test_shellcheck_finds_nothing() -> None:
    environment_bin = str(Path(sys.executable).parent)
    shellcheck = shutil.which("shellcheck") or shutil.which("shellcheck", path=environment_bin)
    if not shellcheck:
        pytest.skip("shellcheck is not installed")
    scripts = [str(path) for path in sorted(LAUNCH.iterdir()) if path.suffix in (".sh", ".sbatch")]
    assert len(scripts) == 3
    run = subprocess.run([shellcheck, *scripts], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout


def test_dockerfile_copies_what_exists_and_its_image_is_the_manifests() -> None:
    text = (LAUNCH / "npu.Dockerfile").read_text()
    copied = [name for line in re.findall(r"^COPY (.+)$", text, re.M) for name in line.split()[:-1]]
    assert {"pcpvt", "configs", "launch", "setup.cfg"} <= set(copied)
    assert [name for name in copied if not (LAUNCH.parent / name).exists()] == []
    entry = re.search(r'^ENTRYPOINT \["(.+)"\]$', text, re.M)
    assert entry and (LAUNCH.parent / entry[1]).exists() and "WORKDIR /opt/pcpvt" in text
    assert " -t pcpvt-npu ." in text and "image: pcpvt-npu" in (LAUNCH / "volcano_npu.yaml").read_text()
