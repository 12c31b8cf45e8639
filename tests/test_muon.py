"""Muon against torch.optim.Muon, its skipped steps, its layout beside AdamW, and a run that is resumed."""

from __future__ import annotations

import miniature
import pytest
import torch
from test_step import nano_state

from pcpvt.functional import muon, optim, schedules
from pcpvt.functional.flat import Flat
from pcpvt.models import pcpvt

LR, DECAY = 1e-2, 0.05


def laid_out(dtype: torch.dtype = torch.float32) -> tuple[list[optim.Group], Flat, optim.Optimizer]:
    """The nano model's parameters, their groups, and Muon with AdamW, whose iterations are in `dtype`."""
    model, params = nano_state(dtype)
    groups = optim.groups(params, DECAY, pcpvt.layer_decay(model.spec, 0.9), muon.is_matrix)
    matrices, others = [g for g in groups if g.matrix], [g for g in groups if not g.matrix]
    schedule = schedules.constant(LR)
    both = optim.together(muon.muon(schedule, matrices, dtype), optim.adamw(schedule, others))
    return groups, optim.lay_out(params, groups), optim.chain(both)


def gradient(flat: Flat, seed: int) -> dict[str, torch.Tensor]:
    draws = torch.Generator().manual_seed(seed)
    return {name: torch.randn(value.shape, generator=draws, dtype=value.dtype) for name, value in flat.items()}


def test_twenty_steps_equal_torch_muon_and_adamw_in_float64(monkeypatch):
    """torch's iterations are in bfloat16; without that cast both do the same arithmetic."""

    class InFloat64:
        bfloat16 = torch.float64

        def __getattr__(self, name: str):
            return getattr(torch, name)

    monkeypatch.setattr(torch.optim._muon, "torch", InFloat64())  # from 2.15
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)  # before
    groups, flat, optimizer = laid_out(torch.float64)
    leaves = {name: value.clone().requires_grad_() for name, value in flat.items()}
    references = [
        (torch.optim.Muon if group.matrix else torch.optim.AdamW)(
            [leaves[name] for name in group.names],
            lr=LR * group.lr_scale,
            weight_decay=group.weight_decay,
            **({"adjust_lr_fn": "match_rms_adamw"} if group.matrix else {}),
        )
        for group in groups
    ]
    state = optimizer.init(flat)
    for step in range(20):
        grads = gradient(flat, step)
        for name, leaf in leaves.items():
            leaf.grad = grads[name].clone()
        total = optim.gradients(flat.gather(grads, torch.float64) * 8, torch.tensor(8.0, dtype=torch.float64))
        flat, state = optimizer.update(total, state, flat, step, torch.zeros(()))
        for reference in references:
            reference.step()
    for name, value in flat.items():
        torch.testing.assert_close(value, leaves[name].detach(), rtol=1e-9, atol=1e-11)


def test_matrices_of_blocks_and_no_others_are_muons():
    groups, flat, optimizer = laid_out()
    names = {name for group in groups if group.matrix for name in group.names}
    assert names == {n for n, v in flat.items() if n.startswith("blocks.") and n.endswith(".weight") and v.ndim == 2}
    assert not any("norm" in name for name in names) and "head.weight" not in names
    state = optimizer.init(flat)
    assert set(state["momentum"]) == names and set(state["mu"]) == set(state["nu"]) == set(flat) - names


def test_directions_have_singular_values_near_one():
    for shape in ((3, 32, 128), (3, 128, 32)):
        matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        directions = muon.orthogonal(matrices, torch.float32)
        values = torch.linalg.svdvals(directions)
        assert values.min() > 0.6 and values.max() < 1.3, (shape, values)
        u, _, v = torch.linalg.svd(matrices, full_matrices=False)
        turned = u.mT @ directions @ v.mT  # diagonal, where the singular vectors are the same
        assert (turned - torch.diag_embed(turned.diagonal(dim1=1, dim2=2))).abs().max() < 1e-4


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_skipped_step_changes_nothing(poison):
    _, flat, optimizer = laid_out()
    state = optimizer.init(flat)
    total = optim.gradients(flat.gather(gradient(flat, 0), torch.float32), torch.ones(()))
    flat, state = optimizer.update(total, state, flat, 0, torch.zeros(()))
    before = [flat.flat.clone(), *(state[key].flat.clone() for key in ("momentum", "mu", "nu"))]
    bad = optim.gradients(torch.full_like(total.flat, poison), torch.ones(()))
    flat, state = optimizer.update(bad, state, flat, 1, torch.ones(()))
    after = [flat.flat, *(state[key].flat for key in ("momentum", "mu", "nu"))]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_run_with_muon_goes_on_exactly_after_an_interruption(tmp_path):
    fields = {"optimizer": "muon", "steps": 8, "restarts": 0}
    assert miniature.run(miniature.words(tmp_path / "whole", **fields)).code == 0
    stop = {"at": "step", "n": 5, "do": "SIGTERM"}
    assert miniature.run(miniature.words(tmp_path / "cut", **fields), stop).code == 75
    assert miniature.run(miniature.words(tmp_path / "cut", **fields)).code == 0
    miniature.assert_same_run(tmp_path / "cut", tmp_path / "whole")
