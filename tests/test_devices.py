"""The device interface: the three implementations agree, and only the NPU module uses torch.npu."""

from __future__ import annotations

import ast
import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pcpvt import devices
from pcpvt.devices.base import Device
from pcpvt.errors import UserError
from pcpvt.models.layers import attend_plain

PACKAGE = Path(devices.__file__).parent.parent
NAMES = ("cpu", "cuda", "npu")


@pytest.mark.parametrize("name", NAMES)
def test_each_device_has_exactly_the_interface_of_the_base_class(name):
    device = devices.get(name)
    assert isinstance(device, Device) and device.name == name
    public = {attribute for attribute in dir(type(device)) if not attribute.startswith("_")}
    assert public == {attribute for attribute in dir(Device) if not attribute.startswith("_")}
    assert "gloo" in device.backend  # host numbers are summed through it
    assert device.default_compile in ("none", "inductor", "npugraphs")


def test_only_the_npu_module_touches_the_npu():
    for path in PACKAGE.rglob("*.py"):
        if path.relative_to(PACKAGE).as_posix() == "devices/npu.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            path_in_code = ast.unparse(node) if isinstance(node, ast.Attribute | ast.Name) else ""
            assert path_in_code != "torch.npu", f"{path}:{node.lineno}"
            assert path_in_code.split(".")[0] != "torch_npu", f"{path}:{node.lineno}"


def test_cpu_device():
    cpu = devices.get("cpu")
    cpu.require(64)  # processes may share cores
    cpu.bind(0)
    assert cpu.torch == torch.device("cpu") and "cores" in cpu.describe()
    used, total = cpu.memory_stats()
    assert 50e6 < used < total
    assert cpu.precision() in ("bfloat16", "float32")
    cpu.synchronize()
    batches = [{"image": torch.full((2,), i)} for i in range(3)]
    assert all(a is b for a, b in zip(cpu.prefetch(batches), batches, strict=True))


def test_micro_batch_shrinks_with_pixels_depth_and_bytes_per_number():
    class Big(Device):
        name = "cpu"

        def memory_stats(self):
            return 0, 64 << 30

    big = Big()
    at = big.micro_batch((224, 224), torch.bfloat16, 16)
    assert 256 <= at < 512  # 64 GB hold a few hundred images of Twins-PCPVT-S
    assert big.micro_batch((448, 448), torch.bfloat16, 16) == at // 4
    assert big.micro_batch((224, 224), torch.float32, 16) == at // 2
    assert big.micro_batch((224, 224), torch.bfloat16, 38) < at / 2
    assert devices.get("cpu").micro_batch((224, 224), torch.float32, 16) == 8
    assert devices.get("cpu").micro_batch((4096, 4096), torch.float32, 16) == 1


class FakeModule:
    """The stream functions of `torch.cuda`; they record their calls."""

    def __init__(self):
        self.log: list[str] = []

    def Stream(self):
        return "side"

    @contextlib.contextmanager
    def stream(self, side):
        self.log.append("copy")
        yield

    def current_stream(self):
        return self

    def wait_stream(self, side):
        self.log.append("wait")


class FakeTensor:
    """A host tensor that becomes a device tensor."""

    def __init__(self, number: int, module: FakeModule, moved: bool = False):
        self.number, self.module, self.moved = number, module, moved

    def to(self, device, non_blocking):
        assert non_blocking
        return FakeTensor(self.number, self.module, True)

    def record_stream(self, stream):
        assert self.moved and stream is self.module
        self.module.log.append("record")


@pytest.mark.parametrize("count", [0, 1, 4])
def test_prefetch_copies_the_next_batch_before_the_current_one_is_used(count):
    class Accelerator(Device):
        name, pins_memory, module = "cpu", True, FakeModule()

    device, log = Accelerator(), Accelerator.module.log
    source = ({"image": FakeTensor(i, device.module)} for i in range(count))
    for i, batch in enumerate(device.prefetch(source)):
        assert batch["image"].moved and batch["image"].number == i
        assert log.count("copy") == min(i + 2, count)  # one ahead
        assert log.count("wait") == log.count("record") == i + 1  # the stream waits before the batch is used
    assert log.count("copy") == count


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_missing_gpu_is_an_error_with_the_remedy():
    with pytest.raises(UserError, match=r"sees no GPU: use :cpu"):
        devices.get("cuda").require(1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_device():
    cuda = devices.get("cuda")
    cuda.require(1)
    with pytest.raises(UserError, match="GPUs are asked for"):
        cuda.require(1000)
    cuda.bind(0)
    kept = torch.ones(1 << 20, device=cuda.torch)
    used, total = cuda.memory_stats()
    assert kept.nbytes <= used < total and cuda.describe()
    host = [{"image": torch.full((2,), i).pin_memory()} for i in range(3)]
    assert [batch["image"].tolist() for batch in cuda.prefetch(host)] == [[0, 0], [1, 1], [2, 2]]
    q, k, v = (torch.randn(2, 2, 49, 32, device=cuda.torch) for _ in range(3))
    torch.testing.assert_close(cuda.attend(torch.float32)(q, k, v), attend_plain(q, k, v), rtol=1e-4, atol=1e-4)
    cuda.synchronize()


@pytest.mark.parametrize(("autoload", "library"), [("1", True), ("0", True), ("1", False)])
def test_a_cuda_build_beside_torch_npu_is_refused_before_torch_is_imported(tmp_path, autoload, library):
    """The torch here ends the process when it is imported, as the real pair does."""
    for name in ("torch", "torch_npu"):
        (tmp_path / name / "lib").mkdir(parents=True)
        (tmp_path / name / "__init__.py").write_text("import os; os._exit(134)")
        (tmp_path / f"{name}-2.13.0.dist-info").mkdir()
        (tmp_path / f"{name}-2.13.0.dist-info" / "METADATA").write_text(f"Name: {name}\nVersion: 2.13.0\n")
    (tmp_path / "torch" / "lib" / "libtorch_cuda.so").touch()
    if library:  # without one of its own, as the stand-in, torch_npu depends on no build
        (tmp_path / "torch_npu" / "lib" / "libtorch_npu.so").touch()
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}:{PACKAGE.parent}", "TORCH_DEVICE_BACKEND_AUTOLOAD": autoload}
    command = [sys.executable, "-m", "pcpvt.main", "--config=configs/pcpvt_s.py:npu1", f"--workdir={tmp_path}/run"]
    ended = subprocess.run(command, env=env, cwd=PACKAGE.parent, capture_output=True, text=True)
    if autoload == "0" or not library:
        assert ended.returncode == 134  # torch alone is imported
        return
    assert ended.returncode == 2 and ended.stderr.startswith("pcpvt: error: torch 2.13.0: a CUDA build"), ended.stderr
    assert "torch==2.13.0+cpu" in ended.stderr and ended.stderr.count("\n") == 1
