"""Every field of a config: its default and one line of help. The single source for `base()` and for `--help`."""

from __future__ import annotations

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

# name: (default or type for "unset", help)
FIELDS = {
    "model.name": ("pcpvt_s", "pcpvt_s | pcpvt_b | pcpvt_l | pcpvt_nano (a miniature for smoke runs)"),
    "model.drop_path": (0.2, "drop-path rate of the last block; rises linearly from 0"),
    "model.pad": ("pad", "sides that 32 does not divide: pad (zeros, nothing is lost) | error"),
    "num_classes": (int, "outputs of the head; unset: counted from the data"),
    "image_size": (224, "image height in pixels"),
    "image_width": (int, "image width in pixels; unset: as high as wide"),
    "batch_size": (1024, "global batch, over all devices"),
    "accumulate": (0, "micro-batches per step; 0: derived from what fits the device"),
    "epochs": (float, "length of training; give epochs, steps or examples"),
    "steps": (int, "length of training in optimizer steps"),
    "examples": (int, "length of training in training images"),
    "lr": (float, "peak learning rate; unset: base_lr * batch_size / 512"),
    "base_lr": (1e-3, "learning rate per 512 images of the global batch"),
    "schedule": ("cosine", "cosine (per step) | reference (the Twins code's, per epoch and one epoch late) | constant"),
    "warmup_epochs": (5.0, "length of the linear warm-up; give warmup_epochs or warmup_steps"),
    "warmup_steps": (int, "length of the linear warm-up in steps"),
    "warmup_lr": (1e-6, "learning rate at the first step of the warm-up"),
    "min_lr": (1e-5, "learning rate at the end"),
    "weight_decay": (0.05, "AdamW's, except on 1-d tensors, biases and all of pos_block"),
    "beta1": (0.9, "AdamW's first-moment decay"),
    "beta2": (0.999, "AdamW's second-moment decay"),
    "eps": (1e-8, "AdamW's denominator constant"),
    "clip_norm": (5.0, "global gradient norm to clip at; 0: no clipping"),
    "layer_decay": (1.0, "learning-rate factor per block, counted from the head; 1: none"),
    "frozen": ("", "regex over parameter names that are not trained"),
    "ema": (0.0, "decay of the weights' moving average, which is then what is evaluated; 0: none"),
    "label_smoothing": (0.1, "mass spread over all classes"),
    "mixup": (0.8, "mixup's alpha; 0: off"),
    "cutmix": (1.0, "cutmix's alpha; 0: off"),
    "mix_prob": (1.0, "probability that a batch is mixed at all"),
    "mix_switch": (0.5, "probability of cutmix when both are on"),
    "mix_mode": ("batch", "one draw per batch | pair | elem"),
    "seed": (0, "every random number of the run derives from it"),
    "precision": ("auto", "auto | float32 | bfloat16 | float16 | params=DTYPE,compute=DTYPE,output=DTYPE"),
    "compile": ("auto", "auto | inductor | npugraphs | none"),
    "kernels": ("auto", "auto: the device's own for attention, linear maps, drop path | plain: PyTorch's operators"),
    "device": ("cpu", "cpu | cuda | npu"),
    "processes": (1, "processes over all hosts, one per device"),
    "timeout": (2100, "seconds that processes wait for one another before the run ends"),
    "grace": (60.0, "seconds from a signal until the run ends unsaved if no step has ended"),
    "finetune": ("", "weights to start from: a file, timm:NAME or a workdir"),
    "fresh": ("", "regex over parameter names that do not come from config.finetune but start anew"),
    "checkpoint": ("", "weights to evaluate, predict with or export: a file, timm:NAME or a workdir; unset: the best"),
    "weights": ("auto", "of a file with averaged weights too: params | ema | auto (of ours ema, of others params)"),
    "eval_every": ("1 epoch", "N epochs | steps | examples between evaluations; 0: only never"),
    "save_every": ("1 epoch", "N epochs | steps | examples between checkpoints; 0: only at the end"),
    "log_every": ("20 steps", "N epochs | steps | examples between records"),
    "tensorboard": (True, "TensorBoard events in the workdir's tensorboard/"),
    "keep": (2, "newest checkpoints kept beside the best one"),
    "max_skipped": (20, "consecutive non-finite steps after which the run stops"),
    "data.name": ("", "digits | folder | synthetic | a timm dataset name such as hfds/... or torch/cifar10"),
    "data.path": ("", "image folder with train/<class>/* and val/<class>/*, or the root for data.name"),
    "data.val_split": ("validation", "of hfds/...: the split to evaluate on, such as test"),
    "data.workers": (-1, "loader processes per training process; -1: by the host's cores, 0: none"),
    "data.on_error": ("error", "unreadable image: error | skip (counted and named; training takes the next instead)"),
    "augment.scale": ((0.08, 1.0), "area range of the random resized crop"),
    "augment.ratio": ((0.75, 4 / 3), "aspect range of the random resized crop"),
    "augment.crop_pad": (0, "pixels of padding before a random crop, instead of the resized crop; 0: off"),
    "augment.hflip": (0.5, "probability of a horizontal flip"),
    "augment.randaugment": ("rand-m9-mstd0.5-inc1", "timm's notation; empty: off"),
    "augment.color_jitter": (0.0, "brightness, contrast and saturation range; 0: off"),
    "augment.erase": (0.25, "probability of random erasing with noise"),
    "augment.repeats": (1, "draws of each sample per epoch (repeated augmentation)"),
    "eval.crop": (0.875, "side of the centre crop over the resized short side"),
    "eval.batch_size": (0, "global evaluation batch; 0: as the training batch, bounded"),
    "eval.ensemble": ("", "all members by comma: files, workdirs, timm:NAME; params, ema: of config.checkpoint"),
    "export.format": ("timm", "timm (safetensors for timm.create_model) | onnx | pt2 (torch.export)"),
    "export.output": ("", "file to write; unset: export/ in the workdir"),
    "export.dynamic_size": (False, "onnx, pt2: any image size from 33 px, not only config.image_size"),
    "predict.images": ("", "what to classify: a file, a folder, or a pattern such as 'photos/*.jpg'"),
    "predict.format": ("table", "table | jsonl (a JSON object per line) | csv"),
    "predict.output": ("", "file to write; unset: standard output"),
    "predict.explain": (False, "also draw, in the workdir's explain/, what speaks for the predicted class"),
    "report.compare": ("", "other workdirs, by comma, to show beside this one"),
    "bench.against": ("", "timm | timm-compiled: measure timm's model, eager or compiled, and loader beside ours"),
    "bench.steps": (10, "measured rounds per figure"),
    "bench.scaling": (False, "measure how cost grows with batch, image size and processes instead; also report.html"),
}


def base() -> ConfigDict:
    """All fields at their defaults: the ImageNet recipe; unlocked, for a config file to change."""
    config = ConfigDict()
    for name, (default, _) in FIELDS.items():
        node = config
        *parents, leaf = name.split(".")
        for parent in parents:
            if parent not in node:
                node[parent] = ConfigDict()
            node = node[parent]
        node[leaf] = placeholder(default) if isinstance(default, type) else default
    return config


def describe() -> str:
    """The help text: one line per field."""
    rows = [
        f"  --config.{name}={'' if isinstance(d, type) else d!s}".ljust(44) + f"  {text}"
        for name, (d, text) in FIELDS.items()
    ]
    return "\n".join(rows)
