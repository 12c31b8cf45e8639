"""The table of all fields of a config; `--help`, the checks and the rules of resuming all follow from it.

A new field is one entry here.
"""

from __future__ import annotations

import difflib
import enum
from operator import attrgetter
from typing import Any, NamedTuple

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from pcpvt.config.checks import (  # isort: skip
    Check, anything, area, at_least, below, between, duration, interval, model, one_of, precision, randaugment, regex,
)  # fmt: skip
from pcpvt.config.stored import nested
from pcpvt.errors import UserError


class Rule(enum.Flag):
    """What may change a field, beside a new run's command line."""

    RECIPE = enum.auto()  # ARG and its recipes (`config.recipes`)
    FREE = enum.auto()  # resuming with another value: how to compute, how long to train, what to write down
    START = enum.auto()  # resuming without a value, as it is read at step 0 only; another value is refused


class Field(NamedTuple):
    """One field of a config."""

    default: Any  # or a type: None unless a value of it is given
    help: str
    check: Check = anything  # of values that are not None
    rule: Rule = Rule(0)
    may_be_unset: bool = False  # although it has a default

    @property
    def unset(self) -> bool:
        """Whether the field is None by default."""
        return isinstance(self.default, type)


DEVICES = ("cpu", "cuda", "npu")
RECIPE, FREE, START = Rule

