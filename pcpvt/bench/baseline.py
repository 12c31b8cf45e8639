"""The peer of the benchmark: timm's model in a plain PyTorch training loop, and timm's loader, set alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from pcpvt import torchvision_compat  # noqa: F401 - before timm
from pcpvt.config.plan import Plan
from pcpvt.functional import mixing
from pcpvt.functional.objective import IMAGENET_MEAN, IMAGENET_STD
from pcpvt.runtime.session import Session

TIMM_NAMES = {"pcpvt_s": "twins_pcpvt_small", "pcpvt_b": "twins_pcpvt_base", "pcpvt_l": "twins_pcpvt_large"}


def model(session: Session, num_classes: int) -> torch.nn.Module:
    """timm's model of the same size, on the device; channels_last on CUDA, where that is its fast layout."""
    import timm

    config = session.config
    built = timm.create_model(
        TIMM_NAMES[config.model.name], num_classes=num_classes, drop_path_rate=config.model.drop_path
    ).to(session.device.torch)
    if session.device.name != "cuda":
        return built
    return built.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in PyTorch's hints


def _compiled(session: Session, network: torch.nn.Module) -> Callable[[Tensor], Tensor]:
    # Without `dynamic` a second batch size, that of the latency, would be compiled for all sizes, and slower.
    return torch.compile(network, dynamic=False) if session.config.bench.against == "timm-compiled" else network


def _autocast(session: Session) -> torch.autocast:
    dtype = session.policy.compute
    return torch.autocast(session.device.name, dtype=dtype, enabled=dtype != torch.float32)


def _pixels(session: Session, batch: dict[str, Tensor]) -> Tensor:
    x = mixing.decode_images(batch["image"], None, IMAGENET_MEAN, IMAGENET_STD).permute(0, 3, 1, 2)
    return x.contiguous(memory_format=torch.channels_last if session.device.name == "cuda" else torch.contiguous_format)


def train_step(session: Session, plan: Plan, batch: dict[str, Tensor]) -> Callable[[], object]:
    """Forward, backward, clipping and AdamW on one normalised batch with soft targets, as timm's train.py does them."""
    network = model(session, plan.num_classes).train()
    config = session.config
    decayed = [p for p in network.parameters() if p.ndim > 1]
    bare = [p for p in network.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": bare, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-5)
    forward = _compiled(session, network)
    x = _pixels(session, batch)
    targets = mixing.mix_targets(batch["label"], batch.get("lam"), plan.num_classes, config.label_smoothing)

    def step() -> Tensor:
        optimizer.zero_grad()
        with _autocast(session):
            logits = forward(x)
        loss = -(targets * torch.log_softmax(logits.float(), -1)).sum(-1).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), config.clip_norm or 5.0)
        optimizer.step()
        return loss

    return step


def forward(session: Session, num_classes: int, batch: dict[str, Tensor]) -> Callable[[], object]:
    """Logits of one normalised batch."""
    run = _compiled(session, model(session, num_classes).eval())
    x = _pixels(session, batch)

    def call() -> Tensor:
        with torch.inference_mode(), _autocast(session):
            return run(x)

    return call


def loader(session: Session, plan: Plan, split: str, workers: int) -> Iterator:
    """timm's batches of an image folder, endless, with the same augmentation settings."""
    import timm.data
    from PIL import ImageOps

    posterize = ImageOps.posterize
    # timm asks for 0 bits at times, which Pillow 13 refuses; its loader processes are forked and see this.
    ImageOps.posterize = lambda image, bits: posterize(image, max(bits, 1))
    config, training = session.config, split == "train"
    dataset = timm.data.create_dataset("", root=f"{config.data.path}/{split}", split=split, is_training=training)
    made = timm.data.create_loader(
        dataset,
        input_size=(3, *session.size),
        batch_size=plan.local_batch,
        is_training=training,
        re_prob=config.augment.erase if training else 0.0,
        re_mode="pixel",
        scale=tuple(config.augment.scale),
        ratio=tuple(config.augment.ratio),
        hflip=config.augment.hflip,
        color_jitter=None,  # type: ignore[arg-type]  # timm's hint lacks its value for none
        auto_augment=(config.augment.randaugment or None) if training else None,
        interpolation="bicubic",
        crop_pct=config.eval.crop,
        num_workers=workers,
        persistent_workers=workers > 0,
        device=session.device.torch,
    )
    while True:
        yield from made
