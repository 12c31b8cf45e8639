"""CUDA GPUs."""

import warnings

import torch

from pcpvt.devices import visible
from pcpvt.devices.base import Device
from pcpvt.errors import one_line


class Cuda(Device):
    name = "cuda"
    backend = "cpu:gloo,cuda:nccl"
    pins_memory = True
    default_compile = "inductor"
    recording = {  # noqa: RUF012 - constant
        **Device.recording, "TORCH_NCCL_DUMP_ON_TIMEOUT": "1", "TORCH_FR_DUMP_TEMP_FILE": "{file}",
    }  # fmt: skip

    @visible.driver_errors
    def require(self, count: int) -> None:
        with warnings.catch_warnings(record=True) as told:  # why the driver cannot be used
            warnings.simplefilter("always")
            have = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not have and told:
            raise visible.no_card("cuda", one_line(told[0].message))
        if not have:
            raise visible.no_card("cuda", "this PyTorch sees no GPU", "install a CUDA build and driver")
        if have < count:
            raise visible.too_few("cuda", count, have)

    @visible.driver_errors
    def bind(self, index: int) -> None:
        torch.cuda.set_device(index)
        torch.backends.cudnn.allow_tf32 = False  # on by default for convolutions; float32 must mean float32
        self.torch = torch.device("cuda", index)

    def recorded_collectives(self) -> dict[str, bytes]:
        from torch._C import _distributed_c10d as library

        nccl = library._dump_nccl_trace_json()  # type: ignore[attr-defined]
        return {**super().recorded_collectives(), "nccl": nccl}

    def precision(self) -> str:
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
