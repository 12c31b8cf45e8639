"""Flat parameters: order, alignment, patch weights, gradients by name, the norm, one update per group."""

from __future__ import annotations

import pytest
import torch
from test_step import nano_state

from pcpvt.functional import optim, schedules
from pcpvt.functional.flat import ALIGNMENT, Flat, norm
from pcpvt.models import pcpvt


def nano(layer_decay: float = 0.8) -> tuple[dict[str, torch.Tensor], list[optim.Group], Flat]:
    """Parameters of which the first patch embedding is frozen, the groups of the others, and all laid out."""
    model, params = nano_state(torch.float32)
    trained = {name: value for name, value in params.items() if not name.startswith("patch_embeds.0")}
    groups = optim.groups(trained, 0.05, pcpvt.layer_decay(model.spec, layer_decay))
    return params, groups, optim.lay_out(params, groups)


def test_views_are_the_parameters_group_after_group_and_frozen_ones_last():
    params, groups, flat = nano()
    names = [name for group in groups for name in group.names]
    assert list(flat) == [*names, *(name for name in params if name.startswith("patch_embeds.0"))]
    assert all(torch.equal(flat[name], value) for name, value in params.items())
    covered = torch.zeros_like(flat.flat)
    for name, view in flat.items():
        assert view.data_ptr() == flat.flat.data_ptr() + 4 * flat.span([name]).start
        assert flat.span([name]).start % ALIGNMENT == 0 and view.shape == params[name].shape
        view.add_(1e3)  # writes through to the flat tensor
        covered[flat.span([name])][: view.numel()] = 1
    assert torch.equal(flat.flat > 500, covered == 1) and not flat.flat[covered == 0].any()
    for group in groups:
        part = flat.span(group.names)
        assert covered[part].sum() == sum(params[name].numel() for name in group.names)


def test_patch_weights_lie_in_the_order_of_their_linear_map():
    _, _, flat = nano()
    weight = flat["patch_embeds.1.proj.weight"]
    assert weight.permute(0, 2, 3, 1).is_contiguous() and not weight.is_contiguous()


def test_norms_come_last_so_that_neighbours_have_one_compute_dtype():
    _, groups, _ = nano()
    norms = ["norm" in name for group in groups for name in group.names]
    assert norms == sorted(norms) and any(norms)
    assert all(len({optim.is_norm(name) for name in group.names}) == 1 for group in groups)


def test_gradients_are_gathered_by_name_whatever_their_order_dtype_and_strides():
    _, groups, flat = nano()
    names = [name for group in groups for name in group.names]
    narrow = {name: torch.randn(flat[name].shape).to(torch.bfloat16) for name in reversed(names)}
    mixed = {name: value.float() if optim.is_norm(name) else value for name, value in narrow.items()}
    strided = {name: value.mT.clone().mT if value.ndim == 2 else value for name, value in narrow.items()}
    for given in (narrow, mixed, strided):
        gathered = flat.zeros(names)
        gathered.flat.copy_(flat.gather(given, torch.float32))
        assert gathered.flat.dtype == torch.float32
        assert all(torch.equal(gathered[name], value.float()) for name, value in narrow.items())
    with pytest.raises(AssertionError, match="not the first"):
        flat.gather({name: value for name, value in narrow.items() if name != names[0]}, torch.float32)
    with pytest.raises(AssertionError, match="do not follow each other"):
        flat.zeros([names[0], names[2]])


def test_norm_is_exact_to_float32_where_one_long_sum_is_not():
    value = torch.rand(24_000_512 // 4096 * 4096, generator=torch.Generator().manual_seed(0))
    exact = value.double().norm()
    assert abs(norm(value) - exact) / exact < 1e-6


def test_update_equals_torch_adamw_parameter_by_parameter():
    """Differences stay below one unit in the last place: the kernel's vector loop and its tail round differently."""
    params, groups, flat = nano()
    leaves = {name: params[name].clone().requires_grad_() for group in groups for name in group.names}
    reference = torch.optim.AdamW(
        [
            {"params": [leaves[n] for n in g.names], "lr": 1e-3 * g.lr_scale, "weight_decay": g.weight_decay}
            for g in groups
        ],
        fused=True,
    )
    optimizer = optim.chain(optim.adamw(schedules.constant(1e-3), groups))
    moments = optimizer.init(flat)
    for seed in range(3):
        draws = torch.Generator().manual_seed(seed)
        for leaf in leaves.values():
            leaf.grad = torch.randn(leaf.shape, generator=draws)
        total = flat.gather({name: leaf.grad for name, leaf in leaves.items()}, torch.float32)
        flat, moments = optimizer.update(optim.gradients(total, torch.ones(())), moments, flat, seed, torch.zeros(()))
        reference.step()
    for name, value in params.items():
        assert torch.equal(flat[name], value) == (name not in leaves), name
        torch.testing.assert_close(flat[name], leaves[name].detach() if name in leaves else value, rtol=2e-7, atol=1e-9)
