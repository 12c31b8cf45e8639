"""Parses the command line: flags, the config file and its ARG; every error is one line. Imports no torch."""

import os
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Collection
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict, config_flags

from pcpvt.config import other_tools, stored
from pcpvt.config.fields import FIELDS, base, unknown
from pcpvt.config.help import text as help_text
from pcpvt.errors import UserError, put

DEFAULT_CONFIG = "configs/pcpvt_s.py"
PROGRAM = ("python", "-m", "pcpvt.main")
FIELD_SYNTAX = "fields are given as --config.NAME=VALUE"


class _Print(flags.BooleanFlag):
    """A flag that prints a text and ends the program."""

    def __init__(self, name: str, text: Callable[[], str], short_name: str | None = None):
        super().__init__(name, False, "", short_name=short_name, allow_override=True)
        self._text = text

    def parse(self, argument: Any) -> None:
        if self._parse(argument):
            put(self._text(), sys.stdout)
            sys.exit(0)


class Command(NamedTuple):
    """What a command line asks for."""

    mode: str
    workdir: Path
    get_config: Callable[[str], ConfigDict]  # of the config file
    arg: str  # ARG, or empty
    overrides: dict[str, Any]  # the fields that are given, by dotted name
    config: str = ""  # the value of --config, where it is given
    names_workdir: bool = False  # whether --workdir is given

    def words(self) -> list[str]:
        """The arguments that `parse` makes this command of: one spelling for every way to write it."""
        fields = [f"--config.{name}={value}" for name, value in self.overrides.items()]
        workdir = [f"--workdir={self.workdir}"] if self.names_workdir else []
        return [f"--mode={self.mode}", *([f"--config={self.config}"] if self.config else []), *fields, *workdir]

    def line(self, workdir: Path | None = None) -> str:
        """The command line, to be copied into a shell; with another workdir, if one is given."""
        command = self if workdir is None else self._replace(workdir=workdir, names_workdir=True)
        words = [word for word in command.words() if word != "--mode=train"]
        return " ".join(map(quoted, [*PROGRAM, *words]))


def quoted(word: str) -> str:
    """A word for a shell; of `--NAME=VALUE` the value alone is quoted, which reads better."""
    name, equals, value = word.partition("=")
    return f"{name}={shlex.quote(value)}" if equals and value and shlex.quote(name) == name else shlex.quote(word)


def parse(argv: list[str], modes: Collection[str], values: flags.FlagValues = flags.FLAGS) -> Command:
    """Parses a command line.

    Args:
        argv: with the program's name.
        modes: the choices of --mode.
        values: where the flags are defined.

    Raises:
        UserError: for what is not understood.
    """
    # ml_collections defines a flag for each of these words, and a flag `config` that holds a config; ours names a file.
    every_field = ["", *(f"--config.{name}" for name in FIELDS)]
    config_flags.DEFINE_config_dict("config", base(), flag_values=values, sys_argv=every_field)
    fields_flag = values["config"]
    flags.DEFINE_string(
        "config", DEFAULT_CONFIG, "Python file with get_config(ARG), then `:ARG`, e.g. configs/pcpvt_s.py:npu8,perf.",
        flag_values=values, allow_override=True,
    )  # fmt: skip
    flags.DEFINE_string("workdir", None, "Folder of the run; default: runs/ and the config's name.", flag_values=values)
    flags.DEFINE_enum(
        "mode", "train", list(modes), "What to do; all but train work on what a workdir holds.", flag_values=values
    )
    for name, short in (("help", "h"), ("helpshort", None), ("helpfull", None)):  # absl's list all flags of libraries
        flags.DEFINE_flag(_Print(name, help_text, short), flag_values=values)
    flags.DEFINE_flag(_Print("version", _version), flag_values=values)
    try:
        words = values(argv)
    except flags.UnrecognizedFlagError as error:
        if explained := other_tools.explain(argv[1:], list(values)):
            raise explained from None
        prefix, _, name = error.flagname.partition(".")
        misspelt = prefix in ("config", "noconfig") and name not in FIELDS
        raise unknown(name) if misspelt else UserError(f"{error}: see --help") from None
    except (flags.Error, ValueError) as error:
        raise UserError(_one_line(str(error))) from None
    if len(words) > 1:
        folder = os.path.isdir(os.path.expanduser(words[1])) and words[1] not in modes
        how = f"a folder of images is given as --config.data.path={words[1]}" if folder else FIELD_SYNTAX
        raise UserError(f"{words[1]!r}: not understood: {how}")
    overrides = config_flags.get_override_values(fields_flag)
    if values.mode in ("predict", "export") and overrides.get("eval.ensemble"):
        raise UserError(f"config.eval.ensemble: --mode={values.mode} takes one model: name it with config.checkpoint")
    path, _, arg = values.config.partition(":")
    file = find_config(path)
    # A bench and a schedule are no part of a run: by default they have a folder of their own.
    name = Path(file).stem + (f"-{values.mode}" if values.mode in ("bench", "schedule") else "")
    workdir = Path(os.path.expanduser(values.workdir or Path("runs") / name))
    given = values.config if values["config"].present else ""
    return Command(values.mode, workdir, load(file), arg, overrides, given, values.workdir is not None)


