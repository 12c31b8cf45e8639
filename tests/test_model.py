"""The model equals timm's in parameters, logits, gradients and features; initialisation and intermediates."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from reference import images, nano, nchw, timm_model
from torch.func import functional_call

from pcpvt.models import pcpvt
from pcpvt.models.init import init

SLOW_B, SLOW_L = (pytest.param(name, marks=pytest.mark.slow) for name in ("pcpvt_b", "pcpvt_l"))
SIZES = ["pcpvt_s", SLOW_B, SLOW_L]


@pytest.mark.parametrize(("name", "count"), [("pcpvt_s", 24_106_216), ("pcpvt_b", 43_828_456), ("pcpvt_l", 60_989_672)])
def test_names_shapes_and_counts_equal_timms(name, count):
    ours = pcpvt.build(name, 1000)
    theirs = {n: p.shape for n, p in timm_model(name).named_parameters()}
    assert pcpvt.shapes(ours) == theirs
    assert pcpvt.n_parameters(ours) == count
    assert not list(ours.buffers()) and all(p.is_meta for p in ours.parameters())


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("pcpvt_s", 224),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("pcpvt_s", 64), ("pcpvt_b", 224), ("pcpvt_l", 224))
        ),
    ],
)
def test_float32_logits_equal_timms_to_1e_5(name, size):
    theirs = timm_model(name).eval()
    x = images(2, size, size, 3)
    with torch.no_grad():
        expected = theirs(nchw(x))
        found = pcpvt.apply(pcpvt.build(name, 1000), dict(theirs.named_parameters()), x)
    assert expected.abs().max() > 0.05
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("name", SIZES)
def test_float64_logits_and_gradients_equal_timms_to_1e_10(name):
    theirs = timm_model(name, num_classes=10).double().eval()
    x, y = images(2, 64, 64, 3, dtype=torch.float64), torch.tensor([3, 7])
    expected = theirs(nchw(x))
    F.cross_entropy(expected, y).backward()
    params = {n: p.detach().clone().requires_grad_() for n, p in theirs.named_parameters()}
    found = pcpvt.apply(pcpvt.build(name, 10), params, x)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    grads = torch.autograd.grad(F.cross_entropy(found, y), list(params.values()))
    for (leaf, parameter), grad in zip(theirs.named_parameters(), grads, strict=True):
        scale = parameter.grad.abs().max()
        assert scale > 0, leaf
        assert (grad - parameter.grad).abs().max() <= 1e-10 * scale, leaf


@pytest.mark.full
@pytest.mark.parametrize("name", ["pcpvt_s", SLOW_L])
def test_float32_gradients_equal_timms_to_1e_4_relative(name):
    theirs = timm_model(name, num_classes=10).eval()
    x, y = images(2, 64, 64, 3), torch.tensor([3, 7])
    F.cross_entropy(theirs(nchw(x)), y).backward()
    params = {n: p.detach().clone().requires_grad_() for n, p in theirs.named_parameters()}
    loss = F.cross_entropy(pcpvt.apply(pcpvt.build(name, 10), params, x), y)
    for (leaf, parameter), grad in zip(
        theirs.named_parameters(), torch.autograd.grad(loss, list(params.values())), strict=True
    ):
        assert (grad - parameter.grad).norm() <= 1e-4 * parameter.grad.norm(), leaf


def test_init_has_the_references_statistics_and_depends_only_on_the_seed():
    model = pcpvt.build("pcpvt_s", 1000)
    params, theirs = init(model, 0), dict(timm_model("pcpvt_s").named_parameters())
    for name, value in params.items():
        assert value.shape == theirs[name].shape
        if value.ndim > 1:
            # The standard error of a standard deviation over n normals is std / sqrt(2 n); six of them on each side.
            bound = 6 * theirs[name].std().item() * 2 / (2 * value.numel()) ** 0.5
            assert abs(value.std().item() - theirs[name].std().item()) < bound, name
            assert abs(value.mean().item()) < 6 * value.std().item() / value.numel() ** 0.5, name
        else:
            assert (value == (1.0 if name.endswith("weight") else 0.0)).all(), name
    again, other = init(model, 0), init(model, 1)
    assert all(torch.equal(params[n], again[n]) for n in params)
    assert not torch.equal(params["head.weight"], other["head.weight"])
    smaller = init(pcpvt.build("pcpvt_s", 10), 0)
    assert all(torch.equal(params[n], smaller[n]) for n in params if not n.startswith("head"))


def test_functional_call_takes_any_parameters_and_leaves_the_module_empty():
    model, params = nano()
    x = images(2, 64, 64, 3, dtype=torch.float64)
    first = functional_call(model, params, (x,))
    doubled = functional_call(model, {**params, "head.weight": params["head.weight"] * 2}, (x,))
    torch.testing.assert_close(doubled, first * 2)  # the head's bias is zero
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "dtype", "tolerance"),
    [
        ("pcpvt_s", torch.float32, 1e-5),
        ("pcpvt_s", torch.float64, 1e-10),
        pytest.param("pcpvt_l", torch.float64, 1e-10, marks=pytest.mark.slow),
    ],
)
def test_features_equal_timms_intermediates_at_four_strides(name, dtype, tolerance):
    theirs = timm_model(name).to(dtype).eval()
    x = images(1, 96, 64, 3, dtype=dtype)
    with torch.no_grad():
        expected = theirs.forward_intermediates(nchw(x), intermediates_only=True)
        found = pcpvt.features(pcpvt.build(name, 1000), dict(theirs.named_parameters()), x)
    assert [tuple(m.shape) for m in found] == [(1, 64, 24, 16), (1, 128, 12, 8), (1, 320, 6, 4), (1, 512, 3, 2)]
    for ours, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, reference, rtol=tolerance, atol=tolerance)


def test_features_are_differentiable_in_params_and_images():
    model, params = nano()
    params = {n: v.requires_grad_() for n, v in params.items()}
    x = images(1, 64, 64, 3, dtype=torch.float64).requires_grad_()
    total = sum(m.square().sum() for m in pcpvt.features(model, params, x))
    used = {n: v for n, v in params.items() if not n.startswith(("head", "norm."))}
    grads = torch.autograd.grad(total, [x, *used.values()])
    assert all(g.isfinite().all() and g.abs().max() > 0 for g in grads)


def test_features_compile_into_one_graph_with_the_same_gradient():
    model, params = nano()
    fast = torch.compile(lambda p, x: pcpvt.features(model, p, x), backend="aot_eager", fullgraph=True)
    x = images(1, 64, 64, 3, dtype=torch.float64)
    used = {n: v.requires_grad_() for n, v in params.items() if not n.startswith(("head", "norm."))}

    def both(function):
        maps = function(params, x)
        return [*maps, *torch.autograd.grad(sum(m.square().sum() for m in maps), list(used.values()))]

    for ours, reference in zip(both(fast), both(lambda p, x: pcpvt.features(model, p, x)), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12 * reference.abs().max().item())


def test_intermediates_are_named_and_leave_the_logits_unchanged():
    model, params = nano()
    x = images(2, 64, 64, 3, dtype=torch.float64)
    logits, out = pcpvt.intermediates(model, params, x)
    assert torch.equal(logits, pcpvt.apply(model, params, x)) and torch.equal(logits, out["logits"])
    blocks = {f"blocks.{s}.{i}" for s, depth in enumerate(model.spec.depths) for i in range(depth)}
    assert set(out) == {"pooled", "logits", *(f"stages.{s}" for s in range(4)), *blocks}

    logits, both = pcpvt.intermediates(model, params, x, attention=True)
    assert torch.equal(logits, out["logits"]) and set(both) == set(out) | {f"{name}.attention" for name in blocks}
    assert both["blocks.0.0.attention"].shape == (2, 1, 256, 4)  # heads, 16x16 tokens, 2x2 keys
    for name in blocks:
        rows = both[f"{name}.attention"].sum(-1)
        torch.testing.assert_close(rows, torch.ones_like(rows))


def test_plain_attention_is_softmax_attention():
    from pcpvt.models.layers import attend_plain

    q, k, v = (images(2, 3, n, 8, dtype=torch.float64, seed=seed) for seed, n in enumerate((10, 5, 5)))
    torch.testing.assert_close(attend_plain(q, k, v), F.scaled_dot_product_attention(q, k, v), rtol=1e-12, atol=1e-12)


def test_layer_depths_count_blocks_from_the_stem_to_the_head():
    spec = pcpvt.SPECS["pcpvt_s"]
    depth = {n: pcpvt.depth_of(spec, n) for n in pcpvt.shapes(pcpvt.build("pcpvt_s", 10))}
    assert depth["patch_embeds.0.proj.weight"] == 0 and depth["blocks.0.0.norm1.bias"] == 0
    assert (
        depth["patch_embeds.2.proj.weight"] == depth["pos_block.2.proj.0.bias"] == depth["blocks.2.0.attn.q.bias"] == 7
    )
    assert depth["blocks.3.2.mlp.fc1.weight"] == 15 and depth["head.bias"] == depth["norm.weight"] == 16
    scale = pcpvt.layer_decay(spec, 0.5)
    assert scale("head.weight") == 1 and scale("blocks.3.2.norm1.bias") == 0.5 and scale("norm.bias") == 1
