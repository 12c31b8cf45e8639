"""The loop with a size schedule, here from a size that is padded: speed, MFU, and what is tried beforehand."""

from __future__ import annotations

import pytest
from test_config import config

from pcpvt.checkpoints.writer import Saver
from pcpvt.runtime import session as sessions
from pcpvt.train import loop, preparation
from pcpvt.train.history import Rate
from pcpvt.train.setup import prepare
from pcpvt.train.utilisation import forward_flops
from pcpvt.train.writers import Writer


class Kept(Writer):
    """Keeps the records."""

    def __init__(self):
        self.entries = []

    def record(self, entry):
        self.entries.append(entry)


class Timed(Rate):
    """Keeps the seconds of every step."""

    steps: list[float]

    def add(self, images, seconds, waited=0.0):
        Timed.steps.append(seconds)
        super().add(images, seconds, waited)


def test_records_have_the_speed_and_the_mfu_of_their_own_size(tmp_path, monkeypatch):
    c = config("cpu", **{"model.name": "pcpvt_nano", "steps": 6, "epochs": None, "batch_size": 8, "warmup_epochs": 0.0})
    c.update(size_schedule="20@0,32@0.5", log_every="1 steps", eval_every="0", save_every="0", precision="float32")
    monkeypatch.setattr(loop, "stop_requested", lambda: False)
    monkeypatch.setattr(loop.signals, "finish_step_first", lambda *_: None)
    monkeypatch.setattr(loop, "Rate", Timed)
    Timed.steps, tried, of_sizes = [], [], preparation.of_sizes

    def counted(*args):
        inspect = of_sizes(*args)
        return lambda state, batch, addends, work: inspect(
            state, batch, addends, lambda other: tried.append((int(state.step), other["image"].shape[1])) or work(other)
        )

    monkeypatch.setattr(preparation, "of_sizes", counted)
    setup, state, history = prepare(sessions.start(c, tmp_path / "run"))
    setup, kept = setup._replace(peak_flops=1e7), Kept()  # a number that MFU's four digits are not lost in
    saver = Saver(tmp_path, 1, print, before=[], saved=6, writes=False)
    loop.train(setup, state, history, [kept], saver)

    assert tried == [(0, 32)]  # inside the first step
    assert [entry["image_size"] for entry in kept.entries] == [20, 20, 20, 32, 32, 32]
    for first, entries in ((1, kept.entries[1:3]), (3, kept.entries[3:])):  # the first step of a run is not counted
        for i, entry in enumerate(entries):
            seconds = Timed.steps[first : first + i + 1]
            speed = 8 * len(seconds) / sum(seconds)
            flops = forward_flops(setup.model, (entry["image_size"],) * 2)
            assert entry["images_per_sec"] == pytest.approx(speed, abs=0.01)
            assert entry["mfu"] == pytest.approx(3 * flops * speed / 1e7, rel=1e-3)
