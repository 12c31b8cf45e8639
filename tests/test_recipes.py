"""The recipes of ARG: which fields they set, and to what."""

from __future__ import annotations

import pytest
from test_config import CONFIGS, config, planned

from pcpvt.config import fields, recipes, stored
from pcpvt.errors import UserError


@pytest.mark.parametrize(
    ("name", "arg", "processes", "batch", "epochs", "lr", "drop_path", "schedule"),
    [
        ("pcpvt_s", "npu8", 8, 1024, 100, 2e-3, 0.3, "cosine"),
        ("pcpvt_s", "npu1", 1, 128, 100, 2.5e-4, 0.3, "cosine"),
        ("pcpvt_s", "cuda8", 8, 1024, 100, 2e-3, 0.3, "cosine"),
        ("pcpvt_b", "npu8", 8, 1024, 100, 2e-3, 0.3, "cosine"),
        ("pcpvt_l", "npu8", 8, 1024, 100, 2e-3, 0.5, "cosine"),
        ("pcpvt_s", "npu8,paper", 8, 1280, 300, 1.25e-3, 0.2, "reference"),
        ("pcpvt_b", "npu8,paper", 8, 1024, 300, 1e-3, 0.3, "reference"),
        ("pcpvt_l", "npu8,paper", 8, 1024, 300, 1e-3, 0.5, "reference"),
        ("pcpvt_s", "cuda1,paper", 1, 1280, 300, 1.25e-3, 0.2, "reference"),
        ("pcpvt_s", "npu64,paper", 64, 1280, 300, 1.25e-3, 0.2, "reference"),
    ],
)
def test_the_imagenet_recipes_are_those_of_the_port_and_of_the_paper(
    name, arg, processes, batch, epochs, lr, drop_path, schedule
):
    c, p = planned(arg, name=name)
    assert c.model.name == name
    assert (c.processes, c.batch_size, c.epochs, c.schedule) == (processes, batch, epochs, schedule)
    assert c.model.drop_path == drop_path and p.lr == pytest.approx(lr)
    assert (c.weight_decay, c.beta1, c.beta2, c.eps, c.clip_norm) == (0.05, 0.9, 0.999, 1e-8, 5.0)
    assert (c.warmup_epochs, c.warmup_lr, c.min_lr, c.label_smoothing) == (5, 1e-6, 1e-5, 0.1)
    assert (c.mixup, c.cutmix, c.mix_prob, c.mix_switch, c.mix_mode) == (0.8, 1.0, 1.0, 0.5, "batch")
    assert (c.augment.randaugment, c.augment.erase, c.augment.hflip) == ("rand-m9-mstd0.5-inc1", 0.25, 0.5)
    assert (c.augment.scale, c.augment.ratio, c.augment.repeats) == ((0.08, 1.0), (3 / 4, 4 / 3), 1)
    assert c.augment.color_jitter == c.augment.crop_pad == c.ema == 0 and c.layer_decay == 1 and c.frozen == ""
    assert (c.image_size, c.eval.crop, c.data.name) == (224, 0.875, "folder")
    assert p.steps == -(-1_281_167 * epochs // batch)


@pytest.mark.parametrize("name", ["pcpvt_s", "pcpvt_b", "pcpvt_l"])
def test_paper_is_the_papers_recipe_whatever_was_named_before_it(name):
    assert config("npu8,folder,paper", name).to_dict() == config("npu8,paper", name).to_dict()


def test_perf_is_a_fixed_number_of_steps_without_evaluation():
    c, p = planned("npu1,perf")
    assert (c.epochs, p.steps, p.eval_every, p.save_every) == (None, 200, 0, 0)
    assert c.batch_size == 128 and c.augment.randaugment


@pytest.mark.parametrize(("name", "decay"), [("pcpvt_s", 0.83), ("pcpvt_b", 0.9), ("pcpvt_l", 0.93)])
@pytest.mark.parametrize("arg", ["npu1", "cpu"])
def test_finetune_changes_these_fields_of_the_recipe_before_it_and_no_other(arg, name, decay):
    before, after = (stored.flat(config(words, name)) for words in (arg, f"{arg},finetune"))
    tuned = {
        "epochs": 10, "warmup_epochs": 1, "lr": None, "base_lr": 5e-4, "min_lr": 1e-6, "layer_decay": decay,
        "model.drop_path": 0.1, "mixup": 0, "cutmix": 0, "augment.scale": [0.35, 1], "augment.erase": 0,
        "augment.randaugment": "rand-m5-mstd0.5-inc1" if arg == "npu1" else "",
    }  # fmt: skip
    assert after == {**before, **tuned}


@pytest.mark.parametrize(
    ("arg", "epochs", "warmup", "lr", "padding"),
    [("cpu", 6.05, 6.05 / 7, 1e-3, 1), ("npu8", 55, 5, 4e-3, 0), ("npu8,paper", 165, 5, 2.5e-3, 0)],
)
def test_fast_shortens_the_recipe_before_it_and_weakens_its_augmentation(arg, epochs, warmup, lr, padding):
    c, p = planned(f"{arg},fast")
    assert (c.epochs, c.warmup_epochs) == pytest.approx((epochs, warmup)) and p.lr == pytest.approx(lr)
    assert c.mixup == c.cutmix == c.augment.erase == 0 and c.augment.randaugment == ""
    assert c.augment.crop_pad == padding
    kept = ("schedule", "batch_size", "optimizer", "label_smoothing", "model.drop_path", "augment.scale")
    before, after = (stored.flat(config(words)) for words in (arg, f"{arg},fast"))
    assert [after[name] for name in kept] == [before[name] for name in kept]


def test_cpu_trains_the_digits_and_an_image_folder_when_asked():
    c, _ = planned("cpu", 1433, 10)
    assert (c.data.name, c.image_size, c.batch_size) == ("digits", 32, 64)
    assert c.mixup == c.augment.hflip == 0
    assert config("cpu,folder").data.name == "folder" and config("cpu,folder").image_size == 224


@pytest.mark.parametrize(
    ("arg", "words"),
    [
        ("gpu8", "'gpu8' is no device"),
        ("npu0", "'npu0' is no device"),
        ("npu8,quick", "'quick' is no recipe"),
        ("npu8,finetune,fast", "choose one"),
        ("8", "is no device"),
    ],
)
def test_an_unknown_arg_is_named_with_the_choices(arg, words):
    with pytest.raises(UserError, match=words):
        config(arg)


def test_the_configs_differ_by_their_names_and_numbers_only():
    texts = {n: (CONFIGS / f"pcpvt_{n}.py").read_text().splitlines() for n in "sbl"}
    bodies = {n: t[t.index("def get_config(arg=None):") :] for n, t in texts.items()}
    assert all(len(b) == len(bodies["s"]) for b in bodies.values())
    for n in "bl":
        assert sum(a != b for a, b in zip(bodies["s"], bodies[n], strict=True)) <= 3


@pytest.mark.parametrize("arg", ["cpu", "npu8", *(f"npu8,{name}" for name in recipes.RECIPES)])
def test_arg_and_its_recipes_set_no_field_but_those_marked_for_them(arg):
    for name in ("pcpvt_s", "pcpvt_b", "pcpvt_l"):
        c, default = stored.flat(config(arg, name)), stored.flat(fields.base())
        assert c.keys() == default.keys()
        for field, value in c.items():
            assert value == default[field] or fields.RECIPE in fields.FIELDS[field].rule, field


def test_every_field_marked_for_recipes_is_set_by_one():
    default, changed = stored.flat(fields.base()), set()
    for name in ("pcpvt_s", "pcpvt_b"):
        for arg in ("cpu", "npu8,paper,finetune", "npu8,perf"):
            changed |= {field for field, value in stored.flat(config(arg, name)).items() if value != default[field]}
    assert changed == {name for name, field in fields.FIELDS.items() if fields.RECIPE in field.rule}
