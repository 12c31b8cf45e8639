"""The text of --help: modes, recipes, flags, and all fields in groups."""

from pcpvt.config.fields import FIELDS
from pcpvt.config.recipes import RECIPES

MODES = {
    "train": "train, or go on where the workdir's run stopped (the default)",
    "eval": "accuracy of the workdir's best checkpoint, of a file, or of an ensemble",
    "predict": "classes of image files: --config.predict.images=FILE, FOLDER or 'PATTERN'",
    "export": "a file for timm, ONNX or torch.export: --config.export.format=timm",
    "bench": "speed and memory of training, evaluation and input, also beside timm's",
    "report": "report.html again, also beside other runs: --config.report.compare=DIR1,DIR2",
    "schedule": "the learning rate over the steps, without training",
}
# A group goes from this field to the next one here.
GROUPS = {
    "model.name": "Model and image size",
    "batch_size": "Batch, length and learning rate",
    "weight_decay": "Optimizer",
    "label_smoothing": "Loss and mixing",
    "seed": "How it is computed",
    "finetune": "Weights to start from and to use",
    "eval_every": "What is written, and when",
    "data.name": "Data",
    "augment.scale": "Augmentation",
    "eval.crop": "Evaluation",
    "export.format": "--mode=export",
    "predict.images": "--mode=predict",
    "report.compare": "--mode=report",
    "bench.against": "--mode=bench",
}
HEAD = """\
python -m pcpvt.main [--mode=MODE] [--config=FILE[:ARG]] [--config.NAME=VALUE ...] [--workdir=DIR]

Trains, fine-tunes, evaluates and exports Twins-PCPVT image classifiers on Ascend NPUs, CUDA GPUs and CPUs.

  python -m pcpvt.main --config=configs/pcpvt_s.py:cpu                              train on the embedded digits
  python -m pcpvt.main --config=configs/pcpvt_s.py:npu8 --config.data.path=DIR      train on an image folder
  python -m pcpvt.main --mode=eval                                                  evaluate the best checkpoint
"""
FLAGS = """\
--workdir=DIR     folder of the run (default: runs/ and the config's name). The same command, or --workdir=DIR alone,
                  goes on with the run in it; later modes take the config it was trained with
--config=FILE     configs/pcpvt_s.py (default), pcpvt_b.py, pcpvt_l.py, or a file of your own with get_config(ARG)
--help, -h        this text
--version         the version
"""


def text() -> str:
    """The whole help text."""
    modes = [f"  {name:10}{what}" for name, what in MODES.items()]
    recipes = [f"  {name:10}{(recipe.__doc__ or '').splitlines()[0]}" for name, recipe in RECIPES.items()]
    arg = "ARG is <device><n> and recipes by comma, such as npu8,paper or cpu; without it, what this machine has:"
    parts = [HEAD, "MODE is one of:", *modes, "", arg, *recipes, "", FLAGS]
    parts.append("Fields and their defaults, which a recipe may change:")
    for name, field in FIELDS.items():
        if name in GROUPS:
            parts += ["", GROUPS[name]]
        default = "" if field.unset else field.default
        parts.append(f"  --config.{name}={default!s}".ljust(44) + f"  {field.help}")
    return "\n".join(parts) + "\n"
