"""The command line: equivalent spellings give the same config, and every mistake is an error of one line."""

from __future__ import annotations

import importlib
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from absl import flags
from ml_collections import ConfigDict

from pcpvt import errors, main
from pcpvt.checkpoints import checkpoint
from pcpvt.checkpoints.load import load_model
from pcpvt.config import cli
from pcpvt.errors import UserError
from pcpvt.models import pcpvt as models
from pcpvt.models.init import init

STOCK = "--config=configs/pcpvt_s.py:cpu"


def parse(*words: str) -> cli.Command:
    return cli.parse(["pcpvt", *words], main.MODES, flags.FlagValues())


def read(*words: str) -> ConfigDict:
    return main.read_config(parse(*words))[0]


def error_of(*words: str) -> str:
    with pytest.raises(UserError) as caught:
        read(*words)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def weights(classes: int = 3) -> dict[str, torch.Tensor]:
    return {f"params/{name}": value for name, value in init(models.build("pcpvt_nano", classes), 0).items()}


# Fields.


@pytest.mark.parametrize("name", ["data.path", "checkpoint", "eval.ensemble"])
def test_a_value_after_a_space_means_what_it_means_after_an_equals_sign(name, tmp_path):
    torch.save({"head.weight": torch.ones(1)}, tmp_path / "a.pth")
    value = f"{tmp_path}/a.pth"
    mode = "--mode=eval" if name != "data.path" else "--mode=train"
    joined, apart = read(STOCK, mode, f"--config.{name}={value}"), read(STOCK, mode, f"--config.{name}", value)
    assert joined.to_dict() == apart.to_dict()
    assert joined.data.name == "folder" and joined.image_size == 224


def test_spelling_and_order_of_the_words_do_not_matter():
    words = [STOCK, "--config.lr=0.5", "--noconfig.tensorboard", "--config.augment.scale=(0.5, 1)", "--mode=schedule"]
    expected = parse(*words)
    assert expected.overrides == {"lr": 0.5, "tensorboard": False, "augment.scale": (0.5, 1)}
    assert (expected.mode, expected.arg, str(expected.workdir)) == ("schedule", "cpu", "runs/pcpvt_s-schedule")
    for other in (
        words[::-1],
        ["--config", "configs/pcpvt_s.py:cpu", "-config.lr", "5e-1", "--config.tensorboard=false", *words[3:]],
        ["--config.lr=3", *words],
        [*words[:3], "--config.augment.scale=0.5", "--config.augment.scale=1", "--mode", "schedule"],
    ):
        assert parse(*other)._replace(get_config=None) == expected._replace(get_config=None)


def test_a_command_is_written_out_in_words_that_mean_the_same():
    """The launcher starts the ranks with these, whatever the spelling was."""
    for words in (
        [],
        ["-mode", "eval", "--workdir", "a b"],
        ["--config", "configs/pcpvt_s.py:cpu2,perf", "-config.lr", "5e-1", "--noconfig.tensorboard", "--workdir=~/x"],
        ["--config.augment.scale=0.5", "--config.augment.scale=1", "--config.data.path=", "--config.frozen=^a=b| ' .$"],
        ["--config.data.workers", "-1", "--config.data.name=-mode=bench", "--config.data.path=--workdir"],
    ):
        command = parse(*words)
        again = parse(*command.words())
        assert again._replace(get_config=None) == command._replace(get_config=None)
        copied = parse(*shlex.split(command.line())[3:])
        assert copied._replace(get_config=None) == command._replace(get_config=None)


def test_the_launcher_gets_the_parsed_command(monkeypatch, tmp_path):
    monkeypatch.setattr("pcpvt.distributed.launch.launch", lambda config, words, *_: words)
    command = parse("-mode", "train", "--config", "configs/pcpvt_s.py:cpu2", "--workdir", str(tmp_path))
    assert main.main(command) == ["--mode=train", "--config=configs/pcpvt_s.py:cpu2", f"--workdir={tmp_path}"]


