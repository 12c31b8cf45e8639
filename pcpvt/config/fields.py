"""The table of all fields of a config; `--help`, the checks and the rules of resuming all follow from it.

A new field is one entry here.
"""

import difflib
import enum
from operator import attrgetter
from typing import Any, NamedTuple

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from pcpvt.config import licences, sizes

from pcpvt.config.checks import (  # isort: skip
    Check, anything, area, at_least, below, between, counts, duration, interval, listed_of, model, one_of, precision,
    randaugment, regex, value_range,
)  # fmt: skip
from pcpvt.config.stored import nested
from pcpvt.errors import UserError


class Rule(enum.Flag):
    """What may change a field, beside a new run's command line."""

    RECIPE = enum.auto()  # ARG and its recipes (`config.recipes`)
    FREE = enum.auto()  # resuming with another value: how to compute, how long to train, what to write down
    START = enum.auto()  # resuming without a value, as it is read at step 0 only; another value is refused
    DIVERGED = enum.auto()  # resuming with another value a run that has ended because it diverged


class Field(NamedTuple):
    """One field of a config."""

    default: Any  # or a type: None unless a value of it is given
    help: str
    rule: Rule = Rule(0)
    check: Check = anything  # of values that are not None
    may_be_unset: bool = False  # although it has a default

    @property
    def unset(self) -> bool:
        """Whether the field is None by default."""
        return isinstance(self.default, type)


DEVICES = ("cpu", "cuda", "npu")
GRAPHS = (".onnx", ".xml", ".pt2")  # endings of exported files that hold no weights by name
RECIPE, FREE, START, DIVERGED = Rule
FIXED = Rule(0)