def _version() -> str:
    from pcpvt import __version__  # here, because finding the package's metadata takes time

    return f"pcpvt {__version__}\n"


def _one_line(text: str) -> str:
    """absl's message about a flag, as one line with the field's help."""
    text = " ".join(text.split("\n")[0].split())
    if match := re.match(r"flag --config\.([\w.]+)=(.*?): ", text):
        field = FIELDS[match[1]]
        kind = field.default if field.unset else type(field.default)
        return f"config.{match[1]}: {match[2]!r} is not of type {kind.__name__}: {field.help}"
    return f"{text}: see --help"


def find_config(file: str) -> str:
    """A config file's path as given, or the installed `configs/NAME` for `configs/NAME` or `NAME`."""
    file = os.path.expanduser(file)
    if os.path.isfile(file):
        return file
    # A wheel holds the folder configs/ as pcpvt/configs; an editable install has it beside the package.
    package = Path(__file__).parent.parent
    installed = [place / "configs" / Path(file).name for place in (package, package.parent)]
    installed = [path for path in installed if path.is_file()]
    if not installed or Path(file).parent not in (Path("configs"), Path()):  # another folder is the user's own
        raise UserError(f"--config: {file}: no such file: give one like configs/pcpvt_s.py:cpu")
    return str(installed[0])


def load(file: str) -> Callable[[str], ConfigDict]:
    """The function `get_config(ARG)` of a config file; it raises UserError where the file is wrong."""

    def get_config(arg: str) -> ConfigDict:
        try:
            module = ModuleType("config")
            module.__file__, sys.modules["config"] = file, module
            SourceFileLoader("config", file).exec_module(module)
            config = module.get_config(*([arg] if arg else []))
        except UserError:
            raise
        except Exception as error:  # a config file is a program, and may raise anything
            raise _file_error(file, error) from None
        if not isinstance(config, ConfigDict):
            raise UserError(f"--config: {file}: get_config(ARG) gave {config!r}: return what recipes.from_arg gives")
        given = stored.flat(config)
        for name in given:
            if name not in FIELDS:
                raise unknown(name)
        for name in FIELDS:
            if name not in given:
                raise UserError(f"--config: {file}: config.{name} is missing: begin with what recipes.from_arg gives")
        return config

    return get_config


def _file_error(file: str, error: Exception) -> UserError:
    """The line about what a config file raised."""
    line, text = None, str(error)
    for frame in traceback.extract_tb(error.__traceback__):
        line = frame.lineno if frame.filename == file else line
    if isinstance(error, SyntaxError) and error.filename == file:
        line, text = error.lineno, error.msg
    if line is None:
        return UserError(f"--config: {file}: {text}: give a file with get_config(ARG), like configs/pcpvt_s.py")
    return UserError(f"--config: {file}: line {line}: {type(error).__name__}: {text}: correct the file")
