"""The NPU code on a stand-in device, whose results equal the CPU's bit for bit and which refuses what NPUs refuse."""

from __future__ import annotations

import json
import os
from pathlib import Path

import miniature
import npu_standin
import pytest
import torch
from npu_standin import on_npu

pytestmark = pytest.mark.skipif(npu_standin.available() is not None, reason=str(npu_standin.available()))


def environment(devices: int = 2, soc: str = "Ascend910B2") -> dict[str, str]:
    """The variables of a program that has NPUs, and the faults of `miniature`."""
    made = npu_standin.environment(devices, soc)
    made["PYTHONPATH"] = os.pathsep.join([str(npu_standin.SITE), str(miniature.FAULTS)])
    return {name: value for name, value in made.items() if "NPU_STANDIN" in name or name == "PYTHONPATH"}


def words(workdir: Path, arg: str, **fields: object) -> list[str]:
    return miniature.words(workdir, f"{arg},digits", **{"precision": "float32", **fields})


def run(workdir: Path, arg: str, *faults: dict, devices: int = 2, soc: str = "Ascend910B2", **fields: object):
    return miniature.run(words(workdir, arg, **fields), *faults, env=environment(devices, soc))


@pytest.mark.parametrize("count", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_run_equals_the_cpus_bit_for_bit(count, tmp_path):
    """Training with EMA, evaluation, records and checkpoints of the whole program, with the plain kernels on both."""
    reference = miniature.run(words(tmp_path / "cpu", f"cpu{count}", ema=0.9, kernels="plain"))
    ended = run(tmp_path / "npu", f"npu{count}", ema=0.9, kernels="plain")
    assert reference.code == ended.code == 0, ended.err
    assert f"{count} x npu (Ascend910B2)" in ended.out
    miniature.assert_same_run(tmp_path / "npu", tmp_path / "cpu")


def test_resumed_run_ends_bit_identical_and_is_evaluated(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(whole, "npu1", precision="bfloat16").code == 0
    assert run(parts, "npu1", {"at": "step", "n": 5, "do": "SIGTERM"}, precision="bfloat16").code == 75
    assert run(parts, "npu1", precision="bfloat16").code == 0
    miniature.assert_same_run(parts, whole)
    ended = miniature.run([*words(parts, "npu2"), "--mode=eval", "--config.precision=bfloat16"], env=environment())
    assert ended.code == 0, ended.err
    trained, evaluated = (json.loads((parts / name).read_text()) for name in ("result.json", "result-eval.json"))
    assert evaluated["acc1"] == trained["acc1"]
    assert evaluated["loss"] == pytest.approx(trained["loss"], rel=1e-6)  # summed over two processes


@pytest.mark.parametrize(
    ("arg", "soc", "fields", "message"),
    [
        ("npu3", "Ascend910B2", {}, "config.processes: 3 NPUs are asked for on this host and it has 2: use :npu2"),
        (
            "npu1",
            "Ascend910A",
            {"precision": "bfloat16"},
            "config.precision: bfloat16: Ascend910A has none: use float16",
        ),
        (
            "npu1",
            "Ascend910B2",
            {"precision": "float64"},
            "config.precision: float64 has no kernels on NPUs: use bfloat16",
        ),
    ],
)
def test_unsupported_requests_are_one_line_errors(arg, soc, fields, message, tmp_path):
    ended = run(tmp_path, arg, soc=soc, **fields)
    assert ended.code == 2 and message in ended.error


def test_run_in_float16_on_a_saturating_device(tmp_path):
    """The 910A gets float16 by default, as in the Ascend port; its loss scale starts at 2 ** 15."""
    ended = run(tmp_path, "npu1", soc="Ascend910A", precision="auto", max_skipped=30)
    assert ended.code == 0 and "compute=float16" in ended.out, ended.err
    tensors = miniature.newest(tmp_path).tensors
    assert tensors["scale/factor"].dtype == torch.float32 and torch.isfinite(tensors["params/head.weight"]).all()


# ---- in a process that has NPUs


def bound_npu(index: int = 0):
    from pcpvt import devices

    device = devices.get("npu")
    device.require(1)
    device.bind(index)
    return device


def state_after_steps(device, value_and_grad=None) -> dict[str, torch.Tensor]:
    """The state after three steps in float32 with every random draw that a recipe can have."""
    from test_compile import recipe_batches
    from test_step import nano_state

    from pcpvt.functional import optim, schedules, state
    from pcpvt.functional.objective import make_objective
    from pcpvt.functional.step import autograd_value_and_grad, make_step

    model, params = nano_state(torch.float32)
    groups = optim.groups(params, 0.05)
    params = optim.lay_out(params, groups).to(device.torch)
    adamw = optim.adamw(
        schedules.constant(1e-3),
        groups,
        honors_found_inf=device.fused_adamw_honors_found_inf,
    )
    optimizer = optim.chain(optim.clip_by_global_norm(1.0), adamw)
    step = make_step(
        make_objective(
            model, smoothing=0.1, kernels=device.plain_kernels()._replace(attend=device.attend(torch.float32))
        ),
        optimizer,
        global_batch=8,
        grad_accum_steps=2,
        ema_decay=0.9,
        value_and_grad=value_and_grad or autograd_value_and_grad,
    )
    ts = state.create(params, optimizer.init(params), {}, ema=True, device=device.torch)
    for batch in device.prefetch(recipe_batches(model, 3, 8)):
        assert all(value.device == device.torch for value in batch.values())
        ts, _ = step(ts, batch)
    return {name: value.cpu() for name, value in state.flatten(ts).items()}


@pytest.mark.slow  # the whole program: test_run_equals_the_cpus_bit_for_bit
@on_npu()
def test_steps_equal_the_cpus_bit_for_bit():
    from pcpvt import devices
    from pcpvt.devices.compile import value_and_grad
    from pcpvt.functional.step import functional_value_and_grad

    torch.set_num_threads(1)
    npu, cpu = bound_npu(), devices.get("cpu")

    def differing(a, b) -> list[str]:
        return [name for name in a if not torch.equal(a[name], b[name])]

    assert differing(state_after_steps(cpu), state_after_steps(npu)) == []
    expected = state_after_steps(cpu, functional_value_and_grad)
    assert differing(expected, state_after_steps(npu, functional_value_and_grad)) == []
    assert differing(expected, state_after_steps(npu, value_and_grad(npu, "npugraphs"))) == []


@on_npu()
def test_inductor_without_its_compiler_is_an_error_when_named():
    from test_step import nano_state

    from pcpvt.devices.compile import compiled_blocks
    from pcpvt.errors import UserError
    from pcpvt.functional.objective import make_predict
    from pcpvt.models.layers import PLAIN

    device = bound_npu()
    assert compiled_blocks(PLAIN, device, "auto") is PLAIN  # eager by default
    model, params = nano_state(torch.float32)
    predict = make_predict(model, kernels=compiled_blocks(PLAIN, device, "inductor"))
    params = {name: value.to(device.torch) for name, value in params.items()}
    with pytest.raises(UserError, match="'inductor' cannot compile here") as error:
        predict(params, torch.zeros(1, 32, 32, 3, dtype=torch.uint8, device=device.torch))
    assert "\n" not in str(error.value)


@on_npu()
def test_npu_device():
    device = bound_npu()
    assert device.describe() == "Ascend910B2" and device.precision() == "bfloat16"
    assert device.overflow(torch.float16) is None  # the 910B has inf and nan
    kept = torch.ones(1 << 20, device=device.torch)
    used, total = device.memory_stats()
    assert kept.nbytes <= used < total
    device.synchronize()
    batches = [{"image": torch.full((2,), i)} for i in range(3)]
    moved = list(device.prefetch(batches))
    assert [batch["image"].tolist() for batch in moved] == [[0, 0], [1, 1], [2, 2]]


def overflowing_fp16(device, watched: bool):
    """A good step and one whose gradient overflows float16; returns (skipped, scale, whether parameters changed).

    `watched`: whether the step reads the device's overflow flag.
    """
    from test_step import batches, nano_state

    from pcpvt.functional import optim, precision, schedules, state
    from pcpvt.functional.objective import make_objective
    from pcpvt.functional.step import make_step

    policy = precision.parse(device.precision())
    assert policy.compute == torch.float16
    model, params = nano_state(torch.float32)
    objective = make_objective(model, policy=policy, kernels=device.kernels(policy.compute))
    groups = optim.groups(params, 0.05)
    params = optim.lay_out(params, groups).to(device.torch)
    adamw = optim.adamw(
        schedules.constant(1e-3),
        groups,
        honors_found_inf=device.fused_adamw_honors_found_inf,
    )
    gradient = {"factor": 1.0}
    scaler = precision.DynamicScale(initial=2.0**10)
    step = make_step(
        lambda p, b, f: objective(p, b, f * gradient["factor"]),
        optim.chain(adamw),
        global_batch=4,
        policy=policy,
        scaler=scaler,
        overflow=device.overflow(policy.compute) if watched else None,
    )
    ts = state.create(params, adamw.init(params), scaler.init(device.torch), ema=False, device=device.torch)
    batch = {name: value.to(device.torch) for name, value in batches(1, 32, 4)[0].items()}
    ts, metrics = step(ts, batch)
    assert metrics["skipped"].item() == 0
    before, gradient["factor"] = ts.params["head.weight"].cpu(), 1e6
    ts, metrics = step(ts, batch)
    assert torch.isfinite(metrics["grad_norm"].cpu())  # a test for inf and nan does not detect the overflow
    changed = not torch.equal(before, ts.params["head.weight"].cpu())
    return metrics["skipped"].item(), ts.scale["factor"].item(), changed


@on_npu(soc="Ascend910A")
def test_saturated_gradients_are_skipped():
    device = bound_npu()
    assert overflowing_fp16(device, watched=True) == (1, 2.0**9, False)
    assert overflowing_fp16(device, watched=False) == (0, 2.0**10, True)


@on_npu()
def test_api_computes_the_exact_model_on_an_npu():
    """With F.gelu, the tanh form on this device, logits would differ."""
    from test_step import batches, nano_state

    from pcpvt import api

    device = bound_npu()
    model, params = nano_state(torch.float32)
    image = batches(1, 32, 4)[0]["image"]
    there = {name: value.to(device.torch) for name, value in params.items()}
    assert torch.equal(api.logits(model, there, image.to(device.torch)).cpu(), api.logits(model, params, image))


@pytest.mark.parametrize("bit", [pytest.param(None, marks=pytest.mark.slow), 30])
def test_audits_compare_within_a_tolerance_and_times_are_of_the_device(bit, tmp_path):
    """The highest bit of an exponent is found; a change that is less than the tolerance is not, as rounding is not."""
    faults = [] if bit is None else [{"at": "bit of a gradient", "n": 2, "bit": bit, "rank": 1}]
    ended = run(tmp_path, "npu2", *faults, audit_every=2, eval_every="0", steps=6, precision="bfloat16")
    assert ended.code == 0 and "compared within 0.03 of its norm" in ended.out, ended.err
    assert ("audit of step 2: rank 1 (" in ended.err) == bool(faults) and ended.err.count("audit of") == len(faults)
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["slowness"] >= 1 and 0 < last["slowest_waiting"] < 1
