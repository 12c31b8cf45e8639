"""`resolve`, the pure function from a config file's function, ARG, overrides and a trained config to a run's config."""

from __future__ import annotations

import pytest

from pcpvt.config import recipes, stored
from pcpvt.config.resolve import complete_arg, resolve
from pcpvt.errors import UserError


def get_config(arg: str):
    return recipes.from_arg(arg, "pcpvt_s", 0.2)


def resolved(arg: str = "cpu", overrides: dict | None = None, **options):
    return resolve(get_config, arg, overrides or {}, **options)[0]


def trained(**changes) -> dict:
    """The nested config of a training on eight NPUs, with changes."""
    return stored.nested({**stored.flat(get_config("npu8")), **changes})


def differences(one, other) -> dict:
    before = stored.flat(one)
    return {name: value for name, value in stored.flat(other).items() if value != before[name]}


# ARG.


@pytest.mark.parametrize(
    ("arg", "overrides", "expected"),
    [
        ("cpu", {}, "cpu"),
        ("cpu", {"data.path": "DIR"}, "cpu,folder"),
        ("cpu", {"checkpoint": "FILE"}, "cpu,folder"),
        ("cpu", {"eval.ensemble": "a,b"}, "cpu,folder"),
        ("cpu", {"data.name": "hfds/x"}, "cpu,folder"),
        ("cpu", {"data.name": "folder"}, "cpu,folder"),
        ("cpu", {"data.name": "digits"}, "cpu"),
        ("cpu", {"data.name": "synthetic"}, "cpu"),
        ("cpu", {"data.path": ""}, "cpu"),
        ("cpu,finetune", {"data.path": "DIR"}, "cpu,finetune,folder"),
        ("cpu,digits", {"data.path": "DIR"}, "cpu,digits"),
        ("npu8,paper", {"data.path": "DIR"}, "npu8,paper"),
        ("npu8", {"data.path": "DIR"}, "npu8,folder"),
        ("", {}, ""),
        ("", {"data.path": "DIR"}, ",folder"),
    ],
)
def test_other_data_imply_the_recipe_folder_and_a_note(arg, overrides, expected):
    completed, notes = complete_arg(arg, overrides, None)
    assert completed == expected and len(notes) == (completed != arg)
    for note in notes:
        cause = next(iter(overrides))
        assert note == f"config.{cause} is given: the recipe 'folder' is used, as with --config=FILE:{expected}"


@pytest.mark.parametrize(
    ("arg", "overrides", "expected"),
    [
        ("npu", {}, "npu16"),
        ("npu,paper", {}, "npu16,paper"),
        ("npu16,perf", {}, "npu16,perf"),
        ("", {}, ""),
        ("cpu", {"processes": 4}, "cpu"),
        ("cpu", {"data.path": "DIR"}, "cpu16,folder"),
    ],
)
def test_recipes_see_torchruns_count_where_arg_names_none(arg, overrides, expected):
    assert complete_arg(arg, overrides, 16)[0] == expected
    assert complete_arg(expected, overrides, None)[0] == expected


def test_the_completed_arg_reaches_the_config_file_whose_changes_win():
    def mine(arg):
        config = get_config(arg)
        config.image_size, config.frozen = 96, arg
        return config

    config, notes = resolve(mine, "cpu", {"data.path": "DIR"})
    assert (config.frozen, config.image_size, config.batch_size) == ("cpu,folder", 96, 128) and len(notes) == 1
    assert resolve(mine, "cpu", {"data.path": "DIR", "image_size": 64})[0].image_size == 64


# Purity.


def test_the_config_is_a_new_one_and_no_argument_changes():
    kept = get_config("cpu")
    overrides, other = {"steps": 3, "data.path": "DIR"}, trained(seed=7)
    before = kept.to_dict(), dict(overrides), dict(other)
    for mode in ("train", "eval", "predict", "export", "bench", "report", "schedule"):
        options = {"trained": other} if mode in ("eval", "predict", "export") else {}
        config, notes = resolve(lambda arg: kept, "cpu", overrides, mode=mode, **options)
        again, notes_again = resolve(lambda arg: kept, "cpu", overrides, mode=mode, **options)
        assert config is not kept and config.is_locked and not kept.is_locked
        assert config.to_dict() == again.to_dict() and notes == notes_again
    assert (kept.to_dict(), overrides, other) == before


