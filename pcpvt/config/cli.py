"""Flags to a run: which config, which workdir, which mode; with one-line errors. Only `read_run` imports torch."""

from __future__ import annotations

import difflib
import os
import re
import sys
import traceback
from itertools import zip_longest
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from pcpvt.config import fields, recipes, stored
from pcpvt.config.request import Run
from pcpvt.errors import UserError

MODES = ("train", "eval", "predict", "export", "bench", "report", "schedule")
DEFAULT_CONFIG = "configs/pcpvt_s.py"


def define_flags() -> None:
    """Defines the flags; ml_collections reads the overrides of fields from sys.argv while it does."""
    sys.argv[:] = _with_config(sys.argv)
    config_flags.DEFINE_config_file(
        "config", DEFAULT_CONFIG, "Python file with get_config(ARG), then `:ARG`, e.g. configs/pcpvt_s.py:npu8,perf."
    )
    flags.DEFINE_string("workdir", None, "Folder of the run; default: runs/ and the config's name.")
    flags.DEFINE_enum("mode", "train", MODES, "What to do; all but train work on what a workdir holds.")


def field_help() -> str:
    return fields.describe()


def inside_torchrun() -> bool:
    return "WORLD_SIZE" in os.environ and "RANK" in os.environ


def find_config(path: str) -> str:
    """A config's path as given, or the installed `configs/NAME` or `NAME` when there is no such file here."""
    file, _, arg = path.partition(":")
    file = os.path.expanduser(file)
    if not os.path.isfile(file):
        # A wheel holds the folder configs/ as pcpvt/configs; an editable install has it beside the package.
        package, folder = Path(__file__).parent, Path(file).parent
        found = [place / "configs" / Path(file).name for place in (package, package.parent)]
        found = [path for path in found if path.is_file()]
        if not found or folder not in (Path("configs"), Path()):  # a folder of the user's own is not guessed at
            raise UserError(f"--config: {file}: no such file: give one like configs/pcpvt_s.py:cpu")
        file = str(found[0])
    return f"{file}:{arg}" if arg else file


def parse(argv: list[str]) -> list[str]:
    """`flags.FLAGS(argv)` with our errors: one line that names the flag, the value and the remedy."""
    try:
        return flags.FLAGS(argv)
    except Exception as error:  # a config is a program, and may raise anything
        raise _told(error, argv[1].removeprefix("--config=").partition(":")[0]) from None


def _with_config(argv: list[str]) -> list[str]:
    """The arguments with the config's path found, and the names of fields checked."""
    out, path = [], DEFAULT_CONFIG
    expects = False
    for word in argv:
        name, equals, value = word.partition("=")
        if expects:
            path, expects = word, False
            continue
        if name in ("--config", "-config"):
            path, expects = value, not equals
            continue
        out.append(word)
    given = _given(out)
    for name in given:
        _check_field(name)
    path = _imply_folder(_imply_count(path, given), given)
    return [out[0], f"--config={find_config(path)}", *out[1:]]


def _given(argv: list[str]) -> dict[str, str]:
    """Field to value, as arguments give them: `--config.FIELD=VALUE`, or `--config.FIELD VALUE` in two words."""
    found = {}
    for word, following in zip_longest(argv, argv[1:], fillvalue=""):
        if match := re.fullmatch(r"--?(?:no)?config\.([^=]*)(?:=(.*))?", word, re.DOTALL):
            found[match[1]] = following if match[2] is None else match[2]
    return found


def _imply_count(path: str, given: dict[str, str]) -> str:
    """Under torchrun, a device without a number in ARG means as many as torchrun started."""
    file, _, arg = path.partition(":")
    device, *options = arg.split(",")
    if not inside_torchrun() or "processes" in given or not device.isalpha():
        return path
    return f"{file}:{','.join([device + os.environ['WORLD_SIZE'], *options])}"


def _imply_folder(path: str, given: dict[str, str]) -> str:
    """Adds `folder` to an ARG without a recipe for data where other data are given, or weights from elsewhere may be.

    A checkpoint of ours brings its own config, which then replaces the recipe's.
    """
    other = given.get("data.name", "") not in ("", "digits", "synthetic")
    other = other or any(given.get(name) for name in ("data.path", "checkpoint", "eval.ensemble"))
    file, _, arg = path.partition(":")
    if not other or set(arg.split(",")) & set(recipes.DATA_RECIPES):
        return path
    return f"{file}:{arg},folder"


def _check_field(name: str) -> None:
    if name not in fields.FIELDS:
        near = difflib.get_close_matches(name, list(fields.FIELDS), 1, 0.4)
        hint = f"did you mean config.{near[0]}?" if near else "see --help for the fields"
        raise UserError(f"config.{name}: no such field: {hint}")


