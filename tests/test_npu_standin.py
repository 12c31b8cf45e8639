"""The stand-in NPU: it has the CPU's results, refuses what NPUs refuse, and exists in child processes too."""

from __future__ import annotations

import os
import subprocess
import sys

import npu_standin
import pytest
import torch
import torch.nn.functional as F
from npu_standin import on_npu
from torch import Tensor

ADAMW = {"beta1": 0.9, "beta2": 0.999, "weight_decay": 0.05, "eps": 1e-8, "amsgrad": False, "maximize": False}
needs_standin = pytest.mark.skipif(npu_standin.available() is not None, reason=str(npu_standin.available()))


def refused(call, *words: str) -> None:
    """Asserts that `call` raises an error whose message contains all the words."""
    try:
        call()
    except (RuntimeError, TypeError, AttributeError) as error:
        assert all(word in str(error) for word in words), f"{words} not in {error}"
    else:
        raise AssertionError(f"accepted, but an error with {words} was expected")


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if q.device.type == "npu":
        import torch_npu

        return torch_npu.npu_fusion_attention(q, k, v, q.shape[1], "BNSD", scale=q.shape[-1] ** -0.5)[0]
    return F.scaled_dot_product_attention(q, k, v)


def exact_gelu(x: Tensor) -> Tensor:
    if x.device.type == "npu":
        import torch_npu

        return torch_npu.npu_gelu(x)
    return F.gelu(x)


def objective(params: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
    """The loss of a small model with the layer kinds of a vision transformer; images `[b, 3, h, w]`."""
    x = F.conv2d(image, params["patch"], stride=4)
    x = x + F.conv2d(x, params["peg"], padding=1, groups=x.shape[1])
    x = x.flatten(2).mT
    q, k, v = F.linear(F.layer_norm(x, x.shape[-1:]), params["qkv"]).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    x = x + attend(q, k, v).transpose(1, 2).flatten(2)
    x = x + F.linear(exact_gelu(F.linear(x, params["fc1"])), params["fc2"])
    return F.cross_entropy(F.linear(x.mean(1), params["head"]).float(), label, label_smoothing=0.1)


def example(dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"patch": (16, 3, 4, 4), "peg": (16, 1, 3, 3), "qkv": (48, 16), "fc1": (32, 16), "fc2": (16, 32)}
    shapes["head"] = (10, 16)
    params = {name: (0.2 * torch.randn(shape, generator=generator)).to(dtype) for name, shape in shapes.items()}
    return params, torch.randn(2, 3, 16, 16, generator=generator).to(dtype), torch.tensor([3, 7])


def gradients(device: str, dtype: torch.dtype, differentiate) -> dict[str, Tensor]:
    params, image, label = example(dtype)
    params = {name: value.to(device) for name, value in params.items()}
    grads, loss = differentiate(params, image.to(device), label.to(device))
    assert all(g.device.type == device for g in grads.values())
    return {name: value.cpu() for name, value in {**grads, "loss": loss}.items()}


def by_func(params, *batch):
    return torch.func.grad_and_value(objective)(params, *batch)


def by_autograd(params, *batch):
    leaves = {name: value.requires_grad_() for name, value in params.items()}
    loss = objective(leaves, *batch)
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True)), loss.detach()


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@on_npu()
def test_gelu_is_the_tanh_form_unless_it_is_npu_gelu():
    import torch_npu

    x = torch.linspace(-3, 3, 101)
    there = x.to("npu").requires_grad_()
    for approximate in ("none", "tanh"):
        expected = F.gelu(x, approximate=approximate)
        assert torch.equal(torch_npu.npu_gelu(there, approximate=approximate).cpu(), expected)
    assert torch.equal(F.gelu(there).cpu(), F.gelu(x, approximate="tanh"))
    leaf = x.clone().requires_grad_()
    (exact,) = torch.autograd.grad(F.gelu(leaf).sum(), leaf)
    (taken,) = torch.autograd.grad(torch_npu.npu_gelu(there).sum(), there)
    assert torch.equal(taken.cpu(), exact)


@on_npu()
def test_gradients_equal_the_cpus_bit_for_bit():
    torch.set_num_threads(1)
    for dtype in (torch.float32, torch.bfloat16):
        expected = gradients("cpu", dtype, by_autograd)
        assert_same_bits(expected, gradients("npu", dtype, by_autograd))
        assert_same_bits(gradients("cpu", dtype, by_func), gradients("npu", dtype, by_func))


