"""Configs: the table of fields, the checks, and the plan that follows from a config."""

from __future__ import annotations

import importlib.util
import re
from operator import attrgetter
from pathlib import Path

import pytest
import torch

from pcpvt.config import checks, fields, help, plan, resolve
from pcpvt.errors import UserError
from pcpvt.functional import schedules

CONFIGS = Path(__file__).parent.parent / "configs"


def config(arg: str, name: str = "pcpvt_s", **changes):
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(arg)
    config.update_from_flattened_dict(changes)
    return config


def planned(arg: str, examples: int = 1_281_167, classes: int = 1000, name: str = "pcpvt_s", **changes):
    c = config(arg, name, **changes)
    resolve.check(c)
    return c, plan.make_plan(c, examples=examples, num_classes=classes, micro_batch=128)


BAD = [
    ({"model.name": "pcpvt_m"}, "config.model.name: 'pcpvt_m'"),
    ({"model.pad": "crop"}, "config.model.pad"),
    ({"batch_size": 0}, "config.batch_size: 0"),
    ({"epochs": 3.0, "steps": 5}, "config.epochs=3 and config.steps=5: two units"),
    ({"warmup_epochs": 3.0, "warmup_steps": 5}, "config.warmup_epochs=3 and config.warmup_steps=5: two units"),
    ({"epochs": None}, "none is set"),
    ({"epochs": -1.0}, "config.epochs: -1.0"),
    ({"eval_every": "sometimes"}, "config.eval_every: 'sometimes'"),
    ({"precision": "half"}, "config.precision: 'half'"),
    ({"precision": "compute=float32,compute=bfloat16"}, "config.precision"),
    ({"compile": "npugraphs"}, "config.compile: 'npugraphs' needs an NPU"),
    ({"compile": "fast"}, "config.compile: 'fast'"),
    ({"schedule": "linear"}, "config.schedule: 'linear'"),
    ({"model.drop_path": 1.0}, "config.model.drop_path: 1.0"),
    ({"label_smoothing": -0.1}, "config.label_smoothing"),
    ({"augment.scale": (0.5,)}, "config.augment.scale"),
    ({"augment.scale": (0.5, 2.0)}, "config.augment.scale"),
    ({"augment.ratio": (0.5, float("inf"))}, r"config.augment.ratio: \(0.5, inf\) is no range"),
    ({"eval_every": "9" * 400 + " steps"}, "config.eval_every: '999"),
    ({"augment.randaugment": "rand-q7"}, "config.augment.randaugment: 'rand-q7' is not timm's notation: try"),
    ({"augment.randaugment": "rand-mfoo"}, "is not timm's notation: try rand-m9-mstd0.5-inc1"),
    ({"augment.randaugment": "nonsense"}, "is not timm's notation"),
    ({"augment.randaugment": "rand-m9-"}, "is not timm's notation"),
    ({"augment.randaugment": "rand-tunknown"}, "is not timm's notation"),
    ({"augment.randaugment": "rand-m9-n16-tweights"}, "draws 16 of 15 operations without replacement: .* n15"),
    ({"augment.randaugment": "rand-n15-t3aw"}, "draws 15 of 14 operations"),
    ({"frozen": "("}, "config.frozen: '\\(' is no regular expression"),
    ({"fresh": "(", "finetune": "x"}, "config.fresh: '\\(' is no regular expression"),
    ({"fresh": "head"}, "config.fresh: 'head' but nothing is fine-tuned: set config.finetune"),
    ({"model.pad": "error", "image_size": 50}, "config.image_size: 50x50 is not divisible by 32"),
    ({"data.on_error": "ignore"}, "config.data.on_error: 'ignore'"),
    ({"data.workers": -2}, "config.data.workers: -2"),
    ({"ema": 1.0}, "config.ema: 1.0"),
]


@pytest.mark.parametrize(("changes", "words"), BAD)
def test_a_bad_value_is_one_line_with_field_value_and_remedy(changes, words):
    with pytest.raises(UserError, match=words) as caught:
        resolve.check(config("cpu", **changes))
    assert "\n" not in str(caught.value) and str(caught.value).count(":") >= 1


KINDS = {name: field.default if field.unset else type(field.default) for name, field in fields.FIELDS.items()}
NUMBERS = {name: kind for name, kind in KINDS.items() if kind in (int, float)}


@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_has_bounds_within_which_nothing_overflows(name):
    for value in [10**400] if NUMBERS[name] is int else [float("inf"), float("nan"), 1e300]:
        changes = {"epochs": None, name: value} if name in ("steps", "examples") else {name: value}
        with pytest.raises(UserError, match=re.escape(f"config.{name}: {value} is out of range: give at least")):
            resolve.check(config("cpu", **changes))


def test_the_longest_runs_can_be_planned():
    for unit, value in (("epochs", checks.LARGEST), ("steps", int(checks.LARGEST)), ("examples", 2**53)):
        c = config("cpu", **{"epochs": None, unit: value, "eval_every": "1000000000 epochs"})
        resolve.check(c)
        p = plan.make_plan(c, examples=10**7, num_classes=10, micro_batch=64)
        assert len(range(p.steps)) == p.steps and 0 <= p.schedule(p.steps - 1) <= p.lr


@pytest.mark.parametrize("policy", ["", "rand-m9-mstd0.5-inc1", "rand-n15-tweights", "rand-m9-n99", "rand-m7-p0.3-t3a"])
def test_policies_that_timm_can_draw_pass(policy):
    resolve.check(config("cpu", **{"augment.randaugment": policy}))


