"""Lists the operators of the train and eval step on the wheel's npu device; exit code 1 if one falls back to the CPU.

    python tests/wheel/real_torch_npu.py --soc Ascend910B2 tests/wheel/our_step.py

The step includes everything that a recipe can have: mixing, erasing, drop path, smoothing, accumulation, clipping, EMA,
a loss scale where the device needs one, and both gradient implementations.
"""

from __future__ import annotations

import sys

import torch
from npu_trace import report, trace
from torch._C import _dispatch_has_kernel_for_dispatch_key as has_kernel
from torch._subclasses.fake_tensor import FakeTensor

from pcpvt import devices
from pcpvt.functional import metrics, optim, precision, schedules, state
from pcpvt.functional.objective import make_objective, make_predict
from pcpvt.functional.step import autograd_value_and_grad, functional_value_and_grad, make_step
from pcpvt.models import pcpvt

N, SIZE, CLASSES = 8, 64, 1000


def batch(branches: int) -> dict[str, torch.Tensor]:
    return {
        "image": torch.zeros(N, SIZE, SIZE, 3, dtype=torch.uint8, device="npu"),
        "label": torch.zeros(N, dtype=torch.int64, device="npu"),
        "lam": torch.ones(N, device="npu"),
        "box": torch.zeros(N, 4, dtype=torch.int32, device="npu"),
        "erase": torch.zeros(N, 4, dtype=torch.int32, device="npu"),
        "drop_path_scale": torch.ones(N, branches, device="npu"),
    }


def steps(device, value_and_grad) -> None:
    """One train step and one evaluation batch."""
    policy = precision.parse(device.precision())
    model = pcpvt.build("pcpvt_nano", CLASSES)
    params = {name: torch.zeros(shape, device="npu") for name, shape in pcpvt.shapes(model).items()}
    groups = optim.groups(params, 0.05)
    params = optim.lay_out(params, groups)
    adamw = optim.adamw(
        schedules.constant(1e-3),
        groups,
        honors_found_inf=device.fused_adamw_honors_found_inf,
    )
    optimizer = optim.chain(optim.clip_by_global_norm(5.0), adamw)
    scaler, kernels = precision.loss_scale(policy), device.kernels(policy.compute)
    overflow = device.overflow(policy.compute)
    if overflow is not None:  # its two operators have kernels but do not support fake tensors
        assert all(has_kernel(f"npu::npu_{verb}_float_status", "PrivateUse1") for verb in ("get", "clear"))
        overflow = precision.Overflow(lambda: None, lambda: torch.zeros((), device="npu"))
    step = make_step(
        make_objective(model, smoothing=0.1, policy=policy, kernels=kernels),
        optimizer,
        global_batch=N,
        grad_accum_steps=2,
        policy=policy,
        scaler=scaler,
        ema_decay=0.9,
        value_and_grad=value_and_grad,
        overflow=overflow,
        fp32_norms=device.fp32_norms,
    )
    ts = state.create(params, optimizer.init(params), scaler.init("npu"), ema=True, device="npu")
    inputs = batch(model.branches)
    ts, _ = step(ts._replace(step=torch.tensor(0)), inputs)  # a constant, because the host reads it
    logits = make_predict(model, policy=policy, kernels=kernels)(
        precision.cast(ts.ema, policy, device.fp32_norms), inputs["image"]
    )
    metrics.sums(logits, inputs["label"], torch.ones(N, dtype=torch.bool, device="npu"))


def main() -> int:
    device = devices.get("npu")
    device.require(1)
    device.bind(0)
    FakeTensor.tolist = lambda self: [0.0, 1.0]  # the values that the host reads once per step: no skip, divisor 1
    failed = 0
    for value_and_grad in (autograd_value_and_grad, functional_value_and_grad):
        operators = trace(lambda function=value_and_grad: steps(device, function))
        failed += sum(operator.where == "cpu" for operator in operators.values())
        print(f"{device.describe()}, {device.precision()}, {value_and_grad.__name__}\n{report(operators)}\n")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