@on_npu()
def test_fused_and_foreach_updates_equal_the_cpus_bit_for_bit():
    def update(device: str) -> dict[str, Tensor]:
        params, mu, nu = ([torch.linspace(0.1, 1, n).to(device) for n in (7, 30)] for _ in range(3))
        grads = [torch.linspace(-1, 1, n).to(device) for n in (7, 30)]
        torch._foreach_mul_(grads, 0.5)
        count = torch.ones((), device=device)
        torch._fused_adamw_(params, grads, mu, nu, [], [count] * 2, lr=1e-3, **ADAMW)
        torch._foreach_lerp_(nu, params, [count, count])
        return {f"{i}": t.cpu() for i, t in enumerate([*params, *mu, *nu])}

    assert_same_bits(update("cpu"), update("npu"))


@on_npu()
def test_composite_operators_are_refused_only_under_torch_func():
    x = torch.linspace(-1, 1, 96).reshape(2, 2, 6, 4).to("npu")
    label = torch.zeros(24, dtype=torch.int64, device="npu")
    refused_under_func = [
        lambda t: F.scaled_dot_product_attention(t, t, t),
        lambda t: t.softmax(-1),
        lambda t: F.adaptive_avg_pool2d(t, 1),
        lambda t: F.one_hot((t > 0).long()) * t[..., None],
    ]
    supported = [
        lambda t: t @ t.mT,
        lambda t: torch.ops.aten._softmax(t, -1, False),
        lambda t: t.log_softmax(-1),
        lambda t: F.layer_norm(t, (4,)),
        lambda t: torch.einsum("bnsd,bntd->bnst", t, t),
        lambda t: attend(t, t, t),
        lambda t: F.cross_entropy(t.reshape(-1, 4), label),
    ]
    for function in [*refused_under_func, *supported]:
        function(x.clone().requires_grad_()).sum().backward()
    for function in supported:
        torch.func.grad(lambda t, f=function: f(t).sum())(x)
    for function in refused_under_func:
        refused(lambda f=function: torch.func.grad(lambda t: f(t).sum())(x), "storage")


@on_npu(devices=2)
def test_unsupported_operations_are_refused():
    torch.npu.set_compile_mode(jit_compile=False)
    torch.npu.config.allow_internal_format = False
    refused(lambda: setattr(torch.npu.config, "no_such_option", 1), "no_such_option")
    x = torch.ones(2, 3, 4, 4, device="npu")
    refused(lambda: torch.npu.set_compile_mode(jit_compile=False), "after the first tensor")
    refused(lambda: x + torch.ones(4), "same device", "cpu")
    refused(lambda: x + torch.ones(4, device="npu:1"), "same device", "npu:1")
    refused(lambda: torch.ones(1, device="npu:2"), "2 devices")
    refused(lambda: torch.zeros(1, dtype=torch.float64, device="npu"), "float64")
    refused(lambda: x.double(), "float64")
    refused(lambda: x.contiguous(memory_format=torch.channels_last), "channels_last")
    refused(lambda: torch.rand(2, device="npu"), "random")
    refused(lambda: F.dropout(x, 0.5), "random")
    refused(lambda: torch._foreach_mul_([x], x.sum()), "kernel")
    one, lists = torch.ones((), device="npu"), [[torch.ones(3, device="npu")] for _ in range(4)]
    refused(lambda: torch._fused_adamw_(*lists, [], [one], lr=one, **ADAMW), "kernel")
    refused(lambda: torch._fused_adamw_(*lists, [], [one], lr=1e-3, **ADAMW, found_inf=one), "found_inf")
    refused(x.numpy, "numpy")
    assert (x + torch.tensor(1.0)).device == x.device and x.to("npu:1").device.index == 1


@on_npu()
def test_memory_statistics():
    before = torch.npu.memory_allocated()
    x = torch.ones(1 << 18, device="npu")
    y = x + x
    assert torch.npu.memory_allocated() - before == 2 << 20
    view = x.view(-1, 4)
    del x, y
    assert torch.npu.memory_allocated() - before == 1 << 20
    assert view.sum().item() == 1 << 18
    assert torch.npu.max_memory_allocated() - before == 2 << 20
    torch.npu.reset_peak_memory_stats()
    assert torch.npu.max_memory_allocated() - before == 1 << 20
    free, total = torch.npu.mem_get_info()
    assert total - free == torch.npu.memory_allocated()


@on_npu()
def test_streams_events_and_pinned_memory_work():
    host = torch.arange(8.0).pin_memory()
    assert host.is_pinned() and not torch.arange(8.0).is_pinned()
    side, start, end = torch.npu.Stream(), torch.npu.Event(enable_timing=True), torch.npu.Event(enable_timing=True)
    start.record()
    with torch.npu.stream(side):
        x = host.to("npu", non_blocking=True)
    torch.npu.current_stream().wait_stream(side)
    x.record_stream(torch.npu.current_stream())
    end.record()
    torch.npu.synchronize()
    assert torch.equal(x.cpu(), host) and start.elapsed_time(end) >= 0


