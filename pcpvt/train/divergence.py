"""What to say, and to keep, when step after step is not finite: which steps, which samples, and where to go on from."""

from __future__ import annotations

import contextlib
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


def explain(session: Session, plan: Plan, source: Dataset, bad: list[BadStep], last_good: Path | None) -> UserError:
    """The error that ends the run; `nonfinite.json` in the workdir lists the steps with all their samples.

    Args:
        bad: the steps that were not finite, all processes agreeing on them.
        last_good: the newest whole checkpoint.
    """
    config = session.config
    steps: list[dict[str, Any]] = []
    for step, loss, grad_norm in bad:
        draws = order.global_batch(config.seed, step - 1, plan.batch, plan.examples, config.augment.repeats)
        samples = [{"id": draw.index, "name": source.name(draw.index)} for draw in draws]
        steps.append({"step": step, "loss": str(loss), "grad_norm": str(grad_norm), "samples": samples})
    where = session.workdir / FILE
    if session.world.is_main:
        with contextlib.suppress(OSError):  # the message must come, disk or not
            records.write_json(where, {"steps": steps, "last_good": str(last_good)})
    ids = [sample["id"] for sample in steps[-1]["samples"]]
    more = f" and {len(ids) - LISTED} more" if len(ids) > LISTED else ""
    return UserError(
        f"config.max_skipped: the loss or gradient was not finite {len(bad)} times in a row, up to step {bad[-1].step} "
        f"(samples {', '.join(map(str, ids[:LISTED]))}{more}; all of them in {where}); last good checkpoint: "
        f"{last_good or 'none'}: lower config.lr, or use config.precision=float32"
    )
