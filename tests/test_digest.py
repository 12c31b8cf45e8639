"""Digests: a checksum sees every flipped bit and every exchange, a sketch sees differences above rounding."""

from __future__ import annotations

import random

import pytest
import torch
from test_step import nano_state

from pcpvt.functional import digest, optim, precision, state
from pcpvt.functional.objective import make_objective
from pcpvt.functional.step import autograd_value_and_grad
from pcpvt.train.audit import TOLERANCE
from pcpvt.train.verdict import same


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool])
def test_every_flipped_bit_changes_both_sums(dtype):
    values = torch.arange(3000).to(dtype)
    draw, before = random.Random(0), digest.checksum(values)
    assert before.dtype == torch.int64 and before.shape == (digest.CHECKSUM,)
    memory = values.view(torch.uint8)
    for _ in range(100):
        place, bit = draw.randrange(len(memory)), 1 << draw.randrange(8)
        memory[place] ^= bit
        assert (digest.checksum(values) != before).all()
        memory[place] ^= bit
    assert digest.checksum(values).equal(before)


def test_exchanged_values_change_the_checksum_and_the_shape_does_not_matter():
    values = torch.randn(5, 1024, generator=torch.Generator().manual_seed(0))
    before = digest.checksum(values)
    assert digest.checksum(values.reshape(-1)).equal(before)
    for a, b in ((0, 1), (7, 1024 + 7), (3, 4000)):  # in a row, in a column, elsewhere
        other = values.clone().view(-1)
        other[[a, b]] = other[[b, a]]
        assert not digest.checksum(other).equal(before)
    assert digest.checksum(torch.tensor(0.0)).tolist() == [0, 0]  # padding counts nothing


def test_parts_are_the_flat_tensors_of_a_state():
    _, params = nano_state(torch.float32)
    laid_out = optim.lay_out(params, groups := optim.groups(params, 0.05))
    opt = optim.adamw(lambda step: 1e-3, groups).init(laid_out)
    found = digest.parts(state.create(laid_out, opt, {}, ema=True))
    assert set(found) == {"step", "params", "ema", "opt/count", "opt/mu", "opt/nu", "skipped"}
    assert found["params"] is laid_out.flat


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_another_order_of_addition_is_within_the_tolerance_and_a_wrong_sample_is_not(dtype):
    model, params = nano_state(torch.float32)
    policy = precision.parse(dtype)
    laid_out = optim.lay_out(params, optim.groups(params, 0.05))
    compute = precision.cast(laid_out, policy, True)
    differentiate = autograd_value_and_grad(make_objective(model, policy=policy))
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (16, 32, 32, 3), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 10, (16,), generator=generator)

    def gradient(images, labels):
        _, leaves = differentiate(compute, {"image": images, "label": labels}, torch.tensor(1.0))
        return laid_out.gather(leaves, torch.float32)

    whole = gradient(images, labels)
    halves = gradient(images[:8], labels[:8]) + gradient(images[8:], labels[8:])
    other = gradient(images, torch.cat([labels[:15], (labels[15:] + 1) % 10]))
    tolerance = TOLERANCE[policy.compute]
    first, second, third = (digest.sketch(flat).tolist() for flat in (whole, halves, other))
    change = ((whole - halves).norm() / whole.norm()).item()
    assert 0 < change < tolerance / 5, change  # measured: a tenth
    assert same(first, second, tolerance) and not same(first, third, tolerance)
    assert first[0] == pytest.approx(whole.norm().item(), rel=1e-5)