def test_a_value_is_quoted_for_a_shell():
    line = parse("--workdir=my runs/a", "--config.frozen=^head$", "--config.seed=3").line()
    assert line == "python -m pcpvt.main --config.frozen='^head$' --config.seed=3 --workdir='my runs/a'"


def test_the_default_config_is_the_small_model():
    command = parse()
    assert (command.mode, command.arg, command.overrides, str(command.workdir)) == ("train", "", {}, "runs/pcpvt_s")
    assert command.get_config("npu8").model.name == "pcpvt_s"


@pytest.mark.parametrize("arg", ["", ":cpu", ":npu8,paper"])
def test_the_default_workdir_is_named_after_the_config_and_not_after_arg(arg):
    assert parse("--mode=eval", f"--config=configs/pcpvt_s.py{arg}").workdir == Path("runs/pcpvt_s")


def test_a_negative_number_may_follow_a_space():
    assert parse("--config.data.workers", "-1").overrides == {"data.workers": -1}


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--config.augment.scale[0]=0.3", "config.augment.scale[0]: no such field: did you mean config.augment.scale?"),
        ("--config.batch-size=3", "config.batch-size: no such field: did you mean config.batch_size?"),
        ("--config.batch_sise=3", "config.batch_sise: no such field: did you mean config.batch_size?"),
        ("--noconfig.tensorbord", "config.tensorbord: no such field: did you mean config.tensorboard?"),
        ("--config.model={'name': 'pcpvt_b'}", "config.model: no such field: did you mean config."),
        ("--config.optimizer.lr=3", "config.optimizer.lr: no such field: "),
        ("--noconfig.batch_size", "Unknown command line flag 'noconfig.batch_size'"),
        ("--config.=3", "config.: no such field: see --help for the fields"),
        ("--config.batch_size=x", "config.batch_size: 'x' is not of type int: global batch, over all devices"),
        ("--config.batch_size=", "config.batch_size: '' is not of type int: global batch, over all devices"),
        ("--config.steps=1.5", "config.steps: '1.5' is not of type int: length of training in optimizer steps"),
        ("--config.tensorboard=maybe", "config.tensorboard: 'maybe' is not of type bool: "),
        ("--config.augment.scale=(0.1,", "config.augment.scale: '(0.1,' is not of type tuple: "),
        ("--config.augment.scale=abc", "config.augment.scale: ('abc',) is no range: give (low, high) with"),
        ("--config.batch_size", "Missing value for flag --config.batch_size: see --help"),
        ("--mod=eval", "Unknown command line flag 'mod'. Did you mean: mode ?: see --help"),
        ("--mode=evil", "flag --mode=evil: value should be one of <train|eval|predict|export|bench|report|schedule>"),
        ("eval", "'eval': not understood: fields are given as --config.NAME=VALUE"),
    ],
)
def test_a_word_that_is_not_understood_is_one_line(word, message):
    assert error_of(STOCK, word).startswith(message)


@pytest.mark.parametrize("mode", ["predict", "export"])
def test_an_ensemble_is_for_evaluation_alone(mode):
    message = error_of(STOCK, f"--mode={mode}", "--config.eval.ensemble=a.pth,b.pth")
    assert message == f"config.eval.ensemble: --mode={mode} takes one model: name it with config.checkpoint"


# Config files.

