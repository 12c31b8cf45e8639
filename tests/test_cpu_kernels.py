"""The CPU's own kernels compute what the plain operators compute, gradients included, and skip what they promise to."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from reference import images, nano

from pcpvt import devices, rng
from pcpvt.devices import cpu_kernels
from pcpvt.functional import precision
from pcpvt.models import pcpvt
from pcpvt.models.layers import attend_plain, gelu_linear_plain, norm_plain, residual_plain

LINEAR = [(cpu_kernels.linear, F.linear), (cpu_kernels.gelu_linear, gelu_linear_plain)]


def draws(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Standard normal numbers, one tensor per shape."""
    generator = rng.generator(0, "test")
    return [torch.from_numpy(generator.standard_normal(s)).to(dtype) for s in shapes]


def with_gradients(function, given: list[torch.Tensor], ahead: torch.Tensor) -> list[torch.Tensor]:
    """The value and its gradients in all that is given."""
    leaves = [t.clone().requires_grad_() for t in given]
    value = function(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves, ahead.to(value.dtype))]


def need(dtype: torch.dtype) -> None:
    if not cpu_kernels.usable(dtype):
        pytest.skip(f"oneDNN's product with a bias is not in this build, or not for this processor, in {dtype}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(6, 40), (2, 56, 56, 64)])
def test_norms_of_16_bits_with_float32_weights_are_rounded_once(dtype, shape):
    x, weight, bias = draws(shape, shape[-1:], shape[-1:])
    x = x.to(dtype)
    exact = norm_plain(x.double(), weight.double(), bias.double(), 1e-6)
    with torch.no_grad():
        found = cpu_kernels.norm(x, weight, bias, 1e-6)
    assert found.dtype == dtype
    half = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(found.double(), exact, rtol=1.02 * half, atol=1e-6)  # 2 %: statistics in float32


def test_gradients_of_16_bit_norms_are_summed_in_float32():
    x, weight, bias, ahead = draws((25088, 64), (64,), (64,), (25088, 64))
    given = [x.bfloat16(), weight, bias]
    found = with_gradients(lambda *t: cpu_kernels.norm(*t, 1e-6), given, ahead)
    exact = with_gradients(lambda *t: norm_plain(*t, 1e-6), [t.double() for t in given], ahead.bfloat16())
    for mine, truth in zip(found[2:], exact[2:], strict=True):
        assert (mine.double() - truth).norm() < 1e-4 * truth.norm()


@pytest.mark.parametrize("shape", [(6, 40), (2, 3, 4, 40), (4, 50, 50, 40)])
@pytest.mark.parametrize(("ours", "plain"), LINEAR)
def test_bfloat16_linear_maps_are_the_plain_ones_to_the_bit(ours, plain, shape):
    need(torch.bfloat16)
    *given, ahead = draws(shape, (24, 40), (24,), (*shape[:-1], 24), dtype=torch.bfloat16)
    for mine, theirs in zip(with_gradients(ours, given, ahead), with_gradients(plain, given, ahead), strict=True):
        assert torch.equal(mine, theirs)
    with torch.no_grad():  # GELU then sees the sum before it is rounded to bfloat16: one rounding less
        torch.testing.assert_close(ours(*given), plain(*given), rtol=2**-7, atol=2**-9)


@pytest.mark.parametrize("shape", [(6, 40), (2, 3, 4, 40), (4, 50, 50, 40)])
@pytest.mark.parametrize(("ours", "plain"), LINEAR)
def test_float32_linear_maps_are_as_exact_as_pytorchs(ours, plain, shape):
    need(torch.float32)
    *given, ahead = draws(shape, (24, 40), (24,), (*shape[:-1], 24))
    exact = with_gradients(plain, [t.double() for t in given], ahead)
    for mine, theirs, truth in zip(
        with_gradients(ours, given, ahead), with_gradients(plain, given, ahead), exact, strict=True
    ):
        ours_off, theirs_off = ((t.double() - truth).norm() / truth.norm() for t in (mine, theirs))
        assert ours_off < 2e-6, (ours_off, theirs_off)
    with torch.no_grad():
        torch.testing.assert_close(ours(*given), plain(*given), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_parameters_give_the_same_logits(dtype):
    need(dtype)
    model, params = nano()
    cpu, x = devices.get("cpu"), images(2, 64, 64, 3).to(dtype)
    params = precision.cast(params, precision.Policy(compute=dtype), cpu.fp32_norms)
    packed = cpu.kernels(dtype).prepack(params)
    assert sum(value.is_mkldnn for value in packed.values()) == sum(value.ndim == 2 for value in params.values())
    with torch.no_grad():
        found, expected = (pcpvt.apply(model, p, x, kernels=cpu.kernels(dtype)) for p in (packed, params))
    if dtype == torch.bfloat16:
        assert torch.equal(found, expected)
    # In float32 another order of sums: 4e-8 of logits up to 0.1 in torch 2.11, nothing in 2.13.
    torch.testing.assert_close(found, expected, rtol=0, atol=4e-7)


@pytest.mark.parametrize("tokens", [30, 400])
@pytest.mark.parametrize("heads", [1, 3])
def test_attention_is_the_plain_one_with_its_gradients(tokens, heads):
    given = draws((2, heads, tokens, 8), (2, heads, 49, 8), (2, heads, 49, 8), dtype=torch.float64)
    (ahead,) = draws((2, heads, tokens, 8), dtype=torch.float64)
    found, expected = (with_gradients(f, given, ahead) for f in (cpu_kernels.attend, attend_plain))
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kept", ["none", "one", "some", "all"])
@pytest.mark.parametrize("batch", [1, 3, 8, 20])
def test_a_skipped_residual_branch_is_the_masked_one_with_its_gradients(batch, kept):
    number = {"none": 0, "one": 1, "some": (batch + 1) // 2, "all": batch}[kept]
    keep = torch.zeros(batch)
    keep[rng.generator(0, "test").permutation(batch)[:number]] = 1.25
    computed = []

    def branch(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        computed.append(len(x))
        return torch.tanh(x * weight)

    def value(residual):
        return lambda x, weight: residual(x, lambda part: branch(part, weight), keep) + 0 * weight.sum()

    x, weight, ahead = draws((batch, 16, 16, 4), (4,), (batch, 16, 16, 4), dtype=torch.float64)
    found = with_gradients(value(cpu_kernels.residual), [x, weight], ahead)
    skipping, computed[:] = list(computed), []
    for mine, theirs in zip(found, with_gradients(value(residual_plain), [x, weight], ahead), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    step = max(1, batch // 8)
    assert number <= sum(skipping) < number + step and computed == [batch]


def test_a_branch_that_no_sample_keeps_gives_its_parameters_a_gradient_of_zero():
    from pcpvt.functional.step import autograd_value_and_grad

    model, params = nano()
    x, keep = images(2, 64, 64, 3, dtype=torch.float64), torch.ones(2, model.branches)
    keep[:, 0] = 0
    take = autograd_value_and_grad(
        lambda p: pcpvt.apply(model, p, x, keep, kernels=devices.get("cpu").kernels(torch.float64)).square().sum()
    )
    _, grads = take(params)
    assert grads.keys() == params.keys()
    assert not grads["blocks.0.0.attn.q.weight"].any() and grads["blocks.0.0.mlp.fc1.weight"].any()


def test_memory_that_tensors_leave_is_used_again_without_page_faults():
    code = """
import resource, torch
from pcpvt import devices
devices.get("cpu").bind(0)
for _ in range(12):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(megabytes << 18) for megabytes in (1, 8, 40, 100)]
    del tensors
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(ended.stdout) < 149 * 2**20 / resource.getpagesize() / 100  # one in a hundred of those that it spans