def _told(error: Exception, path: str) -> UserError:
    """The line about what parsing raised; ml_collections and absl wrap what the config at `path` raised in others."""
    chain: list[BaseException] = [error]
    while inner := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(inner)
    for one in chain:
        if isinstance(one, UserError):
            return one
        lines = [frame.lineno for frame in traceback.extract_tb(one.__traceback__) if frame.filename == path]
        text = str(one)
        if isinstance(one, SyntaxError) and one.filename == path:
            lines, text = [one.lineno], one.msg
        if lines:
            return UserError(f"--config: {path}: line {lines[-1]}: {type(one).__name__}: {text}: correct the file")
    if isinstance(error, flags.Error) and not str(error).startswith("flag --config="):
        return UserError(_explain(str(error)))
    return UserError(f"--config: {path}: {chain[-1]}: give a file with get_config(ARG), like configs/pcpvt_s.py")


def _explain(text: str) -> str:
    """absl's message as one line."""
    text = " ".join(text.split("\n")[0].split())
    if match := re.match(r"flag --(config\.[\w.]+)=(.*?): (.*)", text):
        wanted = fields.FIELDS.get(match[1].removeprefix("config."), ("",))[0]
        kind = (wanted if isinstance(wanted, type) else type(wanted)).__name__
        return f"{match[1]}: {match[2]!r} is not of type {kind}: {fields.FIELDS[match[1].removeprefix('config.')][1]}"
    return f"{text}: see --help" if "see" not in text else text


def read_run(values: flags.FlagValues) -> Run:
    """The run that the parsed flags describe; later modes get the config that the workdir was trained with.

    What the command line gives always wins: fields, and with an explicit ARG the device and the process count.
    """
    from pcpvt.config import plan

    flag = values["config"]
    config, given = values.config, config_flags.get_override_values(flag)
    file, _, arg = config_flags.get_config_filename(flag).partition(":")
    _check_fields(config, file)
    # These are no part of a run: by default they have a folder of their own.
    name = Path(file).stem + (f"-{values.mode}" if values.mode in ("bench", "schedule") else "")
    workdir = Path(os.path.expanduser(values.workdir or Path("runs") / name))
    if values.mode in ("predict", "export") and given.get("eval.ensemble"):
        raise UserError(f"config.eval.ensemble: --mode={values.mode} takes one model: name it with config.checkpoint")
    if values.mode in ("eval", "predict", "export"):
        _adopt(config, given, arg, workdir)
    elif values.mode == "train" and config.checkpoint:
        raise UserError("config.checkpoint: training does not start from it: use config.finetune")
    if inside_torchrun():
        _agree(config, "processes" in given or bool(arg.partition(",")[0]))
    if values.mode in ("export", "report", "schedule"):  # needs no device, whatever the training had
        config.device, config.processes, config.compile = "cpu", 1, "none"
    if values.mode == "predict":
        config.processes = 1
        if config.compile == "auto":
            config.compile = "none"  # compiling takes longer than predicting a few thousand images
    if values.mode == "report" and not workdir.is_dir():
        raise UserError(f"--workdir: {workdir}: no such folder: train first, or name the run with --workdir=DIR")
    _supersede(config, given)
    if config.data.path and config.data.name == "digits" and "data.name" not in given:
        config.data.name = "folder"
    plan.check(config)
    return Run(config, workdir, values.mode)


def _check_fields(config: ConfigDict, file: str) -> None:
    """Raises UserError unless what a config file gave has all fields and no others."""
    if not hasattr(config, "lock"):  # which raises OSError where the config could not read something
        raise UserError(f"--config: {file}: get_config(ARG) gave {config!r}: return what recipes.from_arg gives")
    found = stored.flat(config)
    for name in found:
        _check_field(name)
    if missing := [name for name in fields.FIELDS if name not in found]:
        raise UserError(f"--config: {file}: config.{missing[0]} is missing: begin with what recipes.from_arg gives")


def _adopt(config: ConfigDict, given: dict, arg: str, workdir: Path) -> None:
    """Takes over the trained config; a named checkpoint brings its own, and one from elsewhere leaves all as it is."""
    from pcpvt.checkpoints.load import member_names, trained_config

    members = member_names(given.get("eval.ensemble", ""))
    trained, where = trained_config(given.get("checkpoint", ""), members, workdir)
    if trained is None:
        return
    place = {name: config[name] for name in ("device", "processes", "compile")}
    stored.apply_config(config, trained, where)
    config.checkpoint, config.weights, config.eval.ensemble = "", "auto", ""
    if arg.partition(",")[0]:
        config.update(place)
    config.update_from_flattened_dict(given)


def _agree(config: ConfigDict, asked: bool) -> None:
    """The process count is torchrun's; it is an error to ask for another."""
    started = int(os.environ["WORLD_SIZE"])
    if asked and config.processes != started:
        raise UserError(
            f"config.processes: {config.processes} but torchrun started {started} processes: "
            f"write :{config.device}{started}, or :{config.device} for as many as there are"
        )
    config.processes = started


def _supersede(config: ConfigDict, given: dict) -> None:
    """A duration given in one unit replaces the recipe's in another."""
    for prefix, units in (("", ("epochs", "steps", "examples")), ("warmup_", ("epochs", "steps"))):
        named = [unit for unit in units if prefix + unit in given]
        for unit in units:
            if named and unit not in named:
                config[prefix + unit] = None
