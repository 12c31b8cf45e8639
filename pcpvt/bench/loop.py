"""Throughput of the whole training loop on the configured data: loader, transfer and train step together."""

from __future__ import annotations

import time
from typing import Any

from pcpvt.bench.parts import Training
from pcpvt.bench.timing import once
from pcpvt.data.loader import Loader
from pcpvt.runtime import session as sessions
from pcpvt.runtime.session import Session
from pcpvt.train import setup


def measure(session: Session) -> dict[str, Any]:
    """Images/s, and the share of the time spent waiting for data, over `config.bench.steps` steps."""
    config, device, steps = session.config, session.device, session.config.bench.steps
    source = sessions.open_data(session, "train")
    training = Training(session, sessions.count_classes(config, source), len(source))
    batches = setup.train_batches(session, training.model, source)
    workers = sessions.workers(session, source)
    warm_up = 2 * workers + 2  # uses up what was read ahead while the first step started or was compiled
    loader = Loader(batches, range(warm_up + steps), workers, start=device.worker_start, pin=device.pins_memory)
    ready = iter(device.prefetch(loader))
    waits: list[float] = []  # seconds by step

    def advance(count: int) -> None:
        for _ in range(count):
            began = time.perf_counter()
            batch = next(ready)
            waits.append(time.perf_counter() - began)
            training.advance(batch)

    advance(warm_up)
    waits.clear()
    seconds, disturbed = once(device, lambda: advance(steps))
    return {
        "images_per_sec": round(steps * training.plan.batch / seconds, 3),
        "waiting": round(sum(waits) / seconds, 4),
        "workers": workers,
        "disturbed": disturbed,
    }
