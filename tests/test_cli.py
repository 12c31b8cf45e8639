"""The command line: every way to write a thing means the same, and what cannot be meant is one line that says so."""

from __future__ import annotations

import sys

import pytest
import torch
from absl import flags

from pcpvt.checkpoints import checkpoint
from pcpvt.checkpoints.load import load_model
from pcpvt.config import cli
from pcpvt.errors import UserError
from pcpvt.models import pcpvt as models
from pcpvt.models.init import init

# Python's own warning about how ml_collections loads a file.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
STOCK = "--config=configs/pcpvt_s.py:cpu"


@pytest.fixture
def read(monkeypatch):
    """Words of a command line to its run, as `main` gets it."""
    known = set(flags.FLAGS)

    def call(*words):
        forget()
        monkeypatch.setattr(sys, "argv", ["pcpvt", *words])
        cli.define_flags()
        cli.parse(sys.argv)
        return cli.read_run(flags.FLAGS)

    def forget():
        for name in set(flags.FLAGS) - known:
            delattr(flags.FLAGS, name)
        sys.modules.pop("config_config", None)  # where ml_collections puts the file's code

    yield call
    forget()


def refused(read, *words) -> str:
    with pytest.raises(UserError) as caught:
        read(*words)
    return " ".join(str(caught.value).split())


def weights(classes: int = 3) -> dict[str, torch.Tensor]:
    return {f"params/{name}": value for name, value in init(models.build("pcpvt_nano", classes), 0).items()}


# Fields.


@pytest.mark.parametrize("name", ["data.path", "checkpoint", "eval.ensemble"])
def test_a_value_after_a_space_means_what_it_means_after_an_equals_sign(read, name, tmp_path):
    torch.save({"head.weight": torch.ones(1)}, tmp_path / "a.pth")
    value = f"{tmp_path}/a.pth"
    mode = "--mode=eval" if name != "data.path" else "--mode=train"
    joined, apart = read(STOCK, mode, f"--config.{name}={value}"), read(STOCK, mode, f"--config.{name}", value)
    assert joined.config.to_dict() == apart.config.to_dict()
    assert joined.config.data.name == "folder" and joined.config.image_size == 224


def test_other_data_than_the_embedded_bring_the_recipe_for_them(read):
    assert read(STOCK, "--config.data.name=hfds/x").config.image_size == 224
    for name in ("digits", "synthetic"):
        assert read(STOCK, f"--config.data.name={name}").config.image_size == 32


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("--config.augment.scale[0]=0.3", "config.augment.scale[0]: no such field: did you mean config.augment.scale?"),
        ("--config.batch-size=3", "config.batch-size: no such field: did you mean config.batch_size?"),
        ("--config.batch_sise=3", "config.batch_sise: no such field: did you mean config.batch_size?"),
        ("--noconfig.tensorbord", "config.tensorbord: no such field: did you mean config.tensorboard?"),
        ("--config.=3", "config.: no such field: see --help for the fields"),
        ("--config.batch_size=x", "config.batch_size: 'x' is not of type int: global batch, over all devices"),
    ],
)
def test_a_field_that_cannot_be_set_is_one_line(read, word, said):
    assert said in refused(read, STOCK, word)


@pytest.mark.parametrize("mode", ["predict", "export"])
def test_an_ensemble_is_for_evaluation_alone(read, mode):
    said = refused(read, STOCK, f"--mode={mode}", "--config.eval.ensemble=a.pth,b.pth")
    assert said == f"config.eval.ensemble: --mode={mode} takes one model: name it with config.checkpoint"


# Config files.

