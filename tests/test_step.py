"""The train step equals a plain PyTorch training loop; accumulation, skipped steps, EMA, freezing, schedules."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from reference import nchw, timm_model

from pcpvt import rng
from pcpvt.functional import flat, optim, precision, schedules, state
from pcpvt.functional.objective import IMAGENET_MEAN, IMAGENET_STD, make_objective
from pcpvt.functional.precision import Policy
from pcpvt.functional.step import autograd_value_and_grad, functional_value_and_grad, make_step, split
from pcpvt.models import pcpvt
from pcpvt.models.init import init

CLASSES = 10


def batches(count: int, size: int, n: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    draws = rng.generator(seed, "test batches")
    return [
        {
            "image": torch.from_numpy(draws.integers(0, 256, (n, size, size, 3), dtype=np.uint8)),
            "label": torch.from_numpy(draws.integers(0, CLASSES, n)),
        }
        for _ in range(count)
    ]


def our_loop(params, name, data, schedule, dtype, steps, **options):
    model = pcpvt.build(name, CLASSES)
    policy = Policy(dtype, dtype, dtype)
    groups = optim.groups(params, 0.05)
    optimizer = optim.chain(optim.clip_by_global_norm(5.0), optim.adamw(schedule, groups, (0.9, 0.999), 1e-8))
    objective = make_objective(model, smoothing=0.1, policy=policy)
    step = make_step(objective, optimizer, global_batch=len(data[0]["label"]), policy=policy, **options)
    params = optim.lay_out(params, groups)
    ts = state.create(params, optimizer.init(params), {}, ema=bool(options.get("ema_decay")))
    history = []
    for i in range(steps):
        ts, metrics = step(ts, data[i % len(data)])
        history.append({k: v.item() for k, v in metrics.items()})
    return ts, history


def plain_loop(model, data, schedule, dtype, steps):
    """torch.optim.AdamW with the reference's groups, clip_grad_norm_, and the same schedule."""
    model = model.to(dtype).train()
    named = dict(model.named_parameters())
    bare = [n for n, p in named.items() if p.ndim == 1 or n.endswith(".bias") or n.startswith("pos_block.")]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for n, p in named.items() if n not in bare], "weight_decay": 0.05},
            {"params": [named[n] for n in bare], "weight_decay": 0.0},
        ],
        lr=1.0,
        eps=1e-8,
    )
    criterion = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
    mean, std = (torch.tensor(v, dtype=torch.float32) for v in (IMAGENET_MEAN, IMAGENET_STD))
    history = []
    for i in range(steps):
        batch = data[i % len(data)]
        x = ((batch["image"].float() - 255 * mean) / (255 * std)).to(dtype)
        loss = criterion(model(nchw(x)), batch["label"])
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        for group in optimizer.param_groups:
            group["lr"] = schedule(i)
        optimizer.step()
        history.append({"loss": loss.item(), "grad_norm": norm.item()})
    return named, history


@pytest.mark.full
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-5), pytest.param(torch.float64, 1e-10, marks=pytest.mark.slow)]
)
def test_twenty_steps_equal_timm_with_torch_adamw_and_clip_grad_norm(dtype, bound):
    """Relative to the norm of each parameter.

    Adam divides a gradient by its magnitude, so where a gradient is near zero its rounding error decides the sign of
    the update. In float32 such elements may differ by up to 2 lr per step; therefore eps is 1e-8 on both sides, lr is
    small, and the bound is on each parameter's norm.
    """
    theirs = timm_model("pcpvt_s", CLASSES)
    data = batches(4, 64, 4)
    schedule = schedules.warmup_cosine(1e-4, 20, 5)
    params = {n: p.detach().to(dtype).clone() for n, p in theirs.named_parameters()}
    start = {n: v.clone() for n, v in params.items()}
    ts, ours = our_loop(params, "pcpvt_s", data, schedule, dtype, 20)
    named, reference = plain_loop(theirs, data, schedule, dtype, 20)
    for mine, other in zip(ours, reference, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=10 * bound)
    assert max(h["grad_norm"] for h in reference) > 5  # clipping had an effect
    for name, value in ts.params.items():
        assert (value - start[name]).norm() > 0, name  # every parameter has changed
        assert (value - named[name]).norm() <= bound * named[name].norm(), name