# fmt: off
FIELDS = {
    "model.name": Field("pcpvt_s", "pcpvt_s | pcpvt_b | pcpvt_l | pcpvt_nano (a miniature for smoke runs)",
        model, RECIPE),
    "model.drop_path": Field(0.2, "drop-path rate of the last block; rises linearly from 0", below(1), RECIPE),
    "model.pad": Field("pad", "sides that 32 does not divide: pad (zeros, nothing is lost) | error",
        one_of("pad", "error")),
    "num_classes": Field(int, "outputs of the head; unset: counted from the data", at_least(1)),
    "image_size": Field(224, "image height in pixels", at_least(1), RECIPE),
    "image_width": Field(int, "image width in pixels; unset: as high as wide", at_least(1)),
    "batch_size": Field(1024, "global batch, over all devices", at_least(1), RECIPE),
    "accumulate": Field(0, "micro-batches per step; 0: derived from what fits the device", at_least(0), FREE),
    "epochs": Field(float, "length of training; give epochs, steps or examples", at_least(0), RECIPE | FREE),
    "steps": Field(int, "length of training in optimizer steps", at_least(0), RECIPE | FREE),
    "examples": Field(int, "length of training in training images", between(0, 2**53), FREE),
    "lr": Field(float, "peak learning rate; unset: base_lr * batch_size / 512", at_least(0), RECIPE),
    "base_lr": Field(1e-3, "learning rate per 512 images of the global batch", at_least(0), RECIPE),
    "schedule": Field(
        "cosine", "cosine (per step) | reference (the Twins code's, per epoch and one epoch late) | constant",
        one_of("cosine", "reference", "constant"), RECIPE),
    "warmup_epochs": Field(5.0, "length of the linear warm-up; give warmup_epochs or warmup_steps",
        at_least(0), RECIPE, may_be_unset=True),
    "warmup_steps": Field(int, "length of the linear warm-up in steps", at_least(0), RECIPE),
    "warmup_lr": Field(1e-6, "learning rate at the first step of the warm-up", at_least(0)),
    "min_lr": Field(1e-5, "learning rate at the end", at_least(0), RECIPE),
    "weight_decay": Field(0.05, "AdamW's, except on 1-d tensors, biases and all of pos_block", at_least(0)),
    "beta1": Field(0.9, "AdamW's first-moment decay", below(1)),
    "beta2": Field(0.999, "AdamW's second-moment decay", below(1)),
    "eps": Field(1e-8, "AdamW's denominator constant", at_least(0)),
    "clip_norm": Field(5.0, "global gradient norm to clip at; 0: no clipping", at_least(0)),
    "layer_decay": Field(1.0, "learning-rate factor per block, counted from the head; 1: none",
        between(1e-3, 1), RECIPE),
    "frozen": Field("", "regex over parameter names that are not trained", regex),
    "ema": Field(0.0, "decay of the weights' moving average, which is then what is evaluated; 0: none", below(1)),
    "label_smoothing": Field(0.1, "mass spread over all classes", below(1), RECIPE),
    "mixup": Field(0.8, "mixup's alpha; 0: off", at_least(0), RECIPE),
    "cutmix": Field(1.0, "cutmix's alpha; 0: off", at_least(0), RECIPE),
    "mix_prob": Field(1.0, "probability that a batch is mixed at all", between(0, 1)),
    "mix_switch": Field(0.5, "probability of cutmix when both are on", between(0, 1)),
    "mix_mode": Field("batch", "one draw per batch | pair | elem", one_of("batch", "pair", "elem")),
    "seed": Field(0, "every random number of the run derives from it", between(0, 2**53)),
    "precision": Field("auto", "auto | float32 | bfloat16 | float16 | params=DTYPE,compute=DTYPE,output=DTYPE",
        precision, FREE),
    "compile": Field("auto", "auto | inductor | npugraphs | none",
        one_of("auto", "inductor", "npugraphs", "none"), FREE),
    "kernels": Field(
        "auto", "auto: the device's own for attention, linear maps, drop path | plain: PyTorch's operators",
        one_of("auto", "plain"), FREE),
    "device": Field("cpu", "cpu | cuda | npu", one_of(*DEVICES), RECIPE | FREE),
    "processes": Field(1, "processes over all hosts, one per device", at_least(1), RECIPE | FREE),
    "timeout": Field(2100, "seconds that processes wait for one another before the run ends", at_least(1), FREE),
    "grace": Field(60.0, "seconds from a signal until the run ends unsaved if no step has ended", at_least(1), FREE),
    "finetune": Field("", "weights to start from: a file, timm:NAME or a workdir", anything, START),
    "fresh": Field("", "regex over parameter names that do not come from config.finetune but start anew", regex, START),
    "checkpoint": Field(
        "", "weights to evaluate, predict with or export: a file, timm:NAME or a workdir; unset: the best",
        anything, FREE),
    "weights": Field("auto", "of a file with averaged weights too: params | ema | auto (of ours ema, of others params)",
        one_of("auto", "params", "ema"), START),
    "eval_every": Field("1 epoch", "N epochs | steps | examples between evaluations; 0: only never",
        duration, RECIPE | FREE),
    "save_every": Field("1 epoch", "N epochs | steps | examples between checkpoints; 0: only at the end",
        duration, RECIPE | FREE),
    "log_every": Field("20 steps", "N epochs | steps | examples between records", duration, FREE),
    "tensorboard": Field(True, "TensorBoard events in the workdir's tensorboard/", anything, FREE),
    "keep": Field(2, "newest checkpoints kept beside the best one", at_least(1), FREE),
    "max_skipped": Field(20, "consecutive non-finite steps after which the run stops", at_least(1), FREE),
    "data.name": Field("", "digits | folder | synthetic | a timm dataset name such as hfds/... or torch/cifar10",
        anything, RECIPE),
    "data.path": Field("", "image folder with train/<class>/* and val/<class>/*, or the root for data.name",
        anything, FREE),
    "data.val_split": Field("validation", "of hfds/...: the split to evaluate on, such as test"),
    "data.workers": Field(-1, "loader processes per training process; -1: by the host's cores, 0: none",
        at_least(-1), FREE),
    "data.on_error": Field(
        "error", "unreadable image: error | skip (counted and named; training takes the next instead)",
        one_of("error", "skip"), FREE),
    "augment.scale": Field((0.08, 1.0), "area range of the random resized crop", area, RECIPE),
    "augment.ratio": Field((0.75, 4 / 3), "aspect range of the random resized crop", interval),
    "augment.crop_pad": Field(0, "pixels of padding before a random crop, instead of the resized crop; 0: off",
        at_least(0), RECIPE),
    "augment.hflip": Field(0.5, "probability of a horizontal flip", between(0, 1), RECIPE),
    "augment.randaugment": Field("rand-m9-mstd0.5-inc1", "timm's notation; empty: off", randaugment, RECIPE),
    "augment.color_jitter": Field(0.0, "brightness, contrast and saturation range; 0: off", at_least(0)),
    "augment.erase": Field(0.25, "probability of random erasing with noise", between(0, 1), RECIPE),
    "augment.repeats": Field(1, "draws of each sample per epoch (repeated augmentation)", at_least(1)),
    "eval.crop": Field(0.875, "side of the centre crop over the resized short side", between(0.05, 1), RECIPE | FREE),
    "eval.batch_size": Field(0, "global evaluation batch; 0: as the training batch, bounded", at_least(0), FREE),
    "eval.ensemble": Field("", "all members by comma: files, workdirs, timm:NAME; params, ema: of config.checkpoint",
        anything, FREE),
    "export.format": Field("timm", "timm (safetensors for timm.create_model) | onnx | pt2 (torch.export)",
        one_of("timm", "onnx", "pt2"), FREE),
    "export.output": Field("", "file to write; unset: export/ in the workdir", anything, FREE),
    "export.dynamic_size": Field(False, "onnx, pt2: any image size from 33 px, not only config.image_size",
        anything, FREE),
    "predict.images": Field("", "what to classify: a file, a folder, or a pattern such as 'photos/*.jpg'",
        anything, FREE),
    "predict.format": Field("table", "table | jsonl (a JSON object per line) | csv",
        one_of("table", "jsonl", "csv"), FREE),
    "predict.output": Field("", "file to write; unset: standard output", anything, FREE),
    "predict.explain": Field(False, "also draw, in the workdir's explain/, what speaks for the predicted class",
        anything, FREE),
    "report.compare": Field("", "other workdirs, by comma, to show beside this one", anything, FREE),
    "bench.against": Field("", "timm | timm-compiled: measure timm's model, eager or compiled, and loader beside ours",
        one_of("", "timm", "timm-compiled"), FREE),
    "bench.steps": Field(10, "measured rounds per figure", at_least(1), FREE),
    "bench.scaling": Field(
        False, "measure how cost grows with batch, image size and processes instead; also report.html", anything, FREE),
}
# fmt: on


