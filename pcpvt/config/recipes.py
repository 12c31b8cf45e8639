"""Recipes: from ARG, `<device><n>` and then recipes by comma (`npu8`, `npu1,perf`, `cpu,folder`), to a config.

A recipe is a function that sets fields; each field that one may set is marked RECIPE in `config.fields`.
"""

import re

from ml_collections import ConfigDict

from pcpvt.config.fields import DEVICES, base
from pcpvt.errors import UserError

FAST_EPOCHS = 0.55
PER_DEVICE = 128  # the Ascend port's batch per card
LAYER_DECAY = {"pcpvt_b": 0.9, "pcpvt_l": 0.93}  # of the recipe `finetune`; 0.83 for the others


def digits(c: ConfigDict, devices: int) -> None:
    """The 1,797 scanned digits of scikit-learn at 32 px: seconds an epoch, 97 % and more on two CPU cores."""
    c.data.name = "digits"
    c.image_size, c.batch_size, c.epochs = 32, 64, 11.0
    c.lr, c.warmup_epochs, c.model.drop_path = 5e-4, 2.0, 0.0
    c.mixup = c.cutmix = 0.0
    c.augment.update(crop_pad=3, hflip=0.0, randaugment="", erase=0.0)  # a mirrored digit is another digit
    c.eval.crop = 1.0


def port(c: ConfigDict, devices: int) -> None:
    """The Ascend port's 100-epoch run: 128 per card, lr 1e-3 x batch / 512, drop path 0.3 (77.5 % top-1 on 8 cards)."""
    c.data.name = "folder"
    c.batch_size, c.base_lr, c.epochs = PER_DEVICE * devices, 1e-3, 100.0
    if c.model.name == "pcpvt_s":
        c.model.drop_path = 0.3


def paper(c: ConfigDict, devices: int) -> None:
    """The authors' 300 epochs with their schedule, lr 5e-4 x batch/512, on any number of devices.

    The published logs of B and L peak at lr 1e-3, which is a global batch of 1024; that of S at 1.25e-3, which is 1280.
    """
    c.data.name = "folder"
    c.base_lr, c.epochs, c.schedule = 5e-4, 300.0, "reference"
    c.batch_size = 1280 if c.model.name == "pcpvt_s" else 1024
    c.model.drop_path = {"pcpvt_b": 0.3, "pcpvt_l": 0.5}.get(c.model.name, 0.2)


def fast(c: ConfigDict, devices: int) -> None:
    """Less time: 0.55 of the epochs at twice the lr, weak augmentation; measured on small images (docs/results.md).

    At most a seventh of the epochs is warm-up. No mixing, RandAugment and erasing, half the padding of crops.
    """
    c.epochs *= FAST_EPOCHS
    c.warmup_epochs = min(c.warmup_epochs, c.epochs / 7)
    if c.lr is None:
        c.base_lr *= 2
    else:
        c.lr *= 2
    c.mixup = c.cutmix = 0.0
    c.augment.update(randaugment="", erase=0.0, crop_pad=c.augment.crop_pad // 2)


def perf(c: ConfigDict, devices: int) -> None:
    """A fixed number of steps without evaluation, for images/s; for accuracy leave it out."""
    c.epochs, c.steps, c.warmup_epochs, c.warmup_steps = None, 200, None, 0
    c.eval_every = c.save_every = "0"


def finetune(c: ConfigDict, devices: int) -> None:
    """Ten epochs from given weights: half the lr, decaying towards the input, weaker augmentation, no mixing.

    The first block learns at about 5 % of the head's rate in every size: 0.83 ** 16 for S, 0.9 ** 28, 0.93 ** 41. With
    `config.frozen='^(patch_embeds|pos_block|blocks)\\.[01]\\.'` the first two stages stay as they are. Where weights
    come from images of another kind the last stages are a hindrance, and
    `config.fresh='^(patch_embeds|pos_block|blocks)\\.[23]\\.|^norm|^head'` starts them anew.
    """
    c.epochs, c.warmup_epochs, c.lr, c.base_lr, c.min_lr = 10.0, 1.0, None, 5e-4, 1e-6
    c.layer_decay = LAYER_DECAY.get(c.model.name, 0.83)
    c.model.drop_path = 0.1
    c.mixup = c.cutmix = 0.0
    c.augment.update(scale=(0.35, 1.0), erase=0.0)
    if c.augment.randaugment:
        c.augment.randaugment = "rand-m5-mstd0.5-inc1"


RECIPES = {"digits": digits, "folder": port, "paper": paper, "fast": fast, "finetune": finetune, "perf": perf}
DATA_RECIPES = ("digits", "folder", "paper")


def change_model(c: ConfigDict, name: str) -> None:
    """Sets another model, and with it the layer decay that the recipe `finetune` gives it."""
    if c.layer_decay == LAYER_DECAY.get(c.model.name, 0.83):
        c.layer_decay = LAYER_DECAY.get(name, 0.83)
    c.model.name = name


def parse_arg(arg: str) -> tuple[str, int, list[str]]:
    """`npu8,perf` to ("npu", 8, ["perf"]).

    Raises:
        UserError: for a device or a recipe that does not exist.
    """
    device, *options = arg.split(",")
    match = re.fullmatch(r"([a-z]+)([1-9][0-9]*)?", device)
    if not match or match[1] not in DEVICES:
        raise UserError(f"--config ARG: {device!r} is no device: write cpu, cudaN or npuN, e.g. npu8 or npu8,perf")
    for option in options:
        if option not in RECIPES:
            raise UserError(f"--config ARG: {option!r} is no recipe: choose from {', '.join(RECIPES)}")
    return match[1], int(match[2] or 1), options


def from_arg(arg: str | None, model: str, drop_path: float) -> ConfigDict:
    """The config of one model size for ARG; without ARG, for the devices that this machine has.

    On `cpu` the data are the embedded digits unless a recipe says otherwise; elsewhere an image folder and the Ascend
    port's recipe.
    """
    arg = arg or ""
    if not arg or arg.startswith(","):
        from pcpvt.devices import detect

        arg = detect() + arg
    device, count, options = parse_arg(arg)
    if "digits" in options and (others := set(options) & {"folder", "paper"}):
        raise UserError(f"--config ARG: 'digits' and {others.pop()!r} are recipes for different data: choose one")
    if {"fast", "finetune"} <= set(options):
        raise UserError("--config ARG: 'fast' is for training from the start and 'finetune' is not: choose one")
    config = base()
    config.model.name, config.model.drop_path = model, drop_path
    config.device, config.processes = device, count
    if not set(options) & set(DATA_RECIPES):
        options = ["digits" if device == "cpu" else "folder", *options]
    for option in sorted(options, key=list(RECIPES).index):  # ARG's order does not matter
        RECIPES[option](config, count)
    return config
