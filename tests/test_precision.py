"""Precision policies; norms, softmax and means accumulate in float32; loss scaling for float16."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_step import batches, nano_state

from pcpvt import devices
from pcpvt.functional import optim, precision, schedules, state
from pcpvt.functional.flat import pack
from pcpvt.functional.objective import make_objective
from pcpvt.functional.precision import DynamicScale, Overflow, Policy
from pcpvt.functional.step import autograd_value_and_grad, make_step
from pcpvt.models.layers import LayerNorm, attend_plain

HALVES = [torch.bfloat16, torch.float16]


def assert_rounded_once(result: torch.Tensor, reference: torch.Tensor) -> None:
    """`result` equals the float32 `reference` rounded to the result's dtype, within one unit in the last place.

    For numbers below 1/32 the unit is that of 1/32: near zero, float32's rounding of the terms is larger than theirs.
    """
    assert reference.dtype == torch.float32
    unit = torch.finfo(result.dtype).eps * 2 ** reference.abs().clamp(min=2.0**-5).log2().floor()
    excess = (result.float() - reference).abs() / unit
    assert excess.max() <= 1.0, f"off by {excess.max():.1f} units in the last place"


def draws(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", HALVES)
def test_layer_norm_accumulates_in_float32(dtype):
    """4,096 features around 10: a 16-bit sum would stop growing, and a sum of squares would lose the variance."""
    x = (10 + draws(8, 4096)).to(dtype).requires_grad_()
    weight, bias = (draws(4096, seed=s).to(dtype).requires_grad_() for s in (1, 2))
    wide = [t.detach().float().requires_grad_() for t in (x, weight, bias)]
    out, reference = F.layer_norm(x, (4096,), weight, bias, 1e-6), F.layer_norm(wide[0], (4096,), *wide[1:], 1e-6)
    assert_rounded_once(out, reference)


@pytest.mark.parametrize("dtype", HALVES)
def test_gradients_of_norms_accumulate_in_float32(dtype):
    """25,088 rows, as in stage 1 at 224 px, where the CPU's 16-bit kernel loses most of the bias gradient."""
    norm, policy = LayerNorm(16, eps=1e-6), Policy(compute=dtype)
    params = {"norm.weight": 1 + 0.1 * draws(16), "norm.bias": draws(16, seed=1)}
    x, ahead = (1 + draws(25088, 16)).to(dtype), (0.5 + draws(25088, 16, seed=2)).to(dtype)

    def gradients(params, x, ahead):
        leaves = {name.removeprefix("norm."): value.requires_grad_() for name, value in params.items()}
        out = torch.func.functional_call(norm, leaves, x)
        assert out.dtype == x.dtype
        return torch.autograd.grad(out, list(leaves.values()), ahead)

    exact = gradients({name: value.double() for name, value in params.items()}, x.double(), ahead.double())
    taken = gradients(precision.cast(pack(params), policy, devices.get("cpu").fp32_norms), x, ahead)
    for gradient, reference in zip(taken, exact, strict=True):
        # Measured: off by 3e-5, where sums in 16 bits are off by 1 % to 97 % of the largest.
        torch.testing.assert_close(gradient.double(), reference, rtol=1e-4, atol=0.01)


def test_fp32_norms_keeps_all_norms_and_nothing_else_in_float32():
    model, params = nano_state(torch.float32)
    mixed = precision.cast(pack(params), Policy(compute=torch.bfloat16), fp32_norms=True)
    float32 = {name for name, value in mixed.items() if value.dtype == torch.float32}
    expected = {
        f"{name}.{leaf}"
        for name, module in model.named_modules()
        if isinstance(module, LayerNorm)
        for leaf in ("weight", "bias")
    }
    assert float32 == expected and len(float32) > 20
    narrow = precision.cast(pack(params), Policy(compute=torch.bfloat16))
    assert {value.dtype for value in narrow.values()} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", HALVES)
def test_softmax_and_means_accumulate_in_float32(dtype):
    """4,096 almost equal terms: a 16-bit sum would stop growing after 256 or 2,048 of them."""
    scores = (0.01 * draws(4, 4096)).to(dtype)
    assert_rounded_once(scores.softmax(-1), scores.float().softmax(-1))
    assert_rounded_once(torch.ops.aten._softmax(scores, -1, False), scores.float().softmax(-1))
    x = (1 + 0.1 * draws(4, 4096, 8)).to(dtype)
    assert_rounded_once(x.mean(1), x.float().mean(1))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_attention_kernels_of_the_cpu_agree_with_float32(dtype):
    q, k, v = (draws(2, 2, 49, 32, seed=s).to(dtype) for s in range(3))
    reference = attend_plain(q.float(), k.float(), v.float())
    for attend in (attend_plain, devices.get("cpu").attend(dtype)):
        torch.testing.assert_close(attend(q, k, v).float(), reference, rtol=0, atol=8 * torch.finfo(dtype).eps)


def test_policies_are_parsed_and_formatted():
    assert precision.parse("bfloat16") == Policy(torch.float32, torch.bfloat16, torch.float32)
    assert precision.parse("float64") == Policy(*[torch.float64] * 3)
    text = "params=float32,compute=float16,output=float32"
    assert str(precision.parse(text)) == text
    for wrong in ("float8", "params=float32,compute=int8", "compute=float16,compute=float16", "weights=float32"):
        with pytest.raises(ValueError, match="not understood"):
            precision.parse(wrong)


