"""Flags to a run: which config, which workdir, which mode; with one-line errors and without importing torch."""

from __future__ import annotations

import difflib
import os
import re
import sys
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from pcpvt.config import fields, recipes
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
    """A config's path as given, or the installed one of that name when there is no such file here."""
    file, _, arg = path.partition(":")
    if not os.path.exists(file):
        # A wheel holds the folder configs/ as pcpvt/configs; an editable install has it beside the package.
        package = Path(__file__).parent
        found = [folder / Path(file).name for folder in (package / "configs", package.parent / "configs")]
        found = [path for path in found if path.is_file()]
        if not found:
            raise UserError(f"--config: {file}: no such file: give one like configs/pcpvt_s.py:cpu")
        file = str(found[0])
    return f"{file}:{arg}" if arg else file


def parse(argv: list[str]) -> list[str]:
    """`flags.FLAGS(argv)` with our errors: one line that names the flag, the value and the remedy."""
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        raise _said_by_config(error) or UserError(_explain(str(error))) from None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        text = " ".join(str(error).replace("\\n", " ").split()).strip("'\" ")
        raise UserError(f"--config: {text}") from None


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
        if match := re.match(r"--?config\.([\w.]+)$", name):
            _check_field(match[1])
        out.append(word)
    path = _imply_folder(_imply_count(path, out), out)
    return [out[0], f"--config={find_config(path)}", *out[1:]]


def _imply_count(path: str, argv: list[str]) -> str:
    """Under torchrun, a device without a number in ARG means as many as torchrun started."""
    file, _, arg = path.partition(":")
    device, *options = arg.split(",")
    given = any(re.match(r"--?config\.processes\b", word) for word in argv)
    if not inside_torchrun() or given or not device.isalpha():
        return path
    return f"{file}:{','.join([device + os.environ['WORLD_SIZE'], *options])}"


def _imply_folder(path: str, argv: list[str]) -> str:
    """Adds `folder` to an ARG without a recipe for data where `data.path` is given, or weights from elsewhere may be.

    A checkpoint of ours brings its own config, which then replaces the recipe's.
    """
    given = any(re.match(r"--?config\.(data\.path|checkpoint|eval\.ensemble)=.", word) for word in argv)
    file, _, arg = path.partition(":")
    if not given or set(arg.split(",")) & set(recipes.DATA_RECIPES):
        return path
    return f"{file}:{arg},folder"


def _check_field(name: str) -> None:
    if name not in fields.FIELDS:
        near = difflib.get_close_matches(name, list(fields.FIELDS), 1, 0.4)
        hint = f"did you mean config.{near[0]}?" if near else "see --help for the fields"
        raise UserError(f"config.{name}: no such field: {hint}")


def _said_by_config(error: BaseException | None) -> UserError | None:
    """The error that a config file raised for its reader, which ml_collections wraps in others."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error


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
    # These are no part of a run: by default they have a folder of their own.
    name = Path(file).stem + (f"-{values.mode}" if values.mode in ("bench", "schedule") else "")
    workdir = Path(values.workdir or Path("runs") / name)
    if values.mode in ("eval", "predict", "export"):
        _adopt(config, given, arg, workdir)
    elif values.mode == "train" and config.checkpoint:
        raise UserError("config.checkpoint: training does not start from it: use config.finetune")
    if inside_torchrun():
        _agree(config, "processes" in given or bool(arg))
    if values.mode in ("export", "report", "schedule"):  # needs no device, whatever the training had
        config.device, config.processes, config.compile = "cpu", 1, "none"
    if values.mode == "predict":
        config.processes = 1
    if values.mode == "report" and not workdir.is_dir():
        raise UserError(f"--workdir: {workdir}: no such folder: train first, or name the run with --workdir=DIR")
    _supersede(config, given)
    if config.data.path and config.data.name == "digits" and "data.name" not in given:
        config.data.name = "folder"
    plan.check(config)
    return Run(config, workdir, values.mode)


def _adopt(config: ConfigDict, given: dict, arg: str, workdir: Path) -> None:
    """Takes over the trained config; a named checkpoint brings its own, and one from elsewhere leaves all as it is."""
    from pcpvt.modes import chosen
    from pcpvt.store import records

    members = chosen.ensemble(given.get("eval.ensemble", ""))
    stored, where = chosen.trained_config(given.get("checkpoint", ""), members, workdir)
    if stored is None:
        return
    place = {name: config[name] for name in ("device", "processes", "compile")}
    records.apply_config(config, stored, where)
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
