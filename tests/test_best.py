"""What the best evaluation is (`config.best`), and the end of a run that no longer improves (`config.patience`)."""

from __future__ import annotations

import json
import math

import miniature
import pytest

from pcpvt.checkpoints import checkpoint
from pcpvt.functional.metrics import score
from pcpvt.train.history import History, add_evaluation

NAN = math.nan


def metrics(acc1: float, loss: float, balanced: float = 0.0) -> dict[str, float]:
    return {"acc1": acc1, "acc5": 100.0, "balanced_acc": balanced, "macro_f1": 0.0, "loss": loss, "seen": 8}


SERIES = [
    metrics(50, 2, 60),
    metrics(60, 3, 10),
    metrics(60, 1, 10),
    metrics(60, 1, 70),
    metrics(60, NAN),
    metrics(1, 0.5),
]


@pytest.mark.parametrize(
    ("by", "best", "stale"),
    [("acc1", [1, 2, 3, 4, 4, 4], [0, 0, 0, 1, 2, 3]), ("loss", [1, 1, 3, 4, 4, 6], [0, 1, 0, 1, 2, 0]),
     ("balanced_acc", [1, 1, 1, 4, 4, 4], [0, 1, 2, 0, 1, 2])],
)  # fmt: skip
def test_the_best_is_by_the_field_then_by_lower_loss_then_later(by, best, stale, tmp_path):
    history, found = History(), []
    for step, entry in enumerate(SERIES, 1):
        history = add_evaluation(history, step, entry, by)
        found.append((history.best["step"], history.stale))
        meta = {"step": step, "metrics": entry, "config": {"best": by}}
        checkpoint.save(
            tmp_path, {}, {**meta, "metrics": {n: None if v != v else v for n, v in entry.items() if v == v}}
        )
        assert checkpoint.read_meta(checkpoint.by_score(tmp_path)[0])["step"] == history.best["step"]
    assert found == list(zip(best, stale, strict=True))
    assert [history.exhausted(patience) for patience in (0, stale[-1] + 1)] == [False, False]


def test_a_score_without_its_number_is_the_lowest():
    assert score({"acc1": 1.0}) < score({"acc1": 1.0, "loss": 9.0}) < score({"acc1": 2.0})
    assert score({"acc1": 90.0, "loss": 1.0}, "balanced_acc") < score(
        {"balanced_acc": 0.0, "loss": 9.0}, "balanced_acc"
    )


def test_a_run_that_no_longer_improves_ends_and_a_longer_patience_goes_on_from_there(tmp_path):
    """With lr 0 every evaluation equals the first, so the run ends after 1 + patience of them."""
    fields = {"lr": 0, "warmup_epochs": 0, "eval_every": "2 steps", "save_every": "0", "log_every": "2 steps"}
    workdir = tmp_path / "run"
    ended = miniature.run(miniature.words(workdir, patience=2, **fields))
    assert ended.code == 0, ended.err
    said = "2 evaluations in a row were not better in acc1 (config.patience=2)"
    assert f"ended at step 6 of 12: {said}" in ended.out
    result = json.loads((workdir / "result.json").read_text())
    assert (result["steps"], result["best_step"]) == (6, 6)
    assert result["epochs"] == 6 * 48 / 1433 and miniature.newest(workdir).meta["stale"] == 2

    again = miniature.run(miniature.words(workdir, patience=2, **fields))
    assert f"nothing to do: {workdir} is at step 6 of 12, and {said}" in again.out
    longer = miniature.run(miniature.words(workdir, patience=4, **fields))
    assert "ended at step 10 of 12: 4 evaluations" in longer.out
    miniature.run(miniature.words(tmp_path / "whole", patience=4, **fields))
    miniature.assert_same_run(workdir, tmp_path / "whole")


def test_patience_without_evaluations_is_one_line(tmp_path):
    refusal = miniature.refusal(miniature.words(tmp_path, patience=2, eval_every=0))
    assert "config.patience: 2 but config.eval_every=0 never evaluates" in refusal
