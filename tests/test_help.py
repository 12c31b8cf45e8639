"""`--help`, `--version`, and what is said about flags of other tools."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

import pytest
from absl import flags

import pcpvt
from pcpvt import main
from pcpvt.config import cli, help, other_tools
from pcpvt.config.fields import FIELDS
from pcpvt.config.recipes import RECIPES
from pcpvt.errors import UserError

COMMANDS = (Path(__file__).parent.parent / "docs" / "commands.md").read_text()


def parse(*words: str) -> cli.Command:
    return cli.parse(["pcpvt", *words], main.MODES, flags.FlagValues())


def printed(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as ended:
        parse(*words)
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("words", [["-h"], ["--help"], ["-help"], ["--workdir=x", "--helpfull"], ["--helpshort"]])
def test_help_begins_with_modes_recipes_and_workdir_and_groups_the_fields(words, capsys):
    text = printed(capsys, *words)
    assert text == help.text()
    places = [text.index(f"\n  {name} ") for name in [*main.MODES, *RECIPES]] + [text.index("\n--workdir=DIR ")]
    places += [text.index(f"\n\n{title}\n") for title in help.GROUPS.values()]
    assert places == sorted(places)
    assert list(help.MODES) == list(main.MODES)
    assert help.GROUPS.keys() <= FIELDS.keys() and next(iter(FIELDS)) in help.GROUPS
    assert all(text.count(f"\n  --config.{name}=") == 1 for name in FIELDS)


def test_the_version_is_the_packages(capsys):
    assert pcpvt.__version__ == importlib.metadata.version("pcpvt")
    assert printed(capsys, "--version") == f"pcpvt {pcpvt.__version__}\n"


def test_a_word_that_asks_for_help_may_be_a_value():
    assert parse("--config.data.path", "-h").overrides == {"data.path": "-h"}


# Flags of other tools.


def test_all_flags_of_other_tools_are_explained_at_once():
    words = [
        "DIR",
        "--batch-size",
        "32",
        "--data_path=/imagenet",
        "--epochs",
        "300",
        "--pin-mem",
        "--eval",
        "--mixup=0.8",
    ]
    with pytest.raises(UserError) as error:
        parse("--config=configs/pcpvt_s.py:cpu", "--config.seed=3", *words)
    assert str(error.value) == (
        "flags of other tools: --batch-size: here --config.batch_size=N (over all devices, not of one); "
        "--data_path: here --config.data.path=DIR; --epochs: here --config.epochs=N; "
        "--pin-mem: here nothing, chosen by the program; --eval: here --mode=eval; "
        "--mixup: here --config.mixup=ALPHA; see --help"
    )


@pytest.fixture(scope="module")
def own_flags():
    """The names of the program's flags."""
    values = flags.FlagValues()
    cli.parse(["pcpvt"], main.MODES, values)
    return list(values)


@pytest.mark.parametrize("flag", other_tools.HERE)
def test_what_takes_the_place_of_a_flag_exists(flag, own_flags):
    dashes = "-" if len(flag) <= 2 else "--"
    assert str(other_tools.explain([f"{dashes}{flag}", "3"], own_flags)).startswith("flags of other tools: ")
    here = other_tools.HERE[flag]
    for name in re.findall(r"--config\.([\w.]+)=", here):
        assert name in FIELDS
    for mode in re.findall(r"--mode=(\w+)", here):
        assert mode in main.MODES
    for recipe in re.findall(r":npu\d,(\w+)", here):
        assert recipe in RECIPES
    for value in re.findall(r"--config\.[\w.]+=[\w:]*[a-z][\w:.-]*", here):  # values that are no placeholder
        parse(value)


def test_each_flag_stands_in_the_table_once():
    assert len(other_tools.HERE) == sum(map(len, other_tools.TABLE.values()))


def test_the_documents_table_is_the_programs():
    rows = re.findall(r"^\| `(--?\w.*?)` \| (.*?) \|$", COMMANDS, re.MULTILINE)
    assert {here: set(re.findall(r"--?([\w-]+)", flags)) for flags, here in rows} == {
        here: set(flags) for here, flags in other_tools.TABLE.items()
    }


def test_the_document_names_every_mode():
    for mode in main.MODES:
        assert f"`{mode}`" in COMMANDS


def test_a_folder_without_a_flag_is_taken_for_data(tmp_path):
    with pytest.raises(
        UserError, match=rf"not understood: a folder of images is given as --config.data.path={tmp_path}$"
    ):
        parse(str(tmp_path))