def nano_state(dtype=torch.float64, seed=0):
    model = pcpvt.build("pcpvt_nano", CLASSES)
    return model, {n: v.to(dtype) for n, v in init(model, seed).items()}


def test_autograd_and_functional_gradients_are_equal():
    model, params = nano_state()
    batch = batches(1, 32, 4)[0]
    objective = make_objective(model, policy=precision.parse("float64"))
    factor = torch.tensor(0.25, dtype=torch.float64)
    for names in (None, ["head.weight", "blocks.0.0.attn.q.weight"]):
        value, grads = autograd_value_and_grad(objective, names)(params, batch, factor)
        other, others = functional_value_and_grad(objective, names)(params, batch, factor)
        assert torch.equal(value, other)
        assert grads.keys() == others.keys() == set(names or params)
        for name in grads:
            torch.testing.assert_close(grads[name], others[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_equals_the_big_batch(parts):
    data = batches(3, 32, 8)
    runs = []
    for accumulate in (1, parts):
        _, params = nano_state()
        ts, history = our_loop(
            params, "pcpvt_nano", data, schedules.constant(1e-3), torch.float64, 3, grad_accum_steps=accumulate
        )
        runs.append((ts, history))
    for name, value in runs[0][0].params.items():
        torch.testing.assert_close(value, runs[1][0].params[name], rtol=1e-11, atol=1e-13)
    assert runs[0][1][-1]["loss"] == pytest.approx(runs[1][1][-1]["loss"], rel=1e-12)


def test_split_keeps_the_order_and_every_entry():
    batch = batches(1, 8, 6)[0]
    parts = split(batch, 3)
    assert [len(p["label"]) for p in parts] == [2, 2, 2]
    assert all(torch.equal(torch.cat([p[k] for p in parts]), batch[k]) for k in batch)


@pytest.mark.parametrize("poison", [float("inf"), float("nan")])
def test_a_non_finite_gradient_changes_only_the_counters(poison):
    model, params = nano_state(torch.float32)
    groups = optim.groups(params, 0.05)
    params = optim.lay_out(params, groups)
    optimizer = optim.chain(optim.clip_by_global_norm(5.0), optim.adamw(schedules.constant(1e-3), groups))
    objective = make_objective(model)
    bad = {"now": False}

    def poisoned(p, b, factor):
        return objective(p, b, factor * (poison if bad["now"] else 1.0))

    step = make_step(poisoned, optimizer, global_batch=4, ema_decay=0.9)
    ts = state.create(params, optimizer.init(params), {}, ema=True)
    data = batches(1, 32, 4)[0]
    ts, _ = step(ts, data)
    before = {n: v.clone() for n, v in state.flatten(ts).items()}
    bad["now"] = True
    for expected in (1, 2):
        ts, metrics = step(ts, data)
        assert metrics["skipped"] == expected
    for name, value in state.flatten(ts).items():
        if name == "step":
            assert value == before[name] + 2
        elif name == "skipped":
            assert value == 2
        else:
            assert torch.equal(value, before[name]), name
    bad["now"] = False
    ts, metrics = step(ts, data)
    assert metrics["skipped"] == 0 and not torch.equal(ts.params["head.weight"], before["params/head.weight"])


def test_ema_is_the_mean_of_the_parameters_with_a_decay_that_rises_to_its_limit():
    _, params = nano_state()
    limit, data = 0.15, batches(3, 32, 4)
    decays = [1 / 10, 0.15, 0.15]  # (1 + t) / (10 + t) is 0.1, 0.18, 0.25
    expected = {n: v.clone() for n, v in params.items()}
    for i, decay in enumerate(decays, start=1):
        _, fresh = nano_state()
        ts, _ = our_loop(fresh, "pcpvt_nano", data, schedules.constant(1e-3), torch.float64, i)
        expected = {n: decay * e + (1 - decay) * ts.params[n] for n, e in expected.items()}
    ts, _ = our_loop(params, "pcpvt_nano", data, schedules.constant(1e-3), torch.float64, 3, ema_decay=limit)
    for name, value in ts.ema.items():
        # The averaging weight is 1 - decay in float32.
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-9)


def test_frozen_parameters_have_no_moments_and_do_not_change():
    model, params = nano_state()
    frozen = [n for n in params if n.startswith(("patch_embeds.0", "blocks.0"))]
    trained = {n: v for n, v in params.items() if n not in frozen}
    groups = optim.groups(trained, 0.05)
    params = optim.lay_out(params, groups)
    optimizer = optim.chain(optim.adamw(schedules.constant(1e-3), groups))
    policy = precision.parse("float64")
    step = make_step(
        make_objective(model, policy=policy), optimizer, global_batch=4, policy=policy, trainable=list(trained)
    )
    before = {n: v.clone() for n, v in params.items()}
    data = batches(1, 64, 4)[0]  # at 32 px the deeper stages have one key, so queries have no gradient
    ts, _ = step(state.create(params, optimizer.init(params), {}, ema=False), data)
    assert ts.opt["mu"].keys() == trained.keys()
    for name, value in ts.params.items():
        assert torch.equal(value, before[name]) == (name in frozen), name


def test_groups_exempt_one_dimensional_parameters_and_position_encodings_from_decay():
    model = pcpvt.build("pcpvt_s", 1000)
    params = {n: torch.empty(s, device="meta") for n, s in pcpvt.shapes(model).items()}
    parts = optim.groups(params, 0.05, pcpvt.layer_decay(model.spec, 0.8))
    names = [n for g in parts for n in g.names]
    assert sorted(names) == sorted(params)
    for group in parts:
        for name in group.names:
            exempt = params[name].ndim == 1 or name.startswith("pos_block.")
            assert group.weight_decay == (0.0 if exempt else 0.05), name
            assert group.lr_scale == pytest.approx(0.8 ** (16 - pcpvt.depth_of(model.spec, name)))


def test_per_step_schedule_warms_up_linearly_and_ends_at_min_lr():
    lr = schedules.warmup_cosine(1e-3, 100, 10, warmup_lr=1e-6, min_lr=1e-5)
    assert lr(0) == 1e-6 and lr(5) == pytest.approx(1e-6 + (1e-3 - 1e-6) / 2) and lr(10) == pytest.approx(1e-3)
    assert lr(55) == pytest.approx(1e-5 + 0.5 * (1e-3 - 1e-5)) and lr(100) == pytest.approx(1e-5)
    values = [lr(i) for i in range(10, 101)]
    assert all(a > b for a, b in itertools.pairwise(values))


def test_reference_schedule_is_timms_stepped_after_each_epoch():
    """The Twins code uses timm's scheduler and calls it with the number of the epoch that has just ended."""
    import reference  # noqa: F401 - makes timm importable
    from timm.scheduler import CosineLRScheduler

    epochs, per_epoch, lr = 30, 7, 1e-3
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=lr)
    theirs = CosineLRScheduler(optimizer, t_initial=epochs, lr_min=1e-5, warmup_t=5, warmup_lr_init=1e-6)
    ours = schedules.reference(lr, epochs, 5, lambda step: step // per_epoch, 1e-6, 1e-5)
    seen = []
    for epoch in range(epochs):
        for i in range(per_epoch):
            assert math.isclose(ours(epoch * per_epoch + i), optimizer.param_groups[0]["lr"], rel_tol=1e-12)
        seen.append(optimizer.param_groups[0]["lr"])
        theirs.step(epoch)
    assert seen[0] == seen[1] == 1e-6 and seen[2] > 1e-6


def test_flattened_state_has_the_names_of_checkpoints():
    _, params = nano_state()
    params = flat.pack(params)
    ts = state.create(params, {"mu": params, "count": torch.zeros(())}, {}, ema=True)
    assert {"params/head.bias", "ema/head.bias", "opt/mu/head.bias", "opt/count", "step", "skipped"} <= state.flatten(
        ts
    ).keys()


def test_the_step_shows_its_gradient_before_anything_has_changed():
    _, params = nano_state()
    (batch,) = batches(1, 32, 4)
    before, seen = optim.lay_out(params, optim.groups(params, 0.05)).flat.clone(), []

    def inspect(ts, own, addends, work):
        assert own is batch and ts.params.flat.equal(before)
        seen.append((int(ts.step), all(map(torch.equal, addends, work(batch)))))
        assert not addends[0].equal(work({name: value[:2] for name, value in batch.items()})[0])

    options = {"name": "pcpvt_nano", "data": [batch], "schedule": schedules.constant(1e-3), "dtype": torch.float64}
    plain, shown = (
        our_loop(params, steps=1, grad_accum_steps=2, **options, **more)[0] for more in ({}, {"inspect": inspect})
    )
    assert seen == [(0, True)] and shown.params.flat.equal(plain.params.flat)
