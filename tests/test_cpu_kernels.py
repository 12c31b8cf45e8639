"""The CPU kernels equal the plain operators, gradients included, and skip the work that they promise to skip."""

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
from pcpvt.functional.flat import pack
from pcpvt.models import pcpvt
from pcpvt.models.layers import attend_plain, gelu_linear_plain, linear_add_plain, norm_plain, residual_plain

LINEAR = [(cpu_kernels.linear, F.linear), (cpu_kernels.gelu_linear, gelu_linear_plain)]


def draws(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Standard normal tensors, one per shape."""
    generator = rng.generator(0, "test")
    return [torch.from_numpy(generator.standard_normal(s)).to(dtype) for s in shapes]


def with_gradients(function, inputs: list[torch.Tensor], grad_output: torch.Tensor) -> list[torch.Tensor]:
    """The value of `function` and its gradients with respect to all inputs."""
    leaves = [t.clone().requires_grad_() for t in inputs]
    value = function(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves, grad_output.to(value.dtype))]


def skip_unless_usable(dtype: torch.dtype) -> None:
    if not cpu_kernels.usable(dtype):
        pytest.skip(f"this build or processor has no oneDNN product with bias in {dtype}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(6, 40), (2, 56, 56, 64)])
def test_16_bit_norms_with_float32_weights_are_rounded_once(dtype, shape):
    x, weight, bias = draws(shape, shape[-1:], shape[-1:])
    x = x.to(dtype)
    exact = norm_plain(x.double(), weight.double(), bias.double(), 1e-6)
    with torch.no_grad():
        result = cpu_kernels.norm(x, weight, bias, 1e-6)
    assert result.dtype == dtype
    rounding = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(result.double(), exact, rtol=1.02 * rounding, atol=1e-6)  # 2 %: statistics in float32


def test_gradients_of_16_bit_norms_are_summed_in_float32():
    x, weight, bias, grad_output = draws((25088, 64), (64,), (64,), (25088, 64))
    inputs = [x.bfloat16(), weight, bias]
    result = with_gradients(lambda *t: cpu_kernels.norm(*t, 1e-6), inputs, grad_output)
    exact = with_gradients(lambda *t: norm_plain(*t, 1e-6), [t.double() for t in inputs], grad_output.bfloat16())
    for gradient, exact_gradient in zip(result[2:], exact[2:], strict=True):
        assert (gradient.double() - exact_gradient).norm() < 1e-4 * exact_gradient.norm()


@pytest.mark.parametrize("shape", [(6, 40), (2, 3, 4, 40), (4, 50, 50, 40)])
@pytest.mark.parametrize(("ours", "plain"), LINEAR)
def test_bfloat16_linear_layers_equal_the_plain_ones_bit_for_bit(ours, plain, shape):
    skip_unless_usable(torch.bfloat16)
    *inputs, grad_output = draws(shape, (24, 40), (24,), (*shape[:-1], 24), dtype=torch.bfloat16)
    result, expected = (with_gradients(function, inputs, grad_output) for function in (ours, plain))
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
    with torch.no_grad():  # the fused GELU takes the sum before it is rounded to bfloat16: one rounding less
        torch.testing.assert_close(ours(*inputs), plain(*inputs), rtol=2**-7, atol=2**-9)


@pytest.mark.parametrize("shape", [(6, 40), (2, 3, 4, 40), (4, 50, 50, 40)])
@pytest.mark.parametrize(("ours", "plain"), LINEAR)
def test_float32_linear_layers_are_exact_to_rounding(ours, plain, shape):
    skip_unless_usable(torch.float32)
    *inputs, grad_output = draws(shape, (24, 40), (24,), (*shape[:-1], 24))
    result, by_pytorch = (with_gradients(function, inputs, grad_output) for function in (ours, plain))
    exact = with_gradients(plain, [t.double() for t in inputs], grad_output)
    for tensors in zip(result, by_pytorch, exact, strict=True):
        error, pytorch_error = ((t.double() - tensors[2]).norm() / tensors[2].norm() for t in tensors[:2])
        assert error < 2e-6, (error, pytorch_error)
    with torch.no_grad():
        torch.testing.assert_close(ours(*inputs), plain(*inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sum_by_the_product_is_rounded_no_more_than_the_plain_one_and_has_its_gradients(dtype):
    skip_unless_usable(dtype)
    *inputs, grad_output = draws((4, 50, 50, 40), (24, 40), (24,), (4, 50, 50, 24), (4, 50, 50, 24), dtype=dtype)
    result, expected = (with_gradients(f, inputs, grad_output) for f in (cpu_kernels.linear_add, linear_add_plain))
    rounding = torch.finfo(dtype).eps / 2
    for gradient, plain in zip(result[1:], expected[1:], strict=True):
        torch.testing.assert_close(gradient, plain, rtol=4 * rounding, atol=1e-4)
    x, weight, bias, onto = (t.double() for t in inputs)
    product = F.linear(x, weight, bias)
    with torch.no_grad():
        fused = cpu_kernels.linear_add(*inputs)
    assert fused.dtype == dtype
    # The product and the sum are rounded, and products are summed in float32, 41 of them.
    bound = 1.02 * rounding * (product.abs() + (onto + product).abs()) + 2e-5
    assert ((fused.double() - (onto + product)).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prepacked_parameters_give_the_same_logits(dtype):
    skip_unless_usable(dtype)
    model, params = nano()
    cpu, x = devices.get("cpu"), images(2, 64, 64, 3).to(dtype)
    params = precision.cast(pack(params), precision.Policy(compute=dtype), cpu.fp32_norms)
    packed = cpu.kernels(dtype).prepack(params)
    rest = {name for name, value in packed.items() if value.ndim > 1 and not value.is_mkldnn}
    assert rest == {f"pos_block.{stage}.proj.0.weight" for stage in range(4)}  # the convolutions
    with torch.no_grad():
        logits, expected = (pcpvt.apply(model, p, x, kernels=cpu.kernels(dtype)) for p in (packed, params))
    if dtype == torch.bfloat16:
        assert torch.equal(logits, expected)
    # In float32 the order of sums may differ: by 4e-8 for logits up to 0.1 in torch 2.11, not at all in 2.13.
    torch.testing.assert_close(logits, expected, rtol=0, atol=4e-7)


@pytest.mark.parametrize("tokens", [30, 400])
@pytest.mark.parametrize("heads", [1, 3])
def test_attention_and_its_gradients_equal_the_plain_ones(tokens, heads):
    inputs = draws((2, heads, tokens, 8), (2, heads, 49, 8), (2, heads, 49, 8), dtype=torch.float64)
    (grad_output,) = draws((2, heads, tokens, 8), dtype=torch.float64)
    result, expected = (with_gradients(f, inputs, grad_output) for f in (cpu_kernels.attend, attend_plain))
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kept", ["none", "one", "some", "all"])
@pytest.mark.parametrize("batch", [1, 3, 8, 20])
def test_residual_that_skips_samples_equals_the_masked_one_with_gradients(batch, kept):
    number = {"none": 0, "one": 1, "some": (batch + 1) // 2, "all": batch}[kept]
    drop_path_scale = torch.zeros(batch)
    drop_path_scale[rng.generator(0, "test").permutation(batch)[:number]] = 1.25
    computed = []  # samples, per call of the branch

    def branch(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        computed.append(len(x))
        return torch.tanh(x * weight)

    def value(residual):
        return lambda x, weight: residual(x, lambda part: branch(part, weight), drop_path_scale) + 0 * weight.sum()

    x, weight, grad_output = draws((batch, 16, 16, 4), (4,), (batch, 16, 16, 4), dtype=torch.float64)
    result = with_gradients(value(cpu_kernels.residual), [x, weight], grad_output)
    assert number <= sum(computed) < number + max(1, batch // 8)
    computed.clear()
    expected = with_gradients(value(residual_plain), [x, weight], grad_output)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
    assert computed == [batch]


def test_parameters_of_a_branch_that_no_sample_keeps_have_zero_gradients():
    from pcpvt.functional.step import autograd_value_and_grad

    model, params = nano()
    x, drop_path_scale = images(2, 64, 64, 3, dtype=torch.float64), torch.ones(2, model.branches)
    drop_path_scale[:, 0] = 0
    kernels = devices.get("cpu").kernels(torch.float64)
    _, grads = autograd_value_and_grad(
        lambda p: pcpvt.apply(model, p, x, drop_path_scale, kernels=kernels).square().sum()
    )(params)
    assert grads.keys() == params.keys()
    assert not grads["blocks.0.0.attn.q.weight"].any() and grads["blocks.0.0.mlp.fc1.weight"].any()


def test_freed_memory_is_reused_without_page_faults():
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
    assert int(ended.stdout) < 149 * 2**20 / resource.getpagesize() / 100  # 1 % of the pages that the tensors span
