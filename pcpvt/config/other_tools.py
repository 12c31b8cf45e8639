"""Flags of timm's train.py and validate.py, of the Twins code and of its Ascend port, and what takes their place here.

docs/commands.md has the same table, which a test compares.
"""

from collections.abc import Collection, Iterable

from pcpvt.errors import UserError

# What takes their place, and the flags, with `-` for `_`.
TABLE: dict[str, tuple[str, ...]] = {
    "--config=configs/pcpvt_s.py (or pcpvt_b.py, pcpvt_l.py)": ("model", "arch"),
    "ARG, as in --config=configs/pcpvt_s.py:npu8": (
        "device", "npu", "gpu", "nproc-per-node", "world-size", "local-rank", "dist-url", "dist-backend", "rank",
        "distributed", "multiprocessing-distributed",
    ),
    "--config.data.path=DIR": ("data-path", "data-dir", "data"),
    "--config.data.name=NAME (unset: an image folder)": ("data-set", "dataset", "d"),
    "--config.data.train_split=NAME": ("train-split",),
    "--config.data.val_split=NAME": ("val-split", "split"),
    "--config.data.image_column=NAME": ("input-key",),
    "--config.data.label_column=NAME": ("target-key",),
    "--config.batch_size=N (over all devices, not of one)": ("batch-size", "b"),
    "--config.eval.batch_size=N (over all devices)": ("validation-batch-size", "vb"),
    "--config.accumulate=N (by default what fits the device)": ("grad-accum-steps",),
    "--config.epochs=N": ("epochs",),
    "--config.lr=LR (the peak; the Twins code's --lr is --config.base_lr, per 512 images of the batch)": ("lr",),
    "--config.base_lr=LR (per 512 images of the batch)": ("lr-base", "lr-base-size"),
    "--config.warmup_epochs=N": ("warmup-epochs",),
    "--config.warmup_lr=LR": ("warmup-lr",),
    "--config.min_lr=LR": ("min-lr",),
    "--config.schedule=cosine (or reference, constant)": ("sched", "decay-epochs", "decay-rate", "cooldown-epochs"),
    "--config.weight_decay=X": ("weight-decay", "wd"),
    "--config.eps=X": ("opt-eps",),
    "--config.beta1=X and --config.beta2=X": ("opt-betas",),
    "--config.clip_norm=X": ("clip-grad",),
    "--config.layer_decay=X": ("layer-decay",),
    "--config.optimizer=adamw (or muon)": ("opt",),
    "nothing, chosen by the optimizer": ("momentum", "clip-mode"),
    "--config.finetune=FILE (with ARG's recipe finetune, as in :npu1,finetune)": ("finetune", "initial-checkpoint"),
    "--config.finetune=timm:twins_pcpvt_small": ("pretrained",),
    "nothing, the same command again, or --workdir=DIR alone, goes on": ("resume", "start-epoch", "no-resume-opt"),
    "--mode=eval": ("eval", "evaluate", "dist-eval", "validate"),
    "--config.checkpoint=FILE": ("checkpoint",),
    "--mode=bench": ("throughput", "throughout"),
    "ARG's recipe perf, as in :npu1,perf": ("performance",),
    "--config.num_classes=N (by default counted from the data)": ("num-classes", "nb-classes"),
    "--config.image_size=N": ("input-size", "img-size", "image-size"),
    "--config.eval.crop=X": ("crop-pct",),
    "--config.model.drop_path=X": ("drop-path", "drop-connect"),
    "--config.ema=DECAY": ("model-ema", "model-ema-decay", "model-ema-force-cpu", "model-ema-warmup"),
    "--config.label_smoothing=X": ("smoothing",),
    "--config.mixup=ALPHA": ("mixup",),
    "--config.cutmix=ALPHA": ("cutmix",),
    "--config.mix_prob=P": ("mixup-prob",),
    "--config.mix_switch=P": ("mixup-switch-prob",),
    "--config.mix_mode=MODE": ("mixup-mode",),
    "--config.augment.randaugment=rand-m9-mstd0.5-inc1": ("aa",),
    "--config.augment.color_jitter=X": ("color-jitter",),
    "--config.augment.hflip=P": ("hflip",),
    "--config.augment.scale=LOW,HIGH": ("scale",),
    "--config.augment.ratio=LOW,HIGH": ("ratio",),
    "--config.augment.erase=P": ("reprob",),
    "--config.augment.repeats=N": ("aug-repeats", "repeated-aug", "no-repeated-aug"),
    "--config.seed=N": ("seed",),
    "--config.precision=bfloat16 (by default what the device does best)": (
        "amp", "apex-amp", "native-amp", "amp-dtype", "apex", "loss-scale", "opt-level",
    ),
    "--config.compile=auto": ("torchcompile", "torchscript"),
    "--config.data.workers=N": ("workers", "num-workers", "j"),
    "--config.log_every='N steps'": ("log-interval", "print-freq"),
    "--config.save_every='N steps'": ("recovery-interval",),
    "--config.keep=N": ("checkpoint-hist",),
    "--workdir=DIR": ("output", "output-dir", "experiment", "results-file"),
    "nothing, chosen by the program": (
        "pin-mem", "no-pin-mem", "channels-last", "no-prefetcher", "no-ddp-bb", "worker-seeding",
    ),
    "nothing, not part of Twins-PCPVT or its recipes": (
        "drop", "drop-block", "remode", "recount", "resplit", "cutmix-minmax", "vflip", "train-interpolation",
        "interpolation", "mean", "std", "gp", "sync-bn", "bce-loss", "jsd-loss", "inat-category",
    ),
}  # fmt: skip
HERE = {flag: here for here, flags in TABLE.items() for flag in flags}


def explain(argv: Iterable[str], known: Collection[str]) -> UserError | None:
    """The error about the words of a command line that are other tools' flags; None where no word is.

    Args:
        known: flags of this program.
    """
    found: dict[str, list[str]] = {}
    for word in argv:
        name = word.lstrip("-").partition("=")[0]
        here = HERE.get(name.replace("_", "-"))
        if word.startswith("-") and here and name not in known:
            flag = word.partition("=")[0]
            if flag not in found.setdefault(here, []):
                found[here].append(flag)
    if not found:
        return None
    listed = "; ".join(f"{', '.join(flags)}: here {here}" for here, flags in found.items())
    return UserError(f"flags of other tools: {listed}; see --help")