HEAD = "from pcpvt.config import recipes\ndef get_config(arg=None):\n    c = recipes.from_arg(arg, 'pcpvt_s', 0.2)\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# Readme\nThis is no Python.\n", "line 2: SyntaxError: invalid syntax"),
        (HEAD + "    return c.batch +\n", "line 4: SyntaxError: invalid syntax"),
        (HEAD + "    return undefined\n", "line 4: NameError: name 'undefined' is not defined"),
        (HEAD + "    c.batch_size = '16'\n", "line 4: TypeError: "),
        (HEAD + "    c.optimizer.lr = 3\n", "line 4: AttributeError: "),
        (HEAD + "    open('no such file')\n", "line 4: FileNotFoundError: "),
        ("import no_such_module\n", "line 1: ModuleNotFoundError: No module named 'no_such_module'"),
        ("x = 3\n", "has no attribute 'get_config': give a file with get_config(ARG)"),
        ("\0", "give a file with get_config(ARG)"),
        (HEAD, "get_config(ARG) gave None: return what recipes.from_arg gives"),
        ("def get_config(arg=None):\n    return {'lr': 3.0}\n", "gave {'lr': 3.0}: return what"),
    ],
)
def test_a_file_that_gives_no_config_is_one_line(tmp_path, text, message):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(UserError) as caught:
        read(f"--config={tmp_path / 'mine.py'}:cpu")
    line = " ".join(str(caught.value).split())
    assert line.startswith(f"--config: {tmp_path / 'mine.py'}: ") and message in line and "Traceback" not in line


def test_an_unknown_device_is_an_error_of_arg_and_not_of_the_file():
    assert error_of("--config=configs/pcpvt_s.py:gpu8").startswith("--config ARG: 'gpu8' is no device")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("c.batchsize = 16", "config.batchsize: no such field: did you mean config.batch_size?"),
        ("del c.keep", "config.keep is missing: begin with what recipes.from_arg gives"),
    ],
)
@pytest.mark.parametrize("mode", ["train", "schedule"])
def test_a_misspelt_field_in_a_config_file_is_one_line(tmp_path, line, message, mode):
    (tmp_path / "mine.py").write_text(f"{HEAD}    {line}\n    return c\n")
    assert message in error_of(f"--config={tmp_path / 'mine.py'}:cpu", f"--mode={mode}")


def test_a_config_file_is_run_once_with_the_completed_arg_and_its_own_changes_win(tmp_path):
    changes = "    ARGS.append(arg)\n    c.seed, c.image_size, c.frozen = len(ARGS), 96, arg\n    return c\n"
    (tmp_path / "mine.py").write_text(f"ARGS = []\n{HEAD}{changes}")
    config = read(f"--config={tmp_path / 'mine.py'}:cpu", "--config.data.path=DIR")
    assert (config.seed, config.frozen, config.image_size, config.batch_size) == (1, "cpu,folder", 96, 128)


def test_a_config_file_without_a_parameter_serves_where_no_arg_is_given(tmp_path):
    text = "from pcpvt.config import recipes\ndef get_config():\n    return recipes.from_arg('npu8', 'pcpvt_b', 0.3)\n"
    (tmp_path / "mine.py").write_text(text)
    assert read(f"--config={tmp_path / 'mine.py'}").processes == 8


