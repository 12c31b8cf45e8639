"""A simulated `npu` device for tests: the CPU's kernels behind torch's PrivateUse1 device type.

    subprocess.run([sys.executable, "-m", "pcpvt.main", ...], env=npu_standin.environment(devices=2))
    PYTHONPATH=tests python -m npu_standin -m pcpvt.main --config=configs/pcpvt_s.py:npu2   (the same from a shell)
    @npu_standin.on_npu(devices=2)                                                          (for one test function)

`import torch` loads it like the real torch_npu, through the entry point of `site/torch_npu-*.dist-info` on PYTHONPATH.
It therefore exists in every child process too, whether torchelastic, spawn or a shell started it, and the program under
test needs no changes. Results equal the CPU's bit for bit.

Refused, as on the real device: tensors of two devices in one operator; float64, channels_last; under torch.func:
scaled_dot_product_attention, softmax, adaptive_avg_pool2d, one_hot, argsort; foreach and fused optimizer kernels that
torch_npu lacks (`_foreach_mul_` with a tensor, `_fused_adamw_` with a tensor lr), and what `_fused_adamw_` ignores
there (grad_scale, found_inf); set_compile_mode and allow_internal_format once tensors exist; hccl on CPU tensors.
Random numbers on the device are refused because pcpvt draws on the host. Not implemented: autocast, inductor,
torch.save of npu tensors.

`soc="Ascend910A"`: no bfloat16, no npu_fusion_attention, and float16 saturates: inf becomes 65504, nan becomes 0, and
`torch.npu.get_npu_overflow_flag()` tells. `torch.ops.npu_standin.set_overflow(True)` sets the flag.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import warm

from npu_standin import build

SITE = Path(__file__).parent / "site"


def available() -> str | None:
    """The reason why the stand-in cannot be built on this machine, or None; a test is skipped with the reason."""
    return build.available()


def environment(devices: int = 2, soc: str = "Ascend910B2") -> dict[str, str]:
    """This process's environment, changed so that Python programs started with it have `devices` NPUs of type `soc`."""
    path = os.pathsep.join([str(SITE), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {
        **os.environ,
        "PYTHONPATH": path,
        "PCPVT_NPU_STANDIN": str(build.library()),
        "PCPVT_NPU_STANDIN_DEVICES": str(devices),
        "PCPVT_NPU_STANDIN_SOC": soc,
        "PCPVT_NPU_STANDIN_910A": str(int(soc == "Ascend910A")),
    }


def on_npu(devices: int = 2, soc: str = "Ascend910B2", timeout: float = 120.0) -> Callable:
    """Decorator for a pytest function without arguments: its body runs in a new process that has NPUs."""

    def decorate(body: Callable[[], None]) -> Callable[[], None]:
        def test() -> None:
            import pytest

            if reason := available():
                pytest.skip(reason)
            folder, module = os.path.dirname(body.__code__.co_filename), body.__module__
            code = f"import sys; sys.path.insert(0, {folder!r}); import {module}; {module}.{body.__name__}.body()"
            ended = warm.run(["-c", code], environment(devices, soc), Path.cwd(), timeout)
            assert ended.returncode == 0, f"exit {ended.returncode}\n{ended.stdout[-2000:]}\n{ended.stderr[-4000:]}"

        test.__name__, test.__doc__, test.__module__ = body.__name__, body.__doc__, body.__module__
        test.body = body
        return test

    return decorate
