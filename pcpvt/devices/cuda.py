"""CUDA GPUs."""

import torch

from pcpvt.devices.base import Device
from pcpvt.errors import UserError


class Cuda(Device):
    name = "cuda"
    backend = "cpu:gloo,cuda:nccl"
    pins_memory = True
    default_compile = "inductor"

    def require(self, count: int) -> None:
        if not torch.cuda.is_available():
            raise UserError(
                "config.device: 'cuda' but this PyTorch sees no GPU: use :cpu, or install a CUDA build and driver"
            )
        if (have := torch.cuda.device_count()) < count:
            raise UserError(
                f"config.processes: {count} GPUs are asked for on this host and it has {have}: use :cuda{have}"
            )

    def bind(self, index: int) -> None:
        torch.cuda.set_device(index)
        torch.backends.cudnn.allow_tf32 = False  # on by default for convolutions; float32 must mean float32
        self.torch = torch.device("cuda", index)

    def precision(self) -> str:
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
