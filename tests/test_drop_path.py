"""Drop path: the distribution of rates and factors, and each factor applied once, to its own branch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference import images, nano, nchw, timm_model

from pcpvt import devices, rng
from pcpvt.models import pcpvt
from pcpvt.models.layers import PLAIN


class ScaleBranch(torch.nn.Module):
    """timm's DropPath with given factors."""

    def __init__(self, factors: torch.Tensor):
        super().__init__()
        self.factors = factors

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factors[:, None, None]


@pytest.mark.full
@pytest.mark.parametrize("kernels", ["plain", "cpu"])
def test_logits_and_gradients_are_timms_under_the_same_factors(kernels):
    """Detects a factor that is applied twice, squared, omitted or applied to the other branch."""
    theirs = timm_model("pcpvt_s", num_classes=10).double()
    model = pcpvt.build("pcpvt_s", 10)
    rates = pcpvt.drop_rates(model.spec, 0.5)
    scale = torch.from_numpy(
        np.stack([pcpvt.draw_drop_path_scale(rng.generator(0, "test", i), rates) for i in range(4)])
    ).double()
    assert (scale == 0).sum() > 20 and len(scale.unique()) > 15
    blocks = [block for stage in theirs.blocks for block in stage]
    for i, block in enumerate(blocks):
        block.drop_path1, block.drop_path2 = ScaleBranch(scale[:, 2 * i]), ScaleBranch(scale[:, 2 * i + 1])
    x, y = images(4, 64, 64, 3, dtype=torch.float64), torch.tensor([3, 7, 1, 0])
    expected = theirs(nchw(x))
    reference = torch.autograd.grad(F.cross_entropy(expected, y), list(theirs.parameters()))
    params = {n: p.detach().requires_grad_() for n, p in theirs.named_parameters()}
    own = PLAIN if kernels == "plain" else devices.get("cpu").kernels(torch.float64)
    found = pcpvt.apply(model, params, x, scale, kernels=own)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    grads = torch.autograd.grad(F.cross_entropy(found, y), list(params.values()), materialize_grads=True)
    for name, grad, other in zip(params, grads, reference, strict=True):
        assert (grad - other).abs().max() <= 1e-10 * other.abs().max(), name


def test_drop_path_rates_rise_linearly_and_factors_have_the_right_expectation():
    spec = pcpvt.SPECS["pcpvt_s"]
    rates = pcpvt.drop_rates(spec, 0.2)
    assert len(rates) == 32 and rates[0] == rates[1] == 0 and rates[-1] == pytest.approx(0.2)
    steps = np.diff(rates[::2])
    assert np.allclose(steps, steps[0]) and np.array_equal(rates[::2], rates[1::2])
    draws = np.stack([pcpvt.draw_drop_path_scale(rng.generator(0, "drop_path", 0, i), rates) for i in range(20_000)])
    # A branch is kept with probability 1 - r and scaled by 1 / (1 - r): mean 1, variance r / (1 - r).
    # The tolerance is 5 standard errors.
    assert np.all(np.abs(draws.mean(0) - 1) <= 5 * np.sqrt(rates / (1 - rates) / len(draws)) + 1e-6)
    np.testing.assert_allclose(draws.var(0), rates / (1 - rates), atol=0.02)
    # The two branches of a block are drawn independently.
    assert abs(np.corrcoef(draws[:, -1], draws[:, -2])[0, 1]) < 5 / np.sqrt(len(draws))


def test_drop_path_is_applied_once_per_branch_and_per_sample():
    """With every branch dropped only embeddings and position encodings remain; keeping all changes nothing."""
    model, params = nano()
    x = images(3, 64, 64, 3, dtype=torch.float64)
    ones = torch.ones(3, model.branches)
    assert torch.equal(pcpvt.apply(model, params, x, ones), pcpvt.apply(model, params, x))
    silent = {n: torch.zeros_like(v) if (".proj." in n and "attn" in n) or "fc2" in n else v for n, v in params.items()}
    dropped = ones.clone()
    dropped[1] = 0
    mixed = pcpvt.apply(model, params, x, dropped)
    torch.testing.assert_close(mixed[1], pcpvt.apply(model, silent, x)[1], rtol=1e-12, atol=1e-12)
    assert torch.equal(mixed[[0, 2]], pcpvt.apply(model, params, x)[[0, 2]])
    for branch in range(model.branches):  # each factor scales exactly one branch
        out = []
        for factor in (0.0, 1.0, 2.0):
            scale = ones.clone()
            scale[:, branch] = factor
            out.append(pcpvt.apply(model, params, x, scale))
        assert not torch.equal(out[0], out[1]) and not torch.equal(out[1], out[2])
