"""Runs that are short for their warm-up or their averaged weights: what they do then, and what they say."""

from __future__ import annotations

import json

import miniature
import pytest

from pcpvt.config import plan, recipes
from pcpvt.functional import schedules
from pcpvt.report.data import load


def planned(examples: int = 1000, **changes):
    config = recipes.from_arg("cpu", "pcpvt_nano", 0.1)
    config.update_from_flattened_dict({"batch_size": 100, "epochs": None, "lr": 1.0, **changes})
    made = plan.make_plan(config, examples=examples, num_classes=10, micro_batch=100)
    return [made.schedule(step) for step in range(made.steps)], plan.short_run_notes(config, made)


@pytest.mark.parametrize("steps", [1, 4, 10, 20])
def test_a_warm_up_that_is_as_long_as_the_run_is_cut_to_a_fifth_of_it(steps):
    rates, notes = planned(steps=steps, warmup_epochs=2.0)  # 20 steps
    expected = schedules.warmup_cosine(1.0, steps, steps // 5)
    assert rates == [expected(step) for step in range(steps)] and max(rates) == 1.0
    assert notes == [
        f"config.warmup_epochs: 2 (20 steps) is as long as the run of {steps} steps or longer: "
        "a fifth of the run is used"
    ]


def test_a_warm_up_that_is_shorter_than_the_run_stays_and_is_named_where_it_is_most_of_it():
    rates, notes = planned(steps=21, warmup_epochs=2.0)
    expected = schedules.warmup_cosine(1.0, 21, 20)
    assert rates == [expected(step) for step in range(21)]
    assert notes == [
        "config.warmup_epochs: 2 (20 steps) is most of the run of 21 steps: set it lower if that is not meant"
    ]
    assert planned(steps=40, warmup_epochs=2.0)[1] == planned(steps=4, warmup_epochs=0.0)[1] == []
    assert planned(steps=4, warmup_epochs=2.0, schedule="constant")[1] == []


def test_a_length_in_epochs_that_makes_few_steps_is_named_with_a_batch_that_makes_more():
    """The batch proposed makes a hundred steps or more where 8 images a step can."""
    rates, notes = planned(epochs=10.0, examples=96, warmup_epochs=0.0)
    assert len(rates) == 10 and notes == [
        "config.batch_size: 100 of 96 training images make 10 steps in 10 epochs, which are few: consider "
        "--config.batch_size=8 --config.lr=1"
    ]
    assert "batch_size=32 " in planned(epochs=10.0, examples=400, warmup_epochs=0.0)[1][0]
    assert len(planned(epochs=10.0, examples=400, batch_size=32, warmup_epochs=0.0)[0]) == 125
    assert planned(epochs=10.0, examples=1000, warmup_epochs=0.0)[1] == planned(steps=9, warmup_epochs=0.0)[1] == []
    assert planned(epochs=1.0, examples=40, batch_size=8, warmup_epochs=0.0)[1] == []


def test_the_reference_schedule_is_cut_by_epochs():
    rates, notes = planned(epochs=5.0, warmup_epochs=5.0, schedule="reference", warmup_lr=0.0)
    notes = [note for note in notes if "warmup" in note]
    expected = schedules.reference(1.0, 5.0, 1.0, lambda step: step // 10, 0.0)
    assert rates == [expected(step) for step in range(50)] and len(notes) == 1


def test_the_decay_of_averages_rises_to_its_limit():
    """Values of TensorFlow's formula, min(decay, (1 + num_updates) / (10 + num_updates))."""
    assert [schedules.ema_decay(0.9, t) for t in (0, 1, 8, 79, 80, 81, 10**9)] == [0.1, 2 / 11, 0.5, 80 / 89] + 3 * [
        0.9
    ]


def test_a_run_that_is_shorter_than_the_window_of_its_averages_says_so():
    assert planned(steps=336, warmup_epochs=0.0, ema=0.9999)[1] == [
        "config.ema: 0.9999 averages over about 10,000 steps and the run has 336: the decay rises with the step, "
        "here to 0.9739, which is about 38 steps"
    ]
    assert planned(steps=336, warmup_epochs=0.0, ema=0.99)[1] == []


def test_averages_of_a_short_run_are_as_good_as_its_weights_and_both_are_reported(pcpvt, tmp_path):
    words = miniature.words(tmp_path, ema=0.9999, lr=3e-3, steps=60, eval_every="30 steps", warmup_epochs=20)
    ended = miniature.run(words)
    assert ended.code == 0, ended.err
    assert "note: config.ema: 0.9999 averages over about 10,000 steps and the run has 60" in ended.out
    assert "note: config.warmup_epochs: 20 (598 steps) is as long as the run of 60 steps" in ended.out
    evaluations = [record for record in miniature.records(tmp_path) if record["kind"] == "eval"]
    result = json.loads((tmp_path / "result.json").read_text())
    for name in ("acc1", "loss", "acc1_raw", "loss_raw"):
        assert result[name] == evaluations[-1][name] == load(tmp_path, "x").best()[name]
    # Both 89 %; with a constant decay the average is nearly the random start, 18 %.
    assert result["acc1_raw"] > 60 and result["acc1"] > result["acc1_raw"] - 10
    assert f"(weights before averaging: top-1 {result['acc1_raw']:.3f} %" in ended.out
    for weights, name in (("ema", "acc1"), ("params", "acc1_raw")):
        pcpvt("--mode=eval", f"--workdir={tmp_path}", f"--config.weights={weights}")
        assert json.loads((tmp_path / "result-eval.json").read_text())["acc1"] == result[name]