def base() -> ConfigDict:
    """All fields at their defaults: the ImageNet recipe; unlocked, for a config file to change."""
    return ConfigDict(nested({n: placeholder(f.default) if f.unset else f.default for n, f in FIELDS.items()}))


def describe() -> str:
    """The help text: one line per field."""
    rows = []
    for name, field in FIELDS.items():
        default = "" if field.unset else field.default
        rows.append(f"  --config.{name}={default!s}".ljust(44) + f"  {field.help}")
    return "\n".join(rows)


def unknown(name: str) -> UserError:
    """The error for a field that does not exist, with the nearest one that does."""
    near = difflib.get_close_matches(name, list(FIELDS), 1, 0.4)
    hint = f"did you mean config.{near[0]}?" if near else "see --help for the fields"
    return UserError(f"config.{name}: no such field: {hint}")


def check_fields(config: ConfigDict) -> None:
    """Raises UserError for the first field with a value that it cannot have."""
    for name, field in FIELDS.items():
        value = attrgetter(name)(config)
        if value is None and not (field.unset or field.may_be_unset):
            raise UserError(f"config.{name}: None is no value for it: leave the field out, or give one")
        if value is not None and (problem := field.check(value)):
            raise UserError(f"config.{name}: {problem}")


def rule(name: str) -> Rule:
    """The rule of a field; one that only another version has follows the first field of its group."""
    group, dot, _ = name.partition(".")
    relatives = [field for other, field in FIELDS.items() if dot and other.startswith(f"{group}.")]
    return next((field.rule for field in (FIELDS.get(name), *relatives) if field), Rule(0))
