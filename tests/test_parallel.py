"""One global batch gives the same result with 1, 2 and 4 processes, and all processes take the same decisions."""

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
    """Two steps on this rank's part of the batches; returns the flat state and the metrics of each step.

    Args:
        poison: the rank whose gradient is nan at the second step.
        overflows: the rank whose overflow flag is set at the second step, with a finite gradient.
    """
    model, params = nano_state(torch.float64)
    policy = precision.parse(dtype)
    params = {name: value.to(policy.params) for name, value in params.items()}
    groups = optim.groups(params, 0.05)
    params = optim.lay_out(params, groups)
    optimizer = optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(schedules.constant(1e-3), groups))
    objective = make_objective(model, smoothing=0.1, policy=policy)
    current = {"step": 0}

    def poisoned(params, batch, factor):
        return objective(params, batch, factor * (torch.nan if rank == poison and current["step"] else 1.0))

    flag = Overflow(lambda: None, lambda: torch.tensor(float(rank == overflows and current["step"])))
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
        current["step"] = i
        share = BATCH // size
        ts, metrics = step(ts, {name: value[rank * share : (rank + 1) * share] for name, value in batch.items()})
        history.append({name: value.item() for name, value in metrics.items()})
    return {name: value.clone() for name, value in state.flatten(ts).items()}, history


def train_as_rank(rank: int, size: int, port: int, runs: list[dict], queue) -> None:
    """One process: joins like a process of torchrun, trains, and puts the results into the queue."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    world = collectives.join(devices.get("cpu"), 60)
    results = []
    for options in runs:
        flat, history = train(world.rank, world.size, **options)
        results.append(({name: value.numpy() for name, value in flat.items()}, history))
    collectives.leave()
    queue.put((rank, results))


def train_on(size: int, *runs: dict) -> list[list[tuple[dict, list]]]:
    """The results of each run on each of `size` processes: `[run][rank]`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "test_parallel"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    queue = context.Queue()
    processes = [context.Process(target=train_as_rank, args=(r, size, port, list(runs), queue)) for r in range(size)]
    for process in processes:
        process.start()
    try:
        by_rank = dict(queue.get(timeout=120) for _ in processes)
    finally:
        for process in processes:
            process.join(10)
            process.kill()
    return [[by_rank[rank][i] for rank in range(size)] for i in range(len(runs))]


def same_bits(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(torch.as_tensor(a[n]), torch.as_tensor(b[n])) for n in a)


@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_the_result_does_not_depend_on_the_number_of_processes(size):
    expected_state, expected_history = train()
    first, second = train_on(size, {}, {})
    for flat, history in first:
        assert same_bits(flat, first[0][0]) and history == first[0][1]  # on all ranks
        for name, value in flat.items():
            torch.testing.assert_close(torch.as_tensor(value), expected_state[name], rtol=1e-12, atol=1e-12)
        for metrics, expected in zip(history, expected_history, strict=True):
            assert metrics == pytest.approx(expected, rel=1e-12)
    assert all(same_bits(a[0], b[0]) for a, b in zip(first, second, strict=True))  # and in every run


def test_bad_gradient_on_one_rank_is_skipped_by_all():
    good, nan, flagged, float16 = train_on(
        2,
        {"dtype": "float32"},
        {"dtype": "float32", "poison": 1},
        {"dtype": "float32", "overflows": 1},
        {"dtype": "float16", "overflows": 0, "scaled": True},
    )
    for run in (nan, flagged, float16):
        assert same_bits(run[0][0], run[1][0])
        assert [metrics["skipped"] for metrics in run[0][1]] == [0, 1]
    after_one_step = {name: value for name, value in nan[0][0].items() if name not in ("step", "skipped")}
    assert same_bits(after_one_step, {name: flagged[0][0][name] for name in after_one_step})
    assert not same_bits(after_one_step, {name: good[0][0][name] for name in after_one_step})
    assert float16[0][0]["scale/factor"] == float16[1][0]["scale/factor"] == 2.0**14


def test_psum_keeps_the_dtype_and_shape_of_every_tensor(monkeypatch):
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.all_reduce", lambda bucket: bucket.mul_(2))
    tensors = [torch.tensor(1.5), torch.ones(2, 3, dtype=torch.bfloat16), torch.arange(3.0).expand(2, 3)]
    for before, after in zip(tensors, collectives.psum(tensors), strict=True):
        assert after.dtype == before.dtype and torch.equal(after, before * 2)