def test_without_more_words_the_config_is_the_recipes():
    for arg in ("cpu", "npu8", "npu8,paper", "npu1,perf", "cuda2"):
        assert resolved(arg).to_dict() == get_config(arg).to_dict()


def test_fields_keep_their_types():
    config = resolved("cpu", {"lr": 1})
    assert type(config.lr) is float
    with pytest.raises(TypeError):
        config.num_classes = "ten"


# Durations and data.


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({}, (11.0, None, None, 2.0, None)),
        ({"steps": 5}, (None, 5, None, 2.0, None)),
        ({"examples": 500}, (None, None, 500, 2.0, None)),
        ({"warmup_steps": 5}, (11.0, None, None, None, 5)),
        ({"steps": 5, "warmup_epochs": 1.0}, (None, 5, None, 1.0, None)),
    ],
)
def test_a_duration_in_another_unit_replaces_the_recipes(overrides, expected):
    config = resolved("cpu", overrides)
    names = ("epochs", "steps", "examples", "warmup_epochs", "warmup_steps")
    assert tuple(config[name] for name in names) == expected


def test_two_units_on_the_command_line_are_refused():
    with pytest.raises(UserError, match=r"config\.epochs=3 and config\.steps=5: two units"):
        resolved("cpu", {"epochs": 3.0, "steps": 5})


def test_a_data_path_means_an_image_folder_unless_the_data_are_named():
    assert resolved("cpu,digits", {"data.path": "DIR"}).data.name == "folder"
    assert resolved("cpu,digits", {"data.path": "DIR", "data.name": "digits"}).data.name == "digits"
    assert resolved("cpu", {"data.path": "DIR", "data.name": "torch/cifar10"}).data.name == "torch/cifar10"


# Modes.


def test_training_takes_its_first_weights_from_finetune_only():
    with pytest.raises(UserError, match=r"config\.checkpoint: training does not start from it: use config\.finetune"):
        resolved("cpu", {"checkpoint": "FILE"})
    assert resolved("cpu", {"checkpoint": "FILE"}, mode="eval").checkpoint == "FILE"


@pytest.mark.parametrize("mode", ["export", "report", "schedule"])
def test_modes_that_compute_little_need_no_device(mode):
    config = resolved("npu8", mode=mode)
    assert differences(get_config("npu8"), config) == {"device": "cpu", "processes": 1, "compile": "none"}
    assert resolved("npu8", {"compile": "npugraphs"}, mode=mode).compile == "none"


def test_predicting_is_one_process_and_compiles_only_when_asked():
    assert differences(get_config("npu8"), resolved("npu8", mode="predict")) == {"processes": 1, "compile": "none"}
    assert resolved("npu8", {"compile": "inductor"}, mode="predict").compile == "inductor"


@pytest.mark.parametrize("mode", ["train", "eval", "bench"])
def test_other_modes_keep_device_count_and_compile(mode):
    config = resolved("npu8", {"compile": "auto"}, mode=mode)
    assert (config.device, config.processes, config.compile) == ("npu", 8, "auto")


# Trained configs.


def test_a_trained_config_replaces_the_recipe_and_what_it_implies():
    config, notes = resolve(get_config, "", {"checkpoint": "FILE"}, mode="eval", trained=trained(seed=7, image_size=96))
    assert differences(get_config("npu8"), config) == {"seed": 7, "image_size": 96, "checkpoint": "FILE"}
    assert notes == []


def test_overrides_win_over_a_trained_config_and_a_device_in_arg_brings_its_count():
    other = trained(compile="npugraphs", batch_size=512)
    assert resolved("cpu2", {"batch_size": 64}, mode="eval", trained=other).batch_size == 64
    config = resolved("cpu2", {}, mode="eval", trained=other)
    assert (config.device, config.processes, config.compile, config.batch_size) == ("cpu", 2, "auto", 512)
    config = resolved(",perf", {"processes": 4}, mode="eval", trained=other)
    assert (config.device, config.processes, config.compile) == ("npu", 4, "npugraphs")


def test_which_weights_to_take_is_no_part_of_a_trained_config():
    other = trained(checkpoint="FILE", weights="params", **{"eval.ensemble": "a,b"})
    config = resolved("", {}, mode="eval", trained=other)
    assert (config.checkpoint, config.weights, config.eval.ensemble) == ("", "auto", "")
    config = resolved("", {"weights": "ema", "eval.ensemble": "c"}, mode="eval", trained=other)
    assert (config.weights, config.eval.ensemble) == ("ema", "c")