def test_an_indivisible_batch_names_a_batch_that_divides():
    with pytest.raises(UserError, match=r"config\.batch_size: 100 cannot be cut evenly over 8 processes: use 96"):
        planned("npu8", batch_size=100)
    with pytest.raises(UserError, match="mixing pairs samples"):
        planned("npu8", batch_size=8 * 3)
    with pytest.raises(UserError, match=r"config\.accumulate: 3"):
        planned("npu8", accumulate=3)


def test_accumulation_is_derived_from_what_fits():
    for local, micro, mixes, expected in [
        (128, 128, True, 1),
        (128, 100, True, 2),
        (96, 40, False, 3),
        (64, 1, True, 32),
    ]:
        changes = {} if mixes else {"mixup": 0.0, "cutmix": 0.0}
        c = config("npu1", batch_size=local, **changes)
        p = plan.make_plan(c, examples=1000, num_classes=10, micro_batch=micro)
        assert p.grad_accum_steps == expected and p.local_batch % p.grad_accum_steps == 0


@pytest.mark.parametrize(
    ("amount", "unit", "steps"),
    [(2, "epochs", 20), (1.5, "epochs", 15), (7, "steps", 7), (101, "examples", 2), (100, "examples", 1)],
)
def test_durations_are_epochs_steps_or_examples(amount, unit, steps):
    assert plan.in_steps(amount, unit, 100, 1000) == steps


@pytest.mark.parametrize("name", fields.FIELDS)
def test_every_field_has_help_a_default_that_passes_and_a_known_rule(name):
    field, value = fields.FIELDS[name], attrgetter(name)(fields.base())
    assert field.help and f"--config.{name}=" in help.text()
    assert value == (None if field.unset else field.default)
    assert value is None or field.check(value) == ""
    assert fields.rule(name) == field.rule
    assert not (fields.FREE in field.rule and fields.START in field.rule)


# Of each type, a value that no check accepts.
NONSENSE = {str: "(", int: -(10**400), float: float("nan"), tuple: (2.0, 1.0)}


@pytest.mark.parametrize("name", [name for name, field in fields.FIELDS.items() if field.check is not checks.anything])
def test_every_check_refuses_a_bad_value_by_the_fields_name(name):
    field = fields.FIELDS[name]
    kind = field.default if field.unset else type(field.default)
    with pytest.raises(UserError, match=re.escape(f"config.{name}: ")):
        fields.check_fields(config("cpu", **{name: NONSENSE[kind]}))


def test_numbers_and_choices_are_checked_and_free_text_and_switches_are_not():
    unchecked = {name for name, field in fields.FIELDS.items() if field.check is checks.anything}
    assert unchecked == {
        "finetune", "checkpoint", "tensorboard", "data.name", "data.path", "data.train_split", "data.val_split",
        "data.image_column", "data.label_column", "eval.ensemble",
        "export.output", "export.dynamic_size", "export.preprocess", "augment.by_size", "distill.teacher",
        "predict.images", "predict.output", "predict.explain",
        "report.compare", "bench.scaling", "class_weights", "data.class_map", "predict.sort_into",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "free", "start"),
    [
        ("seed", False, False),
        ("keep", True, False),
        ("finetune", False, True),
        # Fields of another version follow their group.
        ("eval.new", True, False),
        ("data.new", False, False),
        ("new", False, False),
        ("new.new", False, False),
    ],
)
def test_what_a_resumed_run_may_change_is_in_the_table(name, free, start):
    rule = fields.rule(name)
    assert (fields.FREE in rule, fields.START in rule) == (free, start)


def test_configs_are_locked_against_misspelt_fields():
    c = config("cpu")
    c.lock()
    with pytest.raises(AttributeError, match="batch_size"):
        c.batch_sise = 3


def test_lr_is_a_pure_function_of_the_step_for_every_recipe():
    for arg in ("npu8", "npu8,paper", "npu8,finetune", "npu1,perf", "cpu"):
        _, p = planned(arg, 1433 if arg == "cpu" else 1_281_167)
        values = [p.schedule(s) for s in range(0, p.steps, max(1, p.steps // 50))]
        assert values == [p.schedule(s) for s in range(0, p.steps, max(1, p.steps // 50))]
        assert 0 < max(values) <= p.lr * (1 + 1e-12)
    assert schedules.constant(0.5)(10**9) == 0.5


@pytest.mark.parametrize(
    ("examples", "batch", "epochs", "warmup"),
    [(146, 64, 30, 5), (146, 64, 30, 0), (999, 10, 7, 3), (50_000, 1024, 300, 5)],
)
def test_the_reference_schedule_is_timms_over_a_whole_run(examples, batch, epochs, warmup):
    """The reference code steps timm's scheduler after each epoch, with that epoch's number."""
    from pcpvt import torchvision_compat  # noqa: F401 - before timm
    from timm.scheduler import CosineLRScheduler  # isort: skip

    c, p = planned("npu1,paper", examples, batch_size=batch, epochs=float(epochs), warmup_epochs=float(warmup))
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=p.lr)
    theirs = CosineLRScheduler(
        optimizer, t_initial=epochs, lr_min=c.min_lr, warmup_t=warmup, warmup_lr_init=c.warmup_lr
    )
    rates = []
    for epoch in range(epochs + 1):
        rates.append(optimizer.param_groups[0]["lr"])
        theirs.step(epoch)
    assert [p.schedule(step) for step in range(p.steps)] == pytest.approx(
        [rates[step * batch // examples] for step in range(p.steps)], rel=1e-12
    )
    assert p.steps * batch >= epochs * examples > (p.steps - 1) * batch
