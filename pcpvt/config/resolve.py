"""The config of a run from a config file's function, the command line, a stored config and the launcher.

Everything here is a pure function: it reads no file, no argv and no environment variable.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from pcpvt.config import fields, plan, recipes, sizes, stored, task
from pcpvt.config.recipes import DATA_RECIPES
from pcpvt.errors import UserError
from pcpvt.models.pcpvt import STRIDE


def resolve(
    get_config: Callable[[str], ConfigDict],
    arg: str,
    overrides: Mapping[str, Any],
    *,
    mode: str = "train",
    world_size: int | None = None,
    trained: dict[str, Any] | None = None,
    where: str = "",
    said: Mapping[str, Any] | None = None,
) -> tuple[ConfigDict, list[str]]:
    """The config of a run, locked, and notes for the log about what was implied.

    The fields of `trained` replace those that ARG gives. What the command line gives always wins: `overrides`, and,
    where ARG names a device, the device, the process count and `compile`.

    Args:
        get_config: of the config file; called with ARG.
        arg: ARG as given, or empty.
        overrides: the fields that the command line gives, by dotted name.
        world_size: processes that torchrun started on all hosts; None outside torchrun.
        trained: the nested config of the workdir or the checkpoint to work on; None to take the recipe's fields.
        where: the file that holds `trained`, or that says `said`, for messages.
        said: what a weights file says about itself, by dotted name (see `checkpoints.description`).

    Raises:
        UserError: for a config that cannot be run.
    """
    given = arg
    arg, notes = complete_arg(arg, overrides, world_size)
    names_device = bool(arg.partition(",")[0])
    config = copy.deepcopy(get_config(arg))
    config.lock()
    if trained is not None:
        notes = _about_stored(given, mode, where)
        computing = {name: config[name] for name in ("device", "processes", "compile")}
        stored.apply_config(config, trained, where)
        config.checkpoint, config.eval.ensemble = "", ""
        if mode != "train":  # which starts from `config.finetune` as it did
            config.weights = "auto"
        if names_device:
            config.update(computing)
        elif mode == "bench":
            config.processes = 1  # it measures one device
    notes += believe(config, said or {}, overrides, where, mode)
    config.update_from_flattened_dict(overrides)
    known = ""
    if mode in ("eval", "predict", "export"):
        known = str((said or {}).get("task", "") if trained is None else trained.get("task", "classes"))
    notes += task.settle(config, overrides, known, where, mode)
    if mode == "train":
        if config.checkpoint:
            raise UserError("config.checkpoint: training does not start from it: use config.finetune")
        if "finetune" in arg.split(",") and not config.finetune:
            raise UserError(
                "--config ARG: 'finetune' starts from given weights, and config.finetune is not set: give "
                "--config.finetune=FILE (or timm:NAME, or a workdir), or leave 'finetune' out of ARG"
            )
    if world_size is not None:
        most, fewest = config.processes, config.elastic or config.processes
        if (names_device or "processes" in overrides) and not fewest <= world_size <= most:
            raise UserError(
                f"config.processes: {config.processes} but {world_size} processes were started: "
                f"write :{config.device}{world_size}, or :{config.device} for as many as there are"
            )
        config.processes = world_size
    if mode == "bench" and config.distill.teacher:
        config.distill = fields.base().distill
        notes.append("config.distill.teacher: is left out: --mode=bench measures the training without its teacher")
    if mode == "bench" and config.optimizer != "adamw" and task.trains_timm(config.bench.against):
        notes.append(f"config.optimizer: {config.optimizer} is measured beside timm's training with AdamW")
    if mode in ("export", "report", "schedule"):  # they need no device, whatever the training had
        config.device, config.processes, config.compile = "cpu", 1, "none"
    if mode not in ("train", "schedule") and config.size_schedule:  # the others know one size, the last
        if mode == "bench":
            notes.append(f"config.size_schedule: left out: all is measured at config.image_size={config.image_size}")
        config.size_schedule, config.augment.by_size = "", False
    if mode == "predict":
        config.processes = 1
        if config.compile == "auto":
            config.compile = "none"  # compiling takes longer than predicting a few thousand images
    # A duration given in one unit replaces the recipe's in another.
    for prefix in ("", "warmup_"):
        units = [prefix + unit for unit in plan.UNITS if prefix + unit in config]
        if any(unit in overrides for unit in units):
            config.update({unit: None for unit in units if unit not in overrides})
    _resolve_splits(config, overrides, trained, mode)
    if config.data.path and config.data.name == "digits" and "data.name" not in overrides:
        config.data.name = "folder"
    check(config)
    return config, notes


def _resolve_splits(
    config: ConfigDict, overrides: Mapping[str, Any], trained: Mapping[str, Any] | None, mode: str
) -> None:
    """A split of the command line replaces a stored held-out part and the reverse; other data have no such part."""
    if trained is None:
        return
    path = trained.get("data", {}).get("path")
    moved = mode != "train" and overrides.get("data.path", path) != path
    if "data.val_fraction" in overrides:
        if "data.val_split" not in overrides:
            config.data.val_split = fields.FIELDS["data.val_split"].default
    elif moved or "data.val_split" in overrides:
        config.data.val_fraction = 0.0


def believe(
    config: ConfigDict, said: Mapping[str, Any], overrides: Mapping[str, Any], where: str, mode: str = "eval"
) -> list[str]:
    """Sets the fields that a weights file settles, unless the command line gives them; notes on every difference.

    A training takes the model and the image size from the weights that it starts from. Its other fields, the recipe's,
    stay, and the differences are listed.
    """
    notes = []
    for name, value in said.items():
        group, _, leaf = name.rpartition(".")
        node = config[group] if group else config
        before, given = node[leaf], name in overrides
        if name == "image_width" and "image_size" in overrides and not given:
            continue  # the file's width goes with its height
        if given:
            if overrides[name] != value:
                notes.append(f"config.{name}: {overrides[name]} is given; {where} says {value}")
        elif mode == "train" and name not in ("model.name", "image_size", "image_width"):
            if before != value:
                notes.append(f"config.{name}: {before} is the recipe's; {where} says {value}")
        elif before != value:
            if name == "model.name":
                recipes.change_model(config, value)
            else:
                node[leaf] = value
            if mode == "train":
                notes.append(f"config.{name}: {value}, as {where} says; the recipe has {before}")
    return notes


def _about_stored(arg: str, mode: str, where: str) -> list[str]:
    """Notes about a stored config: where a mode may also do without one, and where it replaces recipes of ARG."""
    unused = [option for option in arg.split(",")[1:] if option]
    if unused:
        names = ", ".join(map(repr, unused))
        return [f"the config is that of {where}: of ARG, {names} is not used; give fields as --config.NAME=VALUE"]
    return [f"the config is that of {where}"] if mode in ("train", "bench", "schedule") else []


def complete_arg(arg: str, overrides: Mapping[str, Any], world_size: int | None) -> tuple[str, list[str]]:
    """ARG with what the rest of the command line implies, and notes about it for the log.

    Under torchrun a device without a number means as many as torchrun started. Data other than the embedded ones, or
    weights that may have been trained on others, imply the recipe `folder` where ARG names no recipe for data.
    """
    device, *options = arg.split(",")
    if world_size is not None and "processes" not in overrides and device.isalpha():
        device += str(world_size)
    causes = [name for name in ("data.path", "checkpoint", "eval.ensemble") if overrides.get(name)]
    if overrides.get("data.name", "") not in ("", "digits", "synthetic"):
        causes.append("data.name")
    if not causes or set(options) & set(DATA_RECIPES):
        return ",".join([device, *options]), []
    completed = ",".join([device, *options, "folder"])
    return completed, [f"config.{causes[0]} is given: the recipe 'folder' is used, as with --config=FILE:{completed}"]


def check(config: ConfigDict) -> None:
    """What can be said wrong about a config without looking at devices or data.

    Raises:
        UserError: naming the field, the value and the remedy.
    """
    fields.check_fields(config)
    task.check(config)
    if config.bench.scaling and config.bench.against:
        raise UserError(
            f"config.bench.against: {config.bench.against!r}: config.bench.scaling measures ours alone: leave it empty"
        )
    if config.data.sampler == "balanced" and config.augment.repeats > 1:
        raise UserError(
            f"config.augment.repeats: {config.augment.repeats} with config.data.sampler=balanced, which draws images "
            "several times by itself: use 1"
        )
    channels = config.model.in_chans
    if channels != 3 and task.trains_timm(config.bench.against):
        raise UserError(
            f"config.bench.against: {config.bench.against!r}: timm's loader reads RGB and config.model.in_chans is "
            f"{channels}: leave it empty"
        )
    if config.patience and config.eval_every.strip() == "0":
        raise UserError(
            f"config.patience: {config.patience} but config.eval_every=0 never evaluates: set one of them otherwise"
        )
    if config.fresh and not config.finetune:
        raise UserError(
            f"config.fresh: {config.fresh!r} but nothing is fine-tuned: set config.finetune, or leave it out"
        )
    _check_distillation(config.distill)
    height, width = config.image_size, config.image_width or config.image_size
    if config.model.pad == "error" and (height % STRIDE or width % STRIDE):
        raise UserError(
            f"config.image_size: {height}x{width} is not divisible by {STRIDE}: use one that is or config.model.pad=pad"
        )
    sizes.check_sizes(config, (height, width), STRIDE)
    if config.compile == "npugraphs" and config.device != "npu":
        raise UserError(f"config.compile: 'npugraphs' needs an NPU and config.device is {config.device!r}: use auto")
    plan.duration(config, "warmup_")
    length = plan.duration(config, "")
    if length is None:
        raise UserError(f"{', '.join(f'config.{unit}' for unit in plan.UNITS)}: none is set: give one of them")
    if not length[0] > 0:
        raise UserError(f"config.{length[1]}: {length[0]} is no duration: give more than 0")


def _check_distillation(distill: ConfigDict) -> None:
    """Raises UserError for a field of a distillation that would have no effect."""
    changed = [name for name in distill if distill[name] != fields.base().distill[name]]
    if changed and not distill.teacher:
        raise UserError(
            f"config.distill.{changed[0]}: {distill[changed[0]]!r} but there is no teacher: set "
            "config.distill.teacher, or leave it out"
        )
    if distill.mode == "hard" and "temperature" in changed:
        raise UserError(
            f"config.distill.temperature: {distill.temperature:g} is of soft targets and config.distill.mode is "
            "'hard': leave it out"
        )