# fmt: off
FIELDS = {
    "model.name": Field("pcpvt_s", "pcpvt_s | pcpvt_b | pcpvt_l | pcpvt_nano (a miniature for smoke runs)",
        RECIPE, model),
    "model.drop_path": Field(0.2, "drop-path rate of the last block; rises linearly from 0", RECIPE, below(1)),
    "model.pad": Field("pad", "sides that 32 does not divide: pad (zeros, nothing is lost) | error",
        FIXED, one_of("pad", "error")),
    "model.in_chans": Field(3, "channels of the images: 1 (grey), 3 (RGB), or bands as they are stored",
        FIXED, between(1, 1024)),
    "task": Field("classes", "labels of an image: classes (one) | multilabel (any number; see docs/multilabel.md)",
        FIXED, one_of("classes", "multilabel")),
    "num_classes": Field(int, "outputs of the head; unset: counted from the data", FIXED, at_least(1)),
    "image_size": Field(224, "image height in pixels", RECIPE, at_least(1)),
    "size_schedule": Field("", "training's sizes, like 128@0,160@0.3,224@0.6 (docs/recipes.md); empty: image_size",
        FIXED, sizes.check),
    "image_width": Field(int, "image width in pixels; unset: as high as wide", FIXED, at_least(1)),
    "batch_size": Field(1024, "global batch, over all devices", RECIPE, at_least(1)),
    "accumulate": Field(0, "micro-batches per step; 0: derived from what fits the device", FREE, at_least(0)),
    "epochs": Field(float, "length of training; give epochs, steps or examples", RECIPE | FREE, at_least(0)),
    "steps": Field(int, "length of training in optimizer steps", RECIPE | FREE, at_least(0)),
    "examples": Field(int, "length of training in training images", FREE, between(0, 2**53)),
    "lr": Field(float, "peak learning rate; unset: base_lr * batch_size / 512", RECIPE | DIVERGED, at_least(0)),
    "base_lr": Field(1e-3, "learning rate per 512 images of the global batch", RECIPE | DIVERGED, at_least(0)),
    "schedule": Field(
        "cosine", "cosine (per step) | reference (the Twins code's, per epoch and one epoch late) | constant",
        RECIPE, one_of("cosine", "reference", "constant")),
    "warmup_epochs": Field(5.0, "length of the linear warm-up; give warmup_epochs or warmup_steps",
        RECIPE, at_least(0), may_be_unset=True),
    "warmup_steps": Field(int, "length of the linear warm-up in steps", RECIPE, at_least(0)),
    "warmup_lr": Field(1e-6, "learning rate at the first step of the warm-up", FIXED, at_least(0)),
    "min_lr": Field(1e-5, "learning rate at the end", RECIPE, at_least(0)),
    "optimizer": Field("adamw", "adamw | muon (for the matrices of the blocks, with AdamW for the rest)",
        FIXED, one_of("adamw", "muon")),
    "weight_decay": Field(0.05, "AdamW's, except on 1-d tensors, biases and all of pos_block", FIXED, at_least(0)),
    "beta1": Field(0.9, "AdamW's first-moment decay", FIXED, below(1)),
    "beta2": Field(0.999, "AdamW's second-moment decay", FIXED, below(1)),
    "eps": Field(1e-8, "AdamW's denominator constant", FIXED, at_least(0)),
    "clip_norm": Field(5.0, "global gradient norm to clip at; 0: no clipping", DIVERGED, at_least(0)),
    "layer_decay": Field(1.0, "learning-rate factor per block, counted from the head; 1: none",
        RECIPE, between(1e-3, 1)),
    "frozen": Field("", "regex over parameter names that are not trained", FIXED, regex),
    "ema": Field(0.0, "decay of the weights' average, which then counts; at step t at most (1+t)/(10+t); 0: none",
        FIXED, below(1)),
    "label_smoothing": Field(0.1, "mass spread over all classes; with multilabel over a class's yes and no",
        FIXED, below(1)),
    "class_weights": Field(
        "none", "in the loss: none | balanced (inverse to a class's images) | a file of weights or name<TAB>weight"),
    "mixup": Field(0.8, "mixup's alpha; 0: off", RECIPE, at_least(0)),
    "cutmix": Field(1.0, "cutmix's alpha; 0: off", RECIPE, at_least(0)),
    "mix_prob": Field(1.0, "probability that a batch is mixed at all", FIXED, between(0, 1)),
    "mix_switch": Field(0.5, "probability of cutmix when both are on", FIXED, between(0, 1)),
    "mix_mode": Field("batch", "one draw per batch | pair | elem", FIXED, one_of("batch", "pair", "elem")),
    "distill.teacher": Field(
        "", "a model to learn from beside the labels: a file, also an exported one, timm:NAME, hf-hub:NAME, a folder"),
    "distill.mode": Field("soft", "soft (the teacher's probabilities) | hard (its answers, as labels)",
        FIXED, one_of("soft", "hard")),
    "distill.temperature": Field(1.0, "of soft: both models' logits are divided by it", FIXED, between(0.01, 1000)),
    "distill.weight": Field(0.5, "share of the loss towards the teacher; that of the labels has the rest",
        FIXED, between(0, 1)),
    "distill.image_size": Field(int, "image height for the teacher; unset: as its file says, else the model's",
        FIXED, at_least(1)),
    "distill.precision": Field("auto", "the teacher's; auto: as config.precision; an exported graph has its own",
        FREE, precision),
    "seed": Field(0, "every random number of the run derives from it", FIXED, between(0, 2**53)),
    "precision": Field("auto", "auto | float32 | bfloat16 | float16 | params=DTYPE,compute=DTYPE,output=DTYPE",
        FREE, precision),
    "compile": Field("auto", "auto | inductor | npugraphs | none",
        FREE, one_of("auto", "inductor", "npugraphs", "none")),
    "kernels": Field(
        "auto", "auto: the device's own for attention, linear maps, drop path | plain: PyTorch's operators",
        FREE, one_of("auto", "plain")),
    "device": Field("cpu", "cpu | cuda | npu", RECIPE | FREE, one_of(*DEVICES)),
    "processes": Field(1, "processes over all hosts, one per device", RECIPE | FREE, at_least(1)),
    "timeout": Field(2100, "seconds that processes wait for one another before the run ends", FREE, at_least(1)),
    "grace": Field(60.0, "seconds from a signal until the run ends unsaved if no step has ended", FREE, at_least(1)),
    "restarts": Field(int, "times that crashed, killed or hung processes are started again from the newest checkpoint; "
        "unset: 3 with several processes, 0 with one", FREE, at_least(0)),
    "audit_every": Field(int, "steps from one audit to the next: each process repeats another one's gradient; 0: "
        "never; unset: 200 with several processes, 0 with one", FREE, at_least(0)),
    "audit_action": Field("warn", "after an audit that found a difference: warn | restart (without the suspect's "
        "host if config.elastic allows it) | end",
        FREE, one_of("warn", "restart", "end")),
    "elastic": Field(0, "fewest processes to go on with when a host does not come back, or an audit suspects it; "
        "0: all", FREE, at_least(0)),
    "finetune": Field("", "weights to start from: a file, timm:NAME, hf-hub:NAME or a workdir", START),
    "fresh": Field("", "regex over parameter names that do not come from config.finetune but start anew", START, regex),
    "checkpoint": Field(
        "", "weights to evaluate, predict with, export: a file, timm:NAME, hf-hub:NAME, a workdir; else: best", FREE),
    "weights": Field("auto", "of a file with averaged weights too: params | ema | auto (of ours ema, of others params)",
        START, one_of("auto", "params", "ema")),
    "eval_every": Field("1 epoch", "N epochs | steps | examples between evaluations; 0: only never",
        RECIPE | FREE, duration),
    "best": Field("acc1", "what the best checkpoint is best in: acc1 | loss | balanced_acc | map; ties: the lower loss",
        FIXED, one_of("acc1", "loss", "balanced_acc", "map")),
    "patience": Field(0, "evaluations without a better one after which the run ends; 0: never", FREE, at_least(0)),
    "save_every": Field("1 epoch", "N epochs | steps | examples between checkpoints; 0: only at the end",
        RECIPE | FREE, duration),
    "log_every": Field("20 steps", "N epochs | steps | examples between records", FREE, duration),
    "tensorboard": Field(True, "TensorBoard events in the workdir's tensorboard/", FREE),
    "keep": Field(2, "newest checkpoints kept beside the best one", FREE, at_least(1)),
    "max_skipped": Field(20, "consecutive non-finite steps after which the run stops", FREE, at_least(1)),
    "data.name": Field("", "digits | folder (also .csv and .tar files) | synthetic | tar | hfds/NAME | torch/NAME",
        RECIPE),
    "data.path": Field(
        "", "folder with train/<class>/* and val/<class>/*, a .csv of path,label[,split], or the root for data.name",
        FREE),
    "data.train_split": Field("train", "the split to train on, as the data call it; .: all there is"),
    "data.val_split": Field(
        "validation", "the split to evaluate on, as the data call it; validation: also val, valid, test; .: all"),
    "data.val_fraction": Field(
        0.0, "share of each class's training images that is held out as validation; 0: none", FIXED, below(1)),
    "data.image_column": Field("", "of hfds/... and .csv: column of images or paths; unset: by its name or type"),
    "data.label_column": Field("", "of hfds/... and .csv: column of labels; unset: by its name or type"),
    "data.class_order": Field(
        "auto", "order of classes: natural (timm's: 2 before 10, no case) | bytes | auto: the data's, folders by bytes",
        FIXED, one_of("auto", "natural", "bytes")),
    "data.class_map": Field("", "file of class names in the order of their labels, a name a line, or name<TAB>label"),
    "data.workers": Field(-1, "loader processes per training process; -1: in all at most the host's cores, 0: none",
        FREE, at_least(-1)),
    "data.on_error": Field(
        "error", "unreadable image: error | skip (counted and named; training takes the next instead)",
        FREE, one_of("error", "skip")),
    "data.sampler": Field(
        "uniform", "uniform (each image once an epoch) | balanced (each class equally often, an epoch as long)",
        FIXED, one_of("uniform", "balanced")),
    "data.value_range": Field(tuple, "low,high of values of more than 8 bits; unset: as the file says",
        FIXED, value_range),
    "augment.scale": Field((0.08, 1.0), "area range of the random resized crop", RECIPE, area),
    "augment.ratio": Field((0.75, 4 / 3), "aspect range of the random resized crop", FIXED, interval),
    "augment.crop_pad": Field(0, "pixels of padding before a random crop, instead of the resized crop; 0: off",
        RECIPE, at_least(0)),
    "augment.hflip": Field(0.5, "probability of a horizontal flip", RECIPE, between(0, 1)),
    "augment.randaugment": Field("rand-m9-mstd0.5-inc1", "timm's notation; 3a: 3-Augment; empty: off",
        RECIPE, randaugment),
    "augment.color_jitter": Field(0.0, "brightness, contrast and saturation range; 0: off", FIXED, at_least(0)),
    "augment.erase": Field(0.25, "probability of random erasing with noise", RECIPE, between(0, 1)),
    "augment.by_size": Field(False, "RandAugment's magnitude and augment.erase grow with size_schedule, as the height",
        FIXED),
    "augment.repeats": Field(1, "draws of each sample per epoch (repeated augmentation)", FIXED, at_least(1)),
    "eval.crop": Field(0.875, "side of the centre crop over the resized short side", RECIPE | FREE, between(0.05, 1)),
    "eval.batch_size": Field(0, "global evaluation batch; 0: as the training batch, bounded", FREE, at_least(0)),
    "eval.ensemble": Field("", "all members by comma: files, workdirs, timm:NAME; params, ema: of config.checkpoint",
        FREE),
    "export.format": Field("timm",
        "timm (safetensors for timm.create_model) | onnx | openvino | pt2 (torch.export) | aoti (compiled for this "
        "processor) | hub (folder for timm, Transformers) | om (kit for Ascend's .om)",
        FREE, one_of("timm", "onnx", "openvino", "pt2", "aoti", "hub", "om")),
    "export.output": Field("", "file or folder to write; unset: in export/ of the workdir", FREE),
    "export.dynamic_size": Field(False, "of graphs: any image size from 33 px, not only config.image_size", FREE),
    "export.preprocess": Field(False, "of graphs: uint8 [b, h, w, channels] in, probabilities out", FREE),
    "export.quantize": Field("none", "onnx, openvino: none | int8, calibrated on training images and then evaluated",
        FREE, one_of("none", "int8")),
    "export.max_drop": Field(0.5, "int8: points of top-1 that it may lose; if it loses more, nothing is written",
        FREE, between(0, 100)),
    "export.license": Field("", "hub: licence of the model card, such as apache-2.0, or NAME=URL; unset: not stated",
        FREE, licences.check),
    "export.batches": Field("1,16", "om: batch sizes by comma, an ONNX file each", FREE, counts),
    "export.calibration": Field(
        64, "int8, om: training images to calibrate with; om: also validation images for its check; 0: none", FREE,
        at_least(0)),
    "predict.images": Field("", "what to classify: a file, a folder, or a pattern such as 'photos/*.jpg'", FREE),
    "predict.format": Field("table", "table | jsonl (a JSON object per line) | csv",
        FREE, one_of("table", "jsonl", "csv")),
    "predict.output": Field("", "file to write; unset: standard output", FREE),
    "predict.threshold": Field(0.5, "of multilabel, also for F1: lowest probability of a predicted class",
        FREE, between(0, 1)),
    "predict.top": Field(5, "classes per image, the most probable ones", FREE, at_least(1)),
    "predict.sort_into": Field("", "new folder for copies of the images, one folder per predicted class", FREE),
    "predict.explain": Field(False, "also draw, in the workdir's explain/, what speaks for the predicted class", FREE),
    "report.compare": Field("", "other workdirs, by comma, to show beside this one", FREE),
    "bench.against": Field(
        "", "what is measured beside ours, by comma: timm | timm-compiled | onnx | openvino | aoti | an exported file",
        FREE, listed_of("timm", "timm-compiled", "onnx", "openvino", "aoti", endings=GRAPHS)),
    "bench.steps": Field(10, "measured rounds per figure", FREE, at_least(1)),
    "bench.scaling": Field(
        False, "measure how cost grows with batch, image size and processes instead; also report.html", FREE),
}
# fmt: on


def base() -> ConfigDict:
    """All fields at their defaults: the ImageNet recipe; unlocked, for a config file to change."""
    return ConfigDict(nested({n: placeholder(f.default) if f.unset else f.default for n, f in FIELDS.items()}))


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
    return next((field.rule for field in (FIELDS.get(name), *relatives) if field), FIXED)