@pytest.mark.slow  # a training step so compiled: test_npu.py
@on_npu()
def test_compiled_equals_eager_and_inductor_is_refused():
    params, image, label = example(torch.float32)
    params, image, label = {k: v.to("npu") for k, v in params.items()}, image.to("npu"), label.to("npu")
    expected, _ = by_func(params, image, label)
    compiled = torch.compile(by_func, backend="npugraphs", fullgraph=True)
    assert_same_bits(expected, compiled(params, image, label)[0])
    refused(lambda: torch.compile(lambda t: t + 1, backend="inductor")(image), "npu")


@on_npu(soc="Ascend910A")
def test_910a_saturates_and_sets_its_overflow_flag():
    assert not torch.npu.is_bf16_supported() and torch.npu.get_device_name() == "Ascend910A"
    refused(lambda: torch.ones(1, dtype=torch.bfloat16, device="npu"), "bfloat16")
    x = torch.tensor([300.0, -300.0, 2.0], dtype=torch.float16, device="npu")
    assert not torch.npu.get_npu_overflow_flag()
    assert (x * x.abs()).tolist() == [65504.0, -65504.0, 4.0] and torch.npu.get_npu_overflow_flag()
    torch.npu.clear_npu_overflow_flag()
    x.mul_(2)
    assert not torch.npu.get_npu_overflow_flag()
    assert torch.tensor([1e6, float("nan")], device="npu").half().tolist() == [65504.0, 0.0]
    assert torch.npu.get_npu_overflow_flag()
    torch.npu.clear_npu_overflow_flag()
    torch._foreach_mul_([x], 1e3)
    assert x.tolist() == [65504.0, -65504.0, 4000.0] and torch.npu.get_npu_overflow_flag()


@on_npu()
def test_910b_has_inf_and_nan_and_no_overflow_flag():
    x = torch.tensor([300.0], dtype=torch.float16, device="npu")
    assert (x * x).item() == float("inf") and torch.npu.is_bf16_supported()
    refused(torch.npu.get_npu_overflow_flag, "overflow")


def collectives() -> None:
    """Runs in each of two processes that torchelastic has started; see the end of this file."""
    import torch.distributed as dist

    rank = int(os.environ["LOCAL_RANK"])
    torch.npu.set_device(rank)
    dist.init_process_group("cpu:gloo,npu:hccl")
    x = torch.full((3,), rank + 1.0, device="npu")
    assert x.device.index == rank
    dist.all_reduce(x, async_op=True).wait()
    assert x.tolist() == [3.0] * 3
    dist.all_reduce(x.mul_(rank), op=dist.ReduceOp.MAX)
    host = torch.tensor([rank])
    dist.all_reduce(host)
    gathered = [torch.empty_like(x), torch.empty_like(x)]
    dist.all_gather(gathered, x + rank)
    dist.broadcast(x.fill_(rank), src=1)
    assert host.item() == 1 and [t[0].item() for t in gathered] == [3.0, 4.0] and x.tolist() == [1.0] * 3
    hccl_group = dist.new_group(backend="hccl")
    refused(lambda: dist.all_reduce(torch.ones(1), group=hccl_group), "cpu")
    dist.all_reduce(x, group=hccl_group)
    assert x.tolist() == [2.0] * 3
    dist.destroy_process_group()


@needs_standin
def test_hccl_collectives_over_two_processes_of_torchelastic():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    env = npu_standin.environment(devices=2) | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr[-4000:]


def child(index: int) -> None:
    assert torch.ones(2, device="npu").sum().item() == 2


@on_npu()
def test_spawned_processes_have_the_device():
    torch.multiprocessing.spawn(child, nprocs=1)


@needs_standin
def test_python_m_npu_standin_runs_any_program():
    code = "import torch; print(torch.npu.device_count(), torch.npu.get_device_name())"
    tests = os.path.dirname(__file__)
    env = os.environ | {"PYTHONPATH": tests, "DEVICES": "3", "SOC": "Ascend910A"}
    ended = subprocess.run([sys.executable, "-m", "npu_standin", "-c", code], env=env, capture_output=True, text=True)
    assert ended.stdout.split() == ["3", "Ascend910A"], ended.stderr


def test_missing_compiler_skips_the_tests(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no-such-compiler" in npu_standin.available()


if __name__ == "__main__":
    collectives()
