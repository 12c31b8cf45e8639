"""The Python part of the stand-in, under the package name and with the function names of the real torch_npu."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

__version__ = "2.13.0+standin"

torch.ops.load_library(os.environ["PCPVT_NPU_STANDIN"])
torch.utils.rename_privateuse1_backend("npu")
# An engine thread of this device that frees the last Python object while the interpreter exits aborts the process.
torch._C._set_multithreading_enabled(False)

from torch_npu import npu  # noqa: E402

torch._register_device_module("npu", npu)
torch.utils.generate_methods_for_privateuse1_backend(for_tensor=True, for_module=True)

# Printing formats numbers in float64, which this device refuses: format a copy on the host.
_format = torch._tensor_str._tensor_str
torch._tensor_str._tensor_str = lambda t, indent: _format(t.cpu() if t.device.type == "npu" else t, indent)


def _autoload() -> None:
    """Called by `import torch`; importing this module has registered everything already."""


def _capture_only(module, inputs, **options):
    """A dynamo backend that captures graphs as torch_npu's backends do, and does not optimize them."""
    from torch._dynamo.backends.debugging import aot_eager

    return aot_eager(module, inputs)


def npu_fusion_attention(query, key, value, head_num, input_layout, *, scale=1.0, keep_prob=1.0):
    """Softmax attention without mask and dropout; returns 7 values as in the wheel, the first is the output."""
    if npu.SATURATES:
        raise RuntimeError("npu stand-in: npu_fusion_attention is not supported on Ascend910A")
    if input_layout not in ("BNSD", "BSND") or keep_prob != 1.0:
        raise NotImplementedError("npu stand-in: npu_fusion_attention has layouts BNSD and BSND, without dropout")
    if input_layout == "BSND":
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))
    if query.shape[1] != head_num:
        raise RuntimeError(f"npu stand-in: head_num {head_num} does not fit query {tuple(query.shape)}")
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, log_sum = attend(query, key, value, 0.0, False, attn_mask=None, scale=scale)
    out = out.transpose(1, 2) if input_layout == "BSND" else out
    return out, log_sum, log_sum, out.new_empty(0), 0, 0, 0


def npu_gelu(input, *, approximate="none"):
    """GELU, exact unless `approximate` is "tanh". `F.gelu` is the tanh form on this device: see standin.cpp."""
    return torch.ops.aten.gelu(input, approximate={"none": "tanh", "tanh": "none"}[approximate])


def npu_get_float_status(input, mode=0):
    """float32 `[8]`, whose first element is not 0 after an overflow."""
    return torch.full_like(input, float(torch.ops.npu_standin.overflow()))


def npu_clear_float_status(input, mode=0):
    status = npu_get_float_status(input)
    torch.ops.npu_standin.set_overflow(False)
    return status


def _hccl(options, backend_options=None):
    gloo = dist.ProcessGroupGloo(options.store, options.group_rank, options.group_size, timeout=options.timeout)
    group = dist.ProcessGroup(options.store, options.group_rank, options.group_size)
    group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, gloo)
    torch.ops.npu_standin.add_hccl(group.boxed())
    return group._get_backend(torch.device("npu"))


dist.Backend.register_backend("hccl", _hccl, extended_api=True, devices=["npu"])
dist.is_hccl_available = lambda: True
