"""Compiled and eager runs agree; nothing is compiled twice; what cannot be compiled is said, or stops the run."""

from __future__ import annotations

import shutil

import pytest
import torch
from test_step import batches, nano_state

from pcpvt import devices, errors, rng
from pcpvt.devices import compile
from pcpvt.errors import UserError
from pcpvt.functional import mixing, optim, precision, schedules, state
from pcpvt.functional.objective import make_objective, make_predict
from pcpvt.functional.step import autograd_value_and_grad, functional_value_and_grad, make_step
from pcpvt.models import pcpvt
from pcpvt.models.layers import PLAIN, Block, Kernels


class Counting:
    """A dynamo backend that runs what it was given as it is, and counts."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def device(default: object = "none"):
    cpu = devices.get("cpu")
    cpu.default_compile = default
    return cpu


def recipe_batches(model, count: int, n: int) -> list[dict[str, torch.Tensor]]:
    """Batches with every draw that a recipe can have."""
    rates = pcpvt.drop_rates(model.spec, 0.5)
    made = batches(count, 32, n)
    for i, batch in enumerate(made):
        draws = rng.generator(i, "test draws")
        lam, box = mixing.mixing_draws(draws, n, (32, 32), mixing.MixSpec(mode="elem"))
        batch["lam"], batch["box"] = torch.from_numpy(lam), torch.from_numpy(box)
        batch["drop_path_scale"] = torch.stack(
            [torch.from_numpy(pcpvt.draw_drop_path_scale(draws, rates)) for _ in range(n)]
        )
        batch["erase"] = torch.tensor([[2, 9, 3, 20]] * n, dtype=torch.int32)
    return made


def train(seam, steps: int = 3, kernels: Kernels = PLAIN):
    """The state and the losses after a few steps with two micro-batches each."""
    model, params = nano_state(torch.float32)
    optimizer = optim.chain(optim.adamw(schedules.constant(1e-3), optim.groups(params, 0.05)))
    policy = precision.parse("bfloat16")
    objective = make_objective(model, smoothing=0.1, policy=policy, kernels=kernels)
    step = make_step(objective, optimizer, global_batch=8, grad_accum_steps=2, policy=policy, value_and_grad=seam)
    ts, losses = state.create(params, optimizer.init(params), {}, ema=False), []
    for batch in recipe_batches(model, steps, 8):
        ts, metrics = step(ts, batch)
        losses.append(metrics["loss"].item())
    return ts, losses


def assert_same_run(found, expected):
    """Two results of `train` are equal to the bit."""
    (ts, losses), (reference, theirs) = found, expected
    assert losses == theirs and len(set(losses)) == 3
    for name, value in ts.params.items():
        assert torch.equal(value, reference.params[name]), name


def test_a_run_compiles_its_gradient_once_and_equals_eager_to_the_bit():
    """The counting backend runs the operators that were traced: a draw or a number frozen into the graph would show.

    tests/test_step.py holds the two ways of taking a gradient against each other.
    """
    count = Counting()
    found = train(compile.value_and_grad(device(), count))
    assert count.graphs == 1
    assert_same_run(found, train(functional_value_and_grad))


def test_evaluation_compiles_once_and_its_padded_last_batch_too():
    count = Counting()
    model, params = nano_state(torch.float32)
    predict = make_predict(model)
    fast = compile.compiled(predict, device(), count)
    for batch in [*batches(2, 32, 4), {"image": torch.zeros(4, 32, 32, 3, dtype=torch.uint8)}]:
        assert torch.equal(fast(params, batch["image"]), predict(params, batch["image"]))
    assert count.graphs == 1


def blocks(backend: object, falls_back: bool = False) -> Kernels:
    return PLAIN._replace(block_fn=compile.Blocks(PLAIN, backend, errors.warn if falls_back else None))


def test_all_blocks_of_a_stage_share_one_compiled_code_and_equal_eager_to_the_bit():
    """Two blocks of the first stage and one of each other: four graphs, for every step and micro-batch."""
    count = Counting()
    kernels = blocks(count)
    found = train(autograd_value_and_grad, kernels=kernels)
    assert count.graphs == 4
    assert_same_run(found, train(autograd_value_and_grad))


def test_a_model_of_many_image_sizes_stays_compiled():
    count = Counting()
    model, params = nano_state(torch.float32)
    predict = make_predict(model, kernels=blocks(count))
    for side in (32, 64, 96):
        images = torch.full((1, side, side, 3), 7, dtype=torch.uint8)
        assert torch.equal(predict(params, images), make_predict(model)(params, images))
    assert count.graphs == 12


def test_compiled_blocks_hide_no_attention_from_intermediates():
    model, params = nano_state(torch.float32)
    images = torch.randn(1, 32, 32, 3, generator=torch.Generator().manual_seed(0))
    logits, found = pcpvt.intermediates(model, params, images, attention=True, kernels=blocks("eager"))
    expected, reference = pcpvt.intermediates(model, params, images, attention=True)
    torch.testing.assert_close(logits, expected)
    assert found.keys() == reference.keys()


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
            class Around(torch.nn.Module):
                def __init__(self):
                    super().__init__()
                    self.block = block

                def forward(self):
                    return kernels.block_fn(self.block, batch["x"], kernels, batch["drop_path_scale"])

            inside = {f"block.{n}": v for n, v in params.items()}
            return torch.func.functional_call(Around(), inside, ()).square().sum() * factor

        return compile.value_and_grad(cpu, choice)(objective)(params, batch, torch.tensor(0.5))

    value, grads = gradient("inductor")
    expected, reference = gradient("none")
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(grads, reference, rtol=1e-4, atol=1e-5)


def broken(graph, inputs):
    raise RuntimeError("no such instruction\nand a second line")


def squares(params, batch, factor):
    return (params["w"] * batch["x"]).square().sum() * factor


ARGS = {"w": torch.tensor([1.0, 2.0])}, {"x": torch.tensor([3.0, 4.0])}, torch.tensor(0.5)


def test_auto_goes_on_in_eager_mode_with_one_warning(capsys):
    fast = compile.value_and_grad(device(broken), "auto")(squares)
    for _ in range(3):
        value, grads = fast(*ARGS)
        assert value == 36.5 and grads["w"].tolist() == [9.0, 32.0]
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1 and "no such instruction" in warning and "going on without" in warning


def test_a_backend_that_was_named_stops_the_run_in_one_line():
    for choice in (broken, "no_such_backend"):
        fast = compile.value_and_grad(device(), choice)(squares)
        with pytest.raises(UserError, match=r"config.compile.*config.compile=none") as error:
            fast(*ARGS)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("fails", [pytest.param("forward", marks=pytest.mark.slow), "backward"])
def test_blocks_that_cannot_be_compiled_run_in_eager_mode_with_one_warning(fails, capsys):
    from torch._dynamo.backends.common import aot_autograd

    def backend(graph, inputs):
        return aot_autograd(**{"fw_compiler": lambda g, _: g, "bw_compiler": lambda g, _: g} | {part: broken})(
            graph, inputs
        )

    part = "fw_compiler" if fails == "forward" else "bw_compiler"
    kernels = blocks(backend, falls_back=True)
    assert_same_run(train(autograd_value_and_grad, kernels=kernels), train(autograd_value_and_grad))
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1 and "no such instruction" in warning and "going on without" in warning

    kernels = blocks(backend)
    with pytest.raises(UserError, match=r"config.compile.*config.compile=none"):
        train(autograd_value_and_grad, kernels=kernels)


def test_an_error_while_compiled_code_runs_is_no_failure_to_compile(capsys):
    def full(graph, inputs):
        def run(*args):
            raise torch.OutOfMemoryError("256 GiB")

        return run

    with pytest.raises(torch.OutOfMemoryError):
        compile.compiled(torch.sin, device(full), "auto")(torch.ones(2))
    assert not capsys.readouterr().err


def test_an_error_of_the_function_itself_keeps_its_type():
    with pytest.raises(RuntimeError, match="cannot be multiplied") as error:
        compile.compiled(torch.mm, device("eager"), "auto")(torch.ones(2, 3), torch.ones(2, 3))
    assert type(error.value) is RuntimeError


def test_cpu_is_eager_by_default():
    def function(x):
        return x

    assert compile.compiled(function, devices.get("cpu"), "auto") is function
    assert compile.value_and_grad(devices.get("cpu"), "auto") is autograd_value_and_grad
    assert compile.compiled_blocks(PLAIN, devices.get("cpu"), "auto") is PLAIN
