"""Compares the accuracy of our trainer with a plain timm loop. Run `python tests/learning_gate.py DIR [SEEDS] [STEPS]`.

Not part of the test suite. DIR is an image folder of small images (CIFAR-like) with train/ and val/. Both sides train
the same miniature of Twins-PCPVT with the same recipe and number of steps: padded random crops, flips, mixup and
cutmix, label smoothing, AdamW, clipping, per-step cosine with warm-up, float32. Ours is `python -m pcpvt.main`; the
other is timm's model, transforms, Mixup and PyTorch's loader in a plain loop. Prints top-1 of every seed; exit code 0
when the difference of the means is at most the largest spread over the seeds of one side, 1 otherwise.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from pcpvt import torchvision_compat  # noqa: F401 - before timm
from pcpvt.functional import optim, schedules
from pcpvt.functional.objective import IMAGENET_MEAN, IMAGENET_STD
from pcpvt.models.pcpvt import SPECS

SIZE, BATCH, LR, WARMUP = 32, 64, 2e-3, 50
RECIPE = {
    "model.name": "pcpvt_nano",
    "model.drop_path": 0.0,
    "image_size": SIZE,
    "batch_size": BATCH,
    "lr": LR,
    "warmup_steps": WARMUP,
    "precision": "float32",
    "augment.crop_pad": 4,
    "augment.randaugment": "",
    "augment.erase": 0.0,
    "eval.crop": 1.0,
    "save_every": "0",
    "data.workers": 1,
}


def ours(data: Path, seed: int, steps: int) -> float:
    """Top-1 accuracy in % of our trainer."""
    with tempfile.TemporaryDirectory() as workdir:
        fields = RECIPE | {"data.path": data, "steps": steps, "seed": seed, "eval_every": f"{steps} steps"}
        words = [f"--config.{name}={value}" for name, value in fields.items()]
        command = [sys.executable, "-m", "pcpvt.main", "--config=configs/pcpvt_s.py:cpu,folder", *words]
        subprocess.run([*command, f"--workdir={workdir}"], check=True, stdout=subprocess.DEVNULL)
        return json.loads((Path(workdir) / "result.json").read_text())["acc1"]


def plain(data: Path, seed: int, steps: int, workers: int = 1) -> float:
    """Top-1 accuracy in % of the plain loop."""
    import timm.data
    from timm.models.twins import Twins
    from torchvision import datasets, transforms

    torch.manual_seed(seed)
    spec = SPECS["pcpvt_nano"]
    normalise = [transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    augment = [transforms.RandomCrop(SIZE, padding=4), transforms.RandomHorizontalFlip()]
    train = datasets.ImageFolder(str(data / "train"), transforms.Compose([*augment, *normalise]))
    val = datasets.ImageFolder(str(data / "val"), transforms.Compose(normalise))
    model = Twins(
        img_size=SIZE,
        num_classes=len(train.classes),
        embed_dims=spec.dims,
        num_heads=spec.heads,
        mlp_ratios=spec.mlp_ratios,
        depths=spec.depths,
        sr_ratios=spec.reductions,
    )
    named = dict(model.named_parameters())
    decayed = [p for n, p in named.items() if not optim.no_decay(n, p.shape)]
    undecayed = [p for n, p in named.items() if optim.no_decay(n, p.shape)]
    optimizer = torch.optim.AdamW(
        [{"params": decayed}, {"params": undecayed, "weight_decay": 0.0}], LR, weight_decay=0.05
    )
    schedule = schedules.warmup_cosine(LR, steps, WARMUP)
    mixup = timm.data.Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=len(train.classes))
    step, model = 0, model.train()
    while step < steps:
        for images, labels in torch.utils.data.DataLoader(train, BATCH, True, drop_last=True, num_workers=workers):
            if step == steps:
                break
            images, targets = mixup(images, labels)
            loss = -(targets * model(images).log_softmax(-1)).sum(-1).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            for group in optimizer.param_groups:
                group["lr"] = schedule(step)
            optimizer.step()
            step += 1
    model.eval()
    with torch.no_grad():
        correct = sum((model(x).argmax(-1) == y).sum().item() for x, y in torch.utils.data.DataLoader(val, 250))
    return 100 * correct / len(val)


def main(data: str, seeds: str = "3", steps: str = "1000") -> int:
    torch.set_num_threads(2)
    accuracies: dict[str, list[float]] = {"ours": [], "timm": []}
    for seed in range(int(seeds)):
        accuracies["ours"].append(ours(Path(data), seed, int(steps)))
        accuracies["timm"].append(plain(Path(data), seed, int(steps)))
        print(f"seed {seed}: ours {accuracies['ours'][-1]:.2f} %, timm {accuracies['timm'][-1]:.2f} %", flush=True)
    means = {side: statistics.mean(values) for side, values in accuracies.items()}
    spread = max(max(values) - min(values) for values in accuracies.values())
    difference = abs(means["ours"] - means["timm"])
    print(f"means: ours {means['ours']:.2f} %, timm {means['timm']:.2f} %")
    print(f"they differ by {difference:.2f}, seeds by up to {spread:.2f}")
    return int(difference > spread)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