def test_installed_configs_stand_in_for_their_own_names_only(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("configs/pcpvt_s.py", "pcpvt_s.py", "./configs/pcpvt_b.py"):
        assert cli.find_config(path).endswith(f"/configs/{path.rpartition('/')[2]}")
    assert read("--config=pcpvt_b.py:cpu").model.name == "pcpvt_b"
    (tmp_path / "folder.py").mkdir()
    for path in ("expriments/pcpvt_s.py", f"{tmp_path}/configs/pcpvt_s.py", "configs/mine.py", "folder.py", ""):
        with pytest.raises(UserError, match=f"--config: {path}: no such file"):
            cli.find_config(path)


# Workdirs, checkpoints and torchrun.


def test_tilde_is_the_home_folder_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.py").write_text(f"{HEAD}    return c\n")
    assert parse("--config=~/mine.py:cpu", "--workdir=~/runs/a").workdir == tmp_path / "runs" / "a"
    assert read("--config=~/mine.py:cpu").device == "cpu"
    meta = {"step": 1, "config": {"image_size": 40, "batch_size": 8}, "classes": ["a"], "image_size": [40, 40]}
    checkpoint.save(tmp_path / "A" / "checkpoints", weights(1), meta)
    (tmp_path / "A" / "config.json").write_text('{"image_size": 40}')
    assert read("--mode=eval", STOCK, "--config.checkpoint=~/A").image_size == 40
    assert load_model("~/A").path == str(tmp_path / "A" / "checkpoints" / "step-00000001.safetensors")
    with pytest.raises(UserError, match=r"~nobody-here/a\.pth: no such file"):
        load_model("~nobody-here/a.pth")


def test_a_report_needs_a_workdir_that_exists(tmp_path):
    assert "no such folder: train first" in error_of("--mode=report", f"--workdir={tmp_path / 'none'}")


def test_checkpoint_without_a_config_is_taken_as_weights_from_elsewhere(tmp_path):
    path = checkpoint.save(tmp_path, weights(), {"step": 5})
    config = read("--mode=eval", STOCK, "--config.model.name=pcpvt_nano", f"--config.checkpoint={path}")
    assert config.data.name == "folder" and config.checkpoint == str(path)


def test_torchruns_count_is_not_refused_where_arg_names_none(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    path = checkpoint.save(tmp_path, weights(), {"step": 1, "config": {"processes": 8, "device": "cpu", "epochs": 1.0}})
    assert read("--mode=eval", "--config=configs/pcpvt_s.py", f"--config.checkpoint={path}").processes == 2
    assert "2 processes were started" in error_of("--config=configs/pcpvt_s.py:cpu3")


# What the log says about an implied recipe.

IMPLIED = "note: config.data.path is given: the recipe 'folder' is used, as with --config=FILE:cpu,folder\n"


@pytest.mark.parametrize("mode", main.MODES)
def test_an_implied_recipe_is_noted_on_standard_output_unless_predictions_go_there(mode, tmp_path, monkeypatch, capsys):
    class Mode:
        @staticmethod
        def run(session):
            print("the mode's own output")
            return 0

    import_module, of_mode = importlib.import_module, f"pcpvt.{main.MODES[mode]}"
    monkeypatch.setattr(importlib, "import_module", lambda name: Mode if name == of_mode else import_module(name))
    later = mode in ("eval", "predict", "export")
    if later:  # these take the config that the workdir was trained with, not a recipe
        (tmp_path / "config.json").write_text(json.dumps(read(STOCK).to_dict()))
    command = parse(STOCK, f"--mode={mode}", "--config.data.path=DIR", f"--workdir={tmp_path}")
    config, notes = main.read_config(command)
    assert main.run(config, tmp_path, mode, notes or [IMPLIED[6:-1]]) == 0
    out, err = capsys.readouterr()
    assert out == "the mode's own output\n" if mode == "predict" else out == f"{IMPLIED}the mode's own output\n"
    assert err == (IMPLIED if mode == "predict" else "")
    assert (notes == []) == later


def test_a_run_on_an_image_folder_says_which_recipe_it_takes(tmp_path):
    words = [STOCK, "--mode=schedule", "--config.data.path=DIR", f"--workdir={tmp_path}"]
    ended = subprocess.run([sys.executable, "-m", "pcpvt.main", *words], capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stdout == IMPLIED
    assert ended.stderr.startswith("pcpvt: error: ") and ended.stderr.count("\n") == 1


def test_a_system_without_fcntl_is_told_which_are_supported():
    """As on Windows, which has no SIGHUP and no module `resource` either."""
    hidden = "import signal, sys; sys.modules.update(fcntl=None, resource=None); del signal.SIGHUP; "
    for program in ("import runpy; runpy.run_module('pcpvt.main', run_name='__main__')", "import pcpvt.main"):
        ended = subprocess.run([sys.executable, "-c", hidden + program], capture_output=True, text=True)
        assert (ended.returncode, ended.stdout) == (2, "")
        assert ended.stderr == f"pcpvt: error: {errors.SYSTEMS}\n"