def test_fields_that_a_trained_config_lacks_are_the_recipes():
    config = resolved("cpu", {}, mode="eval", trained={"image_size": 40})
    assert config.image_size == 40 and config.data.name == "digits"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"nonsense": 1}, "x: unknown field 'nonsense': use the version of pcpvt that wrote it"),
        ({"image_size": "wide"}, "x: image_size: 'wide' has the wrong type"),
        ({"image_size": 0}, "config.image_size: 0 is out of range: give at least 1"),
    ],
)
def test_a_damaged_trained_config_is_one_line(fields, message):
    with pytest.raises(UserError) as caught:
        resolved("cpu", {}, mode="eval", trained=fields, where="x")
    assert str(caught.value).startswith(message)


def test_a_model_of_the_digits_is_evaluated_on_the_folder_that_is_given():
    digits = get_config("cpu").to_dict()
    assert resolved("", {"data.path": "DIR"}, mode="eval", trained=digits).data.name == "folder"
    assert resolved("", {}, mode="eval", trained=digits).data.name == "digits"


# Recipes that would do nothing.


def test_a_recipe_that_would_do_nothing_is_refused():
    with pytest.raises(UserError, match=r"^--config ARG: 'finetune' starts from given weights, .*--config\.finetune="):
        resolved("cpu,finetune")
    assert resolved("cpu,finetune", {"finetune": "FILE"}).layer_decay == 0.83
    assert resolved("cpu,finetune", mode="schedule").layer_decay == 0.83  # its learning rates need no weights
    for arg in ("cpu,digits,paper", "npu8,folder,digits"):
        with pytest.raises(UserError, match=r"^--config ARG: 'digits' and '(paper|folder)' are recipes for different"):
            resolved(arg)


def test_recipes_that_a_stored_config_replaces_are_named():
    notes = resolve(get_config, "npu8,perf,paper", {}, mode="eval", trained=trained(), where="x")[1]
    assert notes == ["the config is that of x: of ARG, 'perf', 'paper' is not used; give fields as --config.NAME=VALUE"]
    assert resolve(get_config, "npu8", {"data.path": "DIR"}, mode="eval", trained=trained(), where="x")[1] == []


def test_a_bench_of_a_workdir_measures_one_device():
    config = resolved("", {}, mode="bench", trained=trained())
    assert (config.device, config.processes, config.batch_size) == ("npu", 1, 1024)


def test_a_bench_says_that_timms_side_has_another_optimizer():
    for peers, notes in (
        ("timm,onnx", ["config.optimizer: muon is measured beside timm's training with AdamW"]),
        ("onnx", []),
    ):
        given = {"optimizer": "muon", "bench.against": peers}
        assert resolve(get_config, "cpu", given, mode="bench")[1] == notes


# torchrun.


@pytest.mark.parametrize(("arg", "overrides"), [("cpu3", {}), ("npu8,paper", {}), ("cpu", {"processes": 3})])
def test_a_count_other_than_torchruns_is_refused(arg, overrides):
    with pytest.raises(UserError, match=r"processes: \d but 2 processes were started: write :\w+2, or :\w+ for"):
        resolved(arg, overrides, world_size=2)


def test_the_process_count_is_torchruns():
    assert resolved("cpu", world_size=2).processes == resolved("cpu2", world_size=2).processes == 2
    config = resolved("npu", world_size=16)
    assert (config.processes, config.batch_size) == (16, 16 * 128)
    # A trained config's count does not matter, nor does that of a file that ignores ARG.
    assert resolved("", {}, mode="eval", trained=trained(), world_size=2).processes == 2
    assert resolve(lambda arg: get_config("npu8"), "", {}, world_size=2)[0].processes == 2


# What is refused: see test_config for each field.


def test_the_resolved_config_is_checked():
    with pytest.raises(UserError, match=r"config\.compile: 'npugraphs' needs an NPU and config\.device is 'cpu'"):
        resolved("cpu", {"compile": "npugraphs"})
    with pytest.raises(UserError, match=r"config\.seed: -1 is out of range"):
        resolved("cpu", {"seed": -1})
