"""The whole loop of a training, measured: loader, transfer and step together, on the configured data."""

from __future__ import annotations

import time
from typing import Any

from pcpvt.bench.timing import once
from pcpvt.config.plan import make_plan
from pcpvt.data.loader import Loader
from pcpvt.runtime import session as sessions
from pcpvt.runtime.session import Session
from pcpvt.train import setup


def measure(session: Session) -> dict[str, Any]:
    """Images/s, and the share of the time that the loop waited for data, over `config.bench.steps` steps."""
    config, device = session.config, session.device
    source = sessions.open_data(session, "train")
    model = sessions.build_model(config, sessions.count_classes(config, source))
    micro = device.micro_batch(session.size, session.policy.compute, model.branches // 2)
    plan = make_plan(config, examples=len(source), num_classes=model.num_classes, micro_batch=micro)
    params, _ = setup.init_params(session, model)
    optimizer = setup.optimizer(session, plan, params)
    state = setup.init_state(session, params, optimizer)
    step = setup.train_step(session, model, plan, optimizer)
    workers = sessions.workers(session, source)
    warm = 2 * workers + 2  # uses up what was read ahead while the first step started or was compiled
    batches = setup.train_batches(session, model, source)
    steps = range(warm + config.bench.steps)
    loader = Loader(batches, steps, workers, start=device.worker_start, pin=device.pins_memory)
    ready = iter(device.prefetch(loader))

    def advance(steps: int) -> float:
        """Goes on by `steps`; returns the seconds that it waited for data."""
        nonlocal state
        waited = 0.0
        for _ in range(steps):
            began = time.perf_counter()
            batch = next(ready)
            waited += time.perf_counter() - began
            state, _ = step(state, batch)
        return waited

    advance(warm)
    waited = 0.0

    def measured() -> None:
        nonlocal waited
        waited = advance(config.bench.steps)

    seconds, disturbed = once(device, measured)
    return {
        "images_per_sec": round(config.bench.steps * plan.batch / seconds, 3),
        "waiting": round(waited / seconds, 4),
        "workers": workers,
        "disturbed": disturbed,
    }
