"""One global batch gives one result at 1, 2 and 4 processes, and every process takes the same decisions."""

from __future__ import annotations

import multiprocessing
import os
import socket

import pytest
import torch
from test_compile import recipe_batches
from test_step import nano_state

from pcpvt import devices
from pcpvt.distributed import collectives
from pcpvt.functional import optim, precision, schedules, state
from pcpvt.functional.objective import make_objective
from pcpvt.functional.precision import Overflow
from pcpvt.functional.step import make_step

BATCH = 8


def train(rank: int = 0, size: int = 1, dtype: str = "float64", *, poison: int = -1, overflows: int = -1, scaled=False):
    """Two steps on this rank's part of the batches: flat state and metrics.

    `poison` and `overflows` name the rank whose gradient is not finite, or overflows in secret, at the second step.
    """
    model, params = nano_state(torch.float64)
    policy = precision.parse(dtype)
    params = {name: value.to(policy.params) for name, value in params.items()}
    optimizer = optim.chain(
        optim.clip_by_global_norm(1.0), optim.adamw(schedules.constant(1e-3), optim.groups(params, 0.05))
    )
    objective = make_objective(model, smoothing=0.1, policy=policy)
    now = {"step": 0}

    def poisoned(params, batch, factor):
        return objective(params, batch, factor * (torch.nan if rank == poison and now["step"] else 1.0))

    flag = Overflow(lambda: None, lambda: torch.tensor(float(rank == overflows and now["step"])))
    scaler = precision.DynamicScale() if scaled else precision.NoScale()
    step = make_step(
        poisoned,
        optimizer,
        global_batch=BATCH,
        policy=policy,
        scaler=scaler,
        ema_decay=0.9,
        psum=collectives.psum,
        overflow=flag if overflows >= 0 else None,
    )
    ts = state.create(params, optimizer.init(params), scaler.init(), ema=True)
    history = []
    for i, batch in enumerate(recipe_batches(model, 2, BATCH)):
        now["step"] = i
        share = BATCH // size
        ts, metrics = step(ts, {name: value[rank * share : (rank + 1) * share] for name, value in batch.items()})
        history.append({name: value.item() for name, value in metrics.items()})
    return {name: value.clone() for name, value in state.flatten(ts).items()}, history


def as_rank(rank: int, size: int, port: int, runs: list[dict], queue) -> None:
    """One process: joins as torchrun's would, trains, and sends home what it got."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    world = collectives.join(devices.get("cpu"), 60)
    out = []
    for options in runs:
        flat, history = train(world.rank, world.size, **options)
        out.append(({name: value.numpy() for name, value in flat.items()}, history))
    collectives.leave()
    queue.put((rank, out))


def on(size: int, *runs: dict) -> list[list[tuple[dict, list]]]:
    """The results of each run on each of `size` processes: `[run][rank]`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "test_parallel"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    queue = context.Queue()
    members = [context.Process(target=as_rank, args=(r, size, port, list(runs), queue)) for r in range(size)]
    for member in members:
        member.start()
    try:
        got = dict(queue.get(timeout=120) for _ in members)
    finally:
        for member in members:
            member.join(10)
            member.kill()
    return [[got[rank][i] for rank in range(size)] for i in range(len(runs))]


def same_bits(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(torch.as_tensor(a[n]), torch.as_tensor(b[n])) for n in a)


@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_the_result_does_not_depend_on_the_number_of_processes(size):
    alone, expected = train()
    first, second = on(size, {}, {})
    for flat, history in first:
        assert same_bits(flat, first[0][0]) and history == first[0][1]  # on all ranks
        for name, value in flat.items():
            torch.testing.assert_close(torch.as_tensor(value), alone[name], rtol=1e-12, atol=1e-12)
        for mine, one in zip(history, expected, strict=True):
            assert mine == pytest.approx(one, rel=1e-12)
    assert all(same_bits(a[0], b[0]) for a, b in zip(first, second, strict=True))  # and from run to run


def test_a_bad_gradient_on_one_rank_is_skipped_by_all():
    good, nan, secret, both = on(
        2,
        {"dtype": "float32"},
        {"dtype": "float32", "poison": 1},
        {"dtype": "float32", "overflows": 1},
        {"dtype": "float16", "overflows": 0, "scaled": True},
    )
    for run in (nan, secret, both):
        assert same_bits(run[0][0], run[1][0])
        assert [metrics["skipped"] for metrics in run[0][1]] == [0, 1]
    once = {name: value for name, value in nan[0][0].items() if name not in ("step", "skipped")}
    assert same_bits(once, {name: secret[0][0][name] for name in once})  # both kept the state of the first step
    assert not same_bits(once, {name: good[0][0][name] for name in once})
    assert both[0][0]["scale/factor"] == both[1][0]["scale/factor"] == 2.0**14


def test_the_bucket_gives_every_tensor_its_own_dtype_and_shape(monkeypatch):
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.all_reduce", lambda bucket: bucket.mul_(2))
    tensors = [torch.tensor(1.5), torch.ones(2, 3, dtype=torch.bfloat16), torch.arange(3.0).expand(2, 3)]
    for before, after in zip(tensors, collectives.psum(tensors), strict=True):
        assert after.dtype == before.dtype and torch.equal(after, before * 2)