def test_parameters_are_cast_once_a_step_and_the_loss_is_float32():
    policy, seen = precision.parse("bfloat16"), []
    model, params = nano_state(torch.float32)
    objective = make_objective(model, smoothing=0.1, policy=policy)

    def watched(params, batch, factor):
        seen.append(params["head.weight"])
        loss = objective(params, batch, factor)
        assert loss.dtype == torch.float32
        return loss

    def seam(objective, trainable):
        taken = autograd_value_and_grad(objective, trainable)

        def value_and_grad(params, *args):
            seen.append(params["head.weight"])
            return taken(params, *args)

        return value_and_grad

    groups = optim.groups(params, 0.05)
    params = optim.lay_out(params, groups)
    optimizer = optim.chain(optim.adamw(schedules.constant(1e-3), groups))
    step = make_step(watched, optimizer, global_batch=8, grad_accum_steps=4, policy=policy, value_and_grad=seam)
    ts, metrics = step(state.create(params, optimizer.init(params), {}, ema=False), batches(1, 32, 8)[0])
    assert {p.dtype for p in seen} == {torch.bfloat16} and len({p.data_ptr() for p in seen}) == 1
    assert all(leaf.dtype == torch.float32 for leaf in [*ts.params.values(), *ts.opt["mu"].values(), metrics["loss"]])


# ---- the loss scale: float16


class Fp16:
    """A float16 run of pcpvt_nano; the factor given to a step scales its loss, e.g. to inf or nan."""

    SCALER = DynamicScale(initial=2.0**10, interval=3)

    def __init__(self, scaler=SCALER, overflow=None, honors_found_inf=True):
        model, params = nano_state(torch.float32)
        policy = precision.parse("float16")
        self.factor = 1.0
        objective = make_objective(model, policy=policy)
        groups = optim.groups(params, 0.05)
        params = optim.lay_out(params, groups)
        adamw = optim.adamw(
            schedules.constant(1e-3),
            groups,
            honors_found_inf=honors_found_inf,
        )
        optimizer = optim.chain(optim.clip_by_global_norm(5.0), adamw)
        self.run = make_step(
            lambda p, b, f: objective(p, b, f * self.factor),
            optimizer,
            global_batch=4,
            policy=policy,
            scaler=scaler,
            overflow=overflow,
            ema_decay=0.9,
        )
        self.state = state.create(params, optimizer.init(params), scaler.init(), ema=True)
        self.batch = batches(1, 32, 4)[0]

    def step(self, factor: float = 1.0) -> dict[str, torch.Tensor]:
        self.factor = factor
        self.state, metrics = self.run(self.state, self.batch)
        return metrics

    def leaves(self) -> dict[str, torch.Tensor]:
        skipping = ("step", "skipped", "scale/factor", "scale/good")
        return {n: v.clone() for n, v in state.flatten(self.state).items() if n not in skipping}

    @property
    def scale(self) -> float:
        return self.state.scale["factor"].item()


def same(a, b) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def test_the_scale_grows_after_good_steps_and_does_not_change_the_loss():
    run = Fp16()
    losses = [run.step()["loss"].item() for _ in range(4)]
    assert run.scale == 2.0**11
    model, params = nano_state(torch.float32)
    objective = make_objective(model)
    expected = objective(params, run.batch, torch.tensor(0.25)).item()
    assert losses[0] == pytest.approx(expected, rel=2e-3)  # the metric is unscaled


@pytest.mark.parametrize("honors_found_inf", [True, False])
@pytest.mark.parametrize("poison", [float("inf"), float("nan"), 1e6])
def test_a_gradient_that_overflows_halves_the_scale_and_changes_nothing_else(poison, honors_found_inf):
    """1e6 is finite: it overflows float16 only in the backward pass."""
    run = Fp16(honors_found_inf=honors_found_inf)
    run.step()
    before = run.leaves()
    assert run.step(poison)["skipped"] == 1 and same(before, run.leaves())
    assert run.step(poison)["skipped"] == 2 and run.scale == 2.0**8
    assert run.state.scale["good"] == 0
    assert run.step()["skipped"] == 0 and not same(before, run.leaves())


def test_unscaling_in_the_kernel_and_on_the_host_gives_the_same_bits():
    runs = Fp16(), Fp16(honors_found_inf=False)
    for run in runs:
        for factor in (1.0, float("inf"), 1.0):
            run.step(factor)
    assert same(runs[0].leaves(), runs[1].leaves())


def test_the_devices_overflow_flag_skips_saturated_gradients():
    """As on a 910A: inf becomes 65504 and nan 0, the gradient stays finite, and a sticky flag is set."""
    flag, rises = torch.ones(()), torch.zeros(())
    run = Fp16(overflow=Overflow(flag.zero_, lambda: flag.add_(rises).clone()))
    before = run.leaves()
    assert run.step()["skipped"] == 0 and not same(before, run.leaves())  # a flag from before the step is cleared
    before = run.leaves()
    rises.fill_(1.0)
    metrics = run.step()
    assert metrics["skipped"] == 1 and torch.isfinite(metrics["grad_norm"]) and same(before, run.leaves())
    assert run.scale == 2.0**9


def test_the_scale_stays_within_its_bounds():
    scaler, one, zero = DynamicScale(initial=2.0, interval=1, maximum=4.0), torch.ones(()), torch.zeros(())
    scale, factors = scaler.init(), []
    for skip in (zero, zero, one, one, one, one):
        scale = scaler.update(scale, skip)
        factors.append(scale["factor"].item())
    assert factors == [4.0, 4.0, 2.0, 1.0, 1.0, 1.0]


def test_the_scale_is_saved_in_checkpoints(tmp_path):
    from pcpvt.checkpoints import checkpoint
    from pcpvt.checkpoints.writer import copy_to_host

    run = Fp16()
    run.step(float("inf"))
    run.step()
    path = checkpoint.save(tmp_path, copy_to_host(state.flatten(run.state)), {"step": 2})
    saved = checkpoint.read(path).tensors
    assert saved["scale/factor"] == 2.0**9 and saved["scale/good"] == 1
