"""Compiled and eager runs agree, nothing is compiled twice, and a failed compilation warns or ends the run."""

from __future__ import annotations

import shutil

import pytest
import torch
from test_step import batches, nano_state

from pcpvt import devices, rng
from pcpvt.devices import compile
from pcpvt.errors import UserError
from pcpvt.functional import mixing, optim, precision, schedules, state
from pcpvt.functional.objective import make_objective, make_predict
from pcpvt.functional.step import autograd_value_and_grad, functional_value_and_grad, make_step
from pcpvt.models import pcpvt
from pcpvt.models.layers import PLAIN, Block, Kernels


class CountingBackend:
    """A dynamo backend that runs graphs unchanged and counts them."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


@pytest.fixture(autouse=True)
def reset_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def device(default: object = "none"):
    """The CPU device with `default` as the backend that `config.compile=auto` selects."""
    cpu = devices.get("cpu")
    cpu.default_compile = default
    return cpu


def recipe_batches(model, count: int, n: int) -> list[dict[str, torch.Tensor]]:
    """`count` batches of n samples with every random draw that a recipe can have."""
    rates = pcpvt.drop_rates(model.spec, 0.5)
    drawn = batches(count, 32, n)
    for i, batch in enumerate(drawn):
        draws = rng.generator(i, "test draws")
        lam, box = mixing.mixing_draws(draws, n, (32, 32), mixing.MixSpec(mode="elem"))
        batch["lam"], batch["box"] = torch.from_numpy(lam), torch.from_numpy(box)
        batch["drop_path_scale"] = torch.stack(
            [torch.from_numpy(pcpvt.draw_drop_path_scale(draws, rates)) for _ in range(n)]
        )
        batch["erase"] = torch.tensor([[2, 9, 3, 20]] * n, dtype=torch.int32)
    return drawn


def train(value_and_grad, steps: int = 3, kernels: Kernels = PLAIN):
    """The state and the losses after a few steps of two micro-batches each."""
    model, params = nano_state(torch.float32)
    groups = optim.groups(params, 0.05)
    params = optim.lay_out(params, groups)
    optimizer = optim.chain(optim.adamw(schedules.constant(1e-3), groups))
    policy = precision.parse("bfloat16")
    objective = make_objective(model, smoothing=0.1, policy=policy, kernels=kernels)
    step = make_step(
        objective, optimizer, global_batch=8, grad_accum_steps=2, policy=policy, value_and_grad=value_and_grad
    )
    ts, losses = state.create(params, optimizer.init(params), {}, ema=False), []
    for batch in recipe_batches(model, steps, 8):
        ts, metrics = step(ts, batch)
        losses.append(metrics["loss"].item())
    return ts, losses


def assert_same_run(result, expected):
    """Two results of `train` are bit-identical."""
    (ts, losses), (expected_ts, expected_losses) = result, expected
    assert losses == expected_losses and len(set(losses)) == 3
    for name, value in ts.params.items():
        assert torch.equal(value, expected_ts.params[name]), name


def test_gradient_is_compiled_once_and_equals_eager_bit_for_bit():
    """The counting backend runs the traced operators, so a draw or a number frozen into the graph would be noticed.

    tests/test_step.py compares the two gradient implementations.
    """
    count = CountingBackend()
    result = train(compile.value_and_grad(device(), count))
    assert count.graphs == 1
    assert_same_run(result, train(functional_value_and_grad))


def test_evaluation_is_compiled_once_including_the_padded_last_batch():
    count = CountingBackend()
    model, params = nano_state(torch.float32)
    predict = make_predict(model)
    fast = compile.compiled(predict, device(), count)
    for batch in [*batches(2, 32, 4), {"image": torch.zeros(4, 32, 32, 3, dtype=torch.uint8)}]:
        assert torch.equal(fast(params, batch["image"]), predict(params, batch["image"]))
    assert count.graphs == 1


@pytest.fixture
def blocks(monkeypatch):
    """`blocks(backend, auto=False)`: kernels with blocks compiled by any backend, as by one that generates code."""

    def make(backend: object, auto: bool = False) -> Kernels:
        monkeypatch.setattr(compile, "_GENERATES_CODE", (backend,))
        return compile.compiled_blocks(PLAIN, device(backend), "auto" if auto else backend)

    return make


def test_blocks_of_a_stage_share_compiled_code_and_equal_eager_bit_for_bit(blocks):
    """Two blocks in the first stage and one in each other stage: four graphs, for every step and micro-batch."""
    count = CountingBackend()
    kernels = blocks(count)
    result = train(autograd_value_and_grad, kernels=kernels)
    assert count.graphs == 4
    assert_same_run(result, train(autograd_value_and_grad))


@pytest.mark.slow  # one size: test_blocks_of_a_stage_share_compiled_code...
def test_model_stays_compiled_with_several_image_sizes(blocks):
    count = CountingBackend()
    model, params = nano_state(torch.float32)
    predict = make_predict(model, kernels=blocks(count))
    for side in (32, 64, 96):
        images = torch.full((1, side, side, 3), 7, dtype=torch.uint8)
        assert torch.equal(predict(params, images), make_predict(model)(params, images))
    assert count.graphs == 12


def test_intermediates_include_attention_with_compiled_blocks(blocks):
    model, params = nano_state(torch.float32)
    images = torch.randn(1, 32, 32, 3, generator=torch.Generator().manual_seed(0))
    logits, captured = pcpvt.intermediates(model, params, images, attention=True, kernels=blocks("eager"))
    expected_logits, expected = pcpvt.intermediates(model, params, images, attention=True)
    torch.testing.assert_close(logits, expected_logits)
    assert captured.keys() == expected.keys()


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_agrees_with_eager():
    with torch.device("meta"):
        block = Block(8, 2, 2, 2)
    draws = torch.Generator().manual_seed(0)
    params = {n: 0.3 * torch.randn(p.shape, generator=draws) for n, p in block.named_parameters()}
    batch = {"x": torch.randn(2, 4, 4, 8, generator=draws), "drop_path_scale": torch.tensor([[2.0, 0.0], [0.0, 2.0]])}
    cpu = devices.get("cpu")

    def gradient(choice):
        kernels = compile.compiled_blocks(PLAIN, cpu, choice)

        def objective(params, batch, factor):
            class Wrapper(torch.nn.Module):
                def __init__(self):
                    super().__init__()
                    self.block = block

                def forward(self):
                    return kernels.block_fn(self.block, batch["x"], kernels, batch["drop_path_scale"])

            prefixed = {f"block.{n}": v for n, v in params.items()}
            return torch.func.functional_call(Wrapper(), prefixed, ()).square().sum() * factor

        return compile.value_and_grad(cpu, choice)(objective)(params, batch, torch.tensor(0.5))

    value, grads = gradient("inductor")
    expected_value, expected_grads = gradient("none")
    torch.testing.assert_close(value, expected_value)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-4, atol=1e-5)


def broken_backend(graph, inputs):
    raise RuntimeError("no such instruction\nand a second line")


def squares(params, batch, factor):
    return (params["w"] * batch["x"]).square().sum() * factor


ARGS = {"w": torch.tensor([1.0, 2.0])}, {"x": torch.tensor([3.0, 4.0])}, torch.tensor(0.5)


def test_auto_falls_back_to_eager_with_one_warning(capsys):
    fast = compile.value_and_grad(device(broken_backend), "auto")(squares)
    for _ in range(3):
        value, grads = fast(*ARGS)
        assert value == 36.5 and grads["w"].tolist() == [9.0, 32.0]
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1 and "no such instruction" in warning and "going on without" in warning


def test_failure_of_a_named_backend_is_a_one_line_error():
    for choice in (broken_backend, "no_such_backend"):
        fast = compile.value_and_grad(device(), choice)(squares)
        with pytest.raises(UserError, match=r"config.compile.*config.compile=none") as error:
            fast(*ARGS)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("fails", [pytest.param("forward", marks=pytest.mark.slow), "backward"])
def test_blocks_fall_back_to_eager_with_one_warning(fails, blocks, capsys):
    from torch._dynamo.backends.common import aot_autograd

    def backend(graph, inputs):
        return aot_autograd(**{"fw_compiler": lambda g, _: g, "bw_compiler": lambda g, _: g} | {part: broken_backend})(
            graph, inputs
        )

    part = "fw_compiler" if fails == "forward" else "bw_compiler"
    kernels = blocks(backend, auto=True)
    assert_same_run(train(autograd_value_and_grad, kernels=kernels), train(autograd_value_and_grad))
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1 and "no such instruction" in warning and "going on without" in warning

    kernels = blocks(backend)
    with pytest.raises(UserError, match=r"config.compile.*config.compile=none"):
        train(autograd_value_and_grad, kernels=kernels)


def test_error_of_running_compiled_code_is_not_a_compiler_error(capsys):
    def out_of_memory_backend(graph, inputs):
        def run(*args):
            raise torch.OutOfMemoryError("256 GiB")

        return run

    with pytest.raises(torch.OutOfMemoryError):
        compile.compiled(torch.sin, device(out_of_memory_backend), "auto")(torch.ones(2))
    assert not capsys.readouterr().err


def test_error_of_the_function_keeps_its_type():
    with pytest.raises(RuntimeError, match="cannot be multiplied") as error:
        compile.compiled(torch.mm, device("eager"), "auto")(torch.ones(2, 3), torch.ones(2, 3))
    assert type(error.value) is RuntimeError


def test_cpu_is_eager_by_default():
    def function(x):
        return x

    assert compile.compiled(function, devices.get("cpu"), "auto") is function
    assert compile.value_and_grad(devices.get("cpu"), "auto") is autograd_value_and_grad
    assert compile.compiled_blocks(PLAIN, devices.get("cpu"), "auto") is PLAIN
