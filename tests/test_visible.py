"""Which cards a host shows: device files, variables that hide cards, and drivers that fail."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch

from pcpvt import devices
from pcpvt.errors import UserError

NPUS = ["/dev/davinci0", "/dev/davinci1", "/dev/davinci_manager"]
GPUS = ["/dev/nvidia0", "/dev/nvidia3", "/dev/nvidiactl", "/dev/nvidia-uvm"]
VARIABLES = ("CUDA_VISIBLE_DEVICES", "ASCEND_RT_VISIBLE_DEVICES")


@pytest.fixture
def host(monkeypatch):
    """Sets the device files and the variables of this host."""
    for name in ("WORLD_SIZE", *VARIABLES):
        monkeypatch.delenv(name, raising=False)

    def have(files: list[str], **variables: str) -> None:
        monkeypatch.setattr("glob.glob", lambda pattern: [file for file in files if file.startswith(pattern[:-1])])
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return have


@pytest.mark.parametrize(
    ("files", "cuda", "npu", "expected"),
    [
        ([], None, None, "cpu"),
        ([*NPUS, "/dev/nvidia0"], None, None, "npu2"),
        (GPUS, None, None, "cuda2"),
        (GPUS, "1", None, "cuda1"),
        (GPUS, "3", None, "cuda1"),  # in a container the files keep the host's numbers
        (GPUS, "0,1", None, "cuda2"),
        (GPUS, "0,7,1", None, "cuda1"),  # the list ends where no card has the number
        (GPUS, "GPU-8932f937,MIG-0a1b", None, "cuda2"),
        (GPUS, "", None, "cpu"),
        (GPUS, "-1", None, "cpu"),
        ([], "0,1", None, "cpu"),
        ([*NPUS, *GPUS], None, "", "cuda2"),
        ([*NPUS, *GPUS], "0", " 1 ", "npu1"),
    ],
)
def test_detection_takes_the_visible_cards(host, files, cuda, npu, expected):
    named = zip(VARIABLES, (cuda, npu), strict=True)
    host(files, **{name: value for name, value in named if value is not None})
    assert devices.detect() == expected


@pytest.mark.parametrize(
    ("files", "name", "value", "message"),
    [
        (
            GPUS,
            "CUDA_VISIBLE_DEVICES",
            "8,9",
            "'cuda' but CUDA_VISIBLE_DEVICES='8,9' names none of this host's 2 cards",
        ),
        (
            NPUS,
            "ASCEND_RT_VISIBLE_DEVICES",
            "x",
            "'npu' but ASCEND_RT_VISIBLE_DEVICES='x' names none of this host's 2 ",
        ),
    ],
)
def test_names_of_cards_that_do_not_exist_are_no_wish_for_the_cpu(host, files, name, value, message):
    host(files, **{name: value})
    with pytest.raises(UserError, match=rf"^config\.device: {message}.*: correct or unset it, or use :cpu$"):
        devices.detect()


def fake_cuda(monkeypatch, available: bool, count=lambda: 0, warning: str = "") -> None:
    def is_available() -> bool:
        if warning:
            warnings.warn(warning, stacklevel=2)
        return available

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    monkeypatch.setattr(torch.cuda, "device_count", count)


def fake_npu(monkeypatch, count) -> None:
    monkeypatch.setattr(torch, "npu", SimpleNamespace(device_count=count), raising=False)


def refused(call) -> str:
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_an_error_without_a_visible_card_says_why_and_proposes_another_device(host, monkeypatch):
    fake_cuda(monkeypatch, False)
    fake_npu(monkeypatch, lambda: 0)
    cuda, npu = devices.get("cuda"), devices.get("npu")
    host([])
    assert refused(lambda: cuda.require(1)).startswith("config.device: 'cuda' but this PyTorch sees no GPU")
    assert refused(lambda: npu.require(1)) == (
        "config.device: 'npu' but no card is found: use :cpu, or check with npu-smi info"
    )
    host([*GPUS, *NPUS], CUDA_VISIBLE_DEVICES="", ASCEND_RT_VISIBLE_DEVICES="5")
    assert refused(lambda: cuda.require(1)) == (
        "config.device: 'cuda' but CUDA_VISIBLE_DEVICES='' hides all cards: correct or unset it, or use :cpu"
    )
    assert "ASCEND_RT_VISIBLE_DEVICES='5' names none of this host's 2 cards" in refused(lambda: npu.require(1))
    for device in (cuda, npu):
        assert f":{device.name}" not in refused(lambda device=device: device.require(1))


def test_too_few_visible_cards_are_counted_and_the_variable_is_named(host, monkeypatch):
    fake_cuda(monkeypatch, True, lambda: 2)
    fake_npu(monkeypatch, lambda: 2)
    host(GPUS, CUDA_VISIBLE_DEVICES="0,1")
    assert refused(lambda: devices.get("cuda").require(8)) == (
        "config.processes: 8 GPUs are asked for on this host and it has 2 visible "
        "(CUDA_VISIBLE_DEVICES='0,1'): use :cuda2"
    )
    assert refused(lambda: devices.get("npu").require(8)) == (
        "config.processes: 8 NPUs are asked for on this host and it has 2: use :npu2, "
        "or launch/npu_pod.sh for several hosts"
    )


def test_a_driver_that_fails_is_one_line(host, monkeypatch):
    def fail(*_):
        raise RuntimeError("Unexpected error from cudaGetDeviceCount()\nError 804: forward compatibility was attempted")

    host(GPUS)
    fake_cuda(monkeypatch, True, fail)
    assert refused(lambda: devices.get("cuda").require(1)) == (
        "config.device: 'cuda': the driver says 'Unexpected error from cudaGetDeviceCount()': "
        "check with nvidia-smi, or use :cpu"
    )
    monkeypatch.setattr(torch.cuda, "set_device", fail)
    assert "the driver says 'Unexpected error" in refused(lambda: devices.get("cuda").bind(0))
    fake_npu(monkeypatch, fail)
    assert "check with npu-smi info, or use :cpu" in refused(lambda: devices.get("npu").require(1))
    fake_cuda(monkeypatch, False, warning="CUDA initialization: The NVIDIA driver on your system is too old")
    assert refused(lambda: devices.get("cuda").require(1)) == (
        "config.device: 'cuda' but CUDA initialization: The NVIDIA driver on your system is too old: "
        "use :cpu, or check with nvidia-smi"
    )


def test_the_program_says_it_in_one_line(pcpvt, tmp_path):
    words = ["--config=configs/pcpvt_s.py:cuda1", f"--workdir={tmp_path}"]
    done = pcpvt(*words, check=False, env={"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 2
    assert done.stderr == (
        "pcpvt: error: config.device: 'cuda' but CUDA_VISIBLE_DEVICES='' hides all cards: correct or unset it, or use "
        ":cpu\n"
    )