HEAD = "from pcpvt.config import recipes\ndef get_config(arg=None):\n    c = recipes.from_arg(arg, 'pcpvt_s', 0.2)\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("# Readme\nThis is no Python.\n", "line 2: SyntaxError: invalid syntax"),
        (HEAD + "    return c.batch +\n", "line 4: SyntaxError: invalid syntax"),
        (HEAD + "    return undefined\n", "line 4: NameError: name 'undefined' is not defined"),
        (HEAD + "    c.batch_size = '16'\n", "line 4: TypeError: "),
        (HEAD + "    c.optimizer.lr = 3\n", "line 4: AttributeError: "),
        ("import no_such_module\n", "line 1: ModuleNotFoundError: No module named 'no_such_module'"),
        ("x = 3\n", "has no attribute 'get_config': give a file with get_config(ARG)"),
        ("\0", "give a file with get_config(ARG)"),
        (HEAD, "get_config(ARG) gave None: return what recipes.from_arg gives"),
        ("def get_config(arg=None):\n    return {'lr': 3.0}\n", "gave {'lr': 3.0}: return what"),
    ],
)
def test_a_config_that_is_none_is_one_line(read, tmp_path, text, said):
    (tmp_path / "mine.py").write_text(text)
    found = refused(read, f"--config={tmp_path / 'mine.py'}:cpu")
    assert found.startswith(f"--config: {tmp_path / 'mine.py'}: ") and said in found and "Traceback" not in found


def test_what_a_recipe_says_about_arg_is_not_said_about_the_file(read):
    assert refused(read, "--config=configs/pcpvt_s.py:gpu8").startswith("--config ARG: 'gpu8' is no device")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("c.batchsize = 16", "config.batchsize: no such field: did you mean config.batch_size?"),
        ("del c.keep", "config.keep is missing: begin with what recipes.from_arg gives"),
    ],
)
@pytest.mark.parametrize("mode", ["train", "schedule"])
def test_a_misspelt_field_in_a_config_file_is_one_line(read, tmp_path, line, said, mode):
    (tmp_path / "mine.py").write_text(f"{HEAD}    {line}\n    return c\n")
    assert said in refused(read, f"--config={tmp_path / 'mine.py'}:cpu", f"--mode={mode}")


def test_installed_configs_stand_in_for_their_own_names_only(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("configs/pcpvt_s.py", "pcpvt_s.py:cpu", "./configs/pcpvt_b.py"):
        assert cli.find_config(path).endswith(f"/configs/{path.rpartition('/')[2]}")
    (tmp_path / "folder.py").mkdir()
    for path in ("expriments/pcpvt_s.py", f"{tmp_path}/configs/pcpvt_s.py", "configs/mine.py", "folder.py"):
        with pytest.raises(UserError, match=f"--config: {path}: no such file"):
            cli.find_config(path)


# Places.


def test_tilde_is_the_home_folder_in_every_path(read, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.py").write_text(f"{HEAD}    return c\n")
    assert read("--config=~/mine.py:cpu", "--workdir=~/runs/a").workdir == tmp_path / "runs" / "a"
    meta = {"step": 1, "config": {"image_size": 40, "batch_size": 8}, "classes": ["a"], "image_size": [40, 40]}
    checkpoint.save(tmp_path / "A" / "checkpoints", weights(1), meta)
    (tmp_path / "A" / "config.json").write_text('{"image_size": 40}')
    assert read("--mode=eval", STOCK, "--config.checkpoint=~/A").config.image_size == 40
    assert load_model("~/A").path == str(tmp_path / "A" / "checkpoints" / "step-00000001.safetensors")
    with pytest.raises(UserError, match=r"~nobody-here/a\.pth: no such file"):
        load_model("~nobody-here/a.pth")


def test_checkpoint_without_a_config_is_taken_as_weights_from_elsewhere(read, tmp_path):
    path = checkpoint.save(tmp_path, weights(), {"step": 5})
    run = read("--mode=eval", STOCK, "--config.model.name=pcpvt_nano", f"--config.checkpoint={path}")
    assert run.config.data.name == "folder" and run.config.checkpoint == str(path)


def test_torchruns_count_is_not_refused_where_arg_names_none(read, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    path = checkpoint.save(tmp_path, weights(), {"step": 1, "config": {"processes": 8, "device": "cpu", "epochs": 1.0}})
    run = read("--mode=eval", "--config=configs/pcpvt_s.py", f"--config.checkpoint={path}")
    assert run.config.processes == 2
    assert "torchrun started 2 processes" in refused(read, "--config=configs/pcpvt_s.py:cpu3")
