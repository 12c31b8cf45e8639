"""Divergence: the error and the file that name the non-finite steps, their samples and the last good checkpoint."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pcpvt.config.plan import Plan
from pcpvt.data import order
from pcpvt.data.sources import Dataset
from pcpvt.errors import UserError
from pcpvt.runtime import records
from pcpvt.runtime.session import Session
from pcpvt.train.history import BadStep

FILE = "nonfinite.json"
LISTED = 8  # sample ids in the message; the file has them all


def divergence_error(
    session: Session, plan: Plan, dataset: Dataset, bad: Sequence[BadStep], last_good: Path | None
) -> UserError:
    """The error that ends the run; also writes `nonfinite.json`, which lists the steps with all their samples.

    Args:
        bad: the non-finite steps in a row, the same on all processes.
        last_good: the newest whole checkpoint.
    """
    config = session.config
    steps: list[dict[str, Any]] = []
    for step, loss, grad_norm, _ in bad:
        draws = order.global_batch(config.seed, step - 1, plan.batch, plan.examples, config.augment.repeats)
        samples = [{"id": draw.index, "name": dataset.name(draw.index)} for draw in draws]
        steps.append({"step": step, "loss": str(loss), "grad_norm": str(grad_norm), "samples": samples})
    where = session.workdir / FILE
    if session.world.is_main:
        with contextlib.suppress(OSError):  # the error matters more than the file
            records.write_json(where, {"steps": steps, "last_good": str(last_good)})
    ids = [sample["id"] for sample in steps[-1]["samples"]]
    more = f" and {len(ids) - LISTED} more" if len(ids) > LISTED else ""
    return UserError(
        f"config.max_skipped: the loss or gradient was not finite {len(bad)} times in a row, up to step {bad[-1].step} "
        f"(samples {', '.join(map(str, ids[:LISTED]))}{more}; all of them in {where}); last good checkpoint: "
        f"{last_good or 'none'}: lower config.lr, or use config.precision=float32"
    )
