"""The peer of the benchmark: timm's model in a plain PyTorch training loop, and timm's loader, with equal settings."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from pcpvt.config.plan import Plan
from pcpvt.functional import mixing
from pcpvt.functional.objective import IMAGENET_MEAN, IMAGENET_STD, Batch
from pcpvt.models.pcpvt import TIMM_NAMES
from pcpvt.runtime.session import Session


def train_step(session: Session, plan: Plan, batch: Batch) -> Callable[[], object]:
    """Forward, backward, clipping and AdamW on one normalised batch with soft targets, as timm's train.py does them."""
    config, network = session.config, _model(session, plan.num_classes).train()
    decayed = [p for p in network.parameters() if p.ndim > 1]
    undecayed = [p for p in network.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": undecayed, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-5)
    predict, images = _compiled(session, network), _normalised(session, batch)
    targets = mixing.mix_targets(batch["label"], batch.get("lam"), plan.num_classes, config.label_smoothing)

    def step() -> Tensor:
        optimizer.zero_grad()
        with _autocast(session):
            logits = predict(images)
        loss = -(targets * torch.log_softmax(logits.float(), -1)).sum(-1).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), config.clip_norm or 5.0)
        optimizer.step()
        return loss

    return step


def forward(session: Session, num_classes: int, batch: Batch) -> Callable[[], object]:
    """Logits `[b, classes]` of one normalised batch."""
    predict, images = _compiled(session, _model(session, num_classes).eval()), _normalised(session, batch)

    def call() -> Tensor:
        with torch.inference_mode(), _autocast(session):
            return predict(images)

    return call


def _model(session: Session, num_classes: int) -> torch.nn.Module:
    """timm's model of the same size, on the device; channels_last on CUDA, where that is its fast layout."""
    from pcpvt import torchvision_compat  # noqa: F401 - before timm
    import timm  # isort: skip

    config = session.config
    network = timm.create_model(
        TIMM_NAMES[config.model.name], num_classes=num_classes, drop_path_rate=config.model.drop_path
    ).to(session.device.torch)
    if session.device.name != "cuda":
        return network
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in PyTorch's hints


def _compiled(session: Session, network: torch.nn.Module) -> Callable[[Tensor], Tensor]:
    # Without `dynamic=False`, the second batch size (that of the latency) is compiled for all sizes, which is slower.
    return torch.compile(network, dynamic=False) if session.config.bench.against == "timm-compiled" else network


def _autocast(session: Session) -> torch.autocast:
    dtype = session.policy.compute
    return torch.autocast(session.device.name, dtype=dtype, enabled=dtype != torch.float32)


def _normalised(session: Session, batch: Batch) -> Tensor:
    """The images as `[b, 3, h, w]`, in the layout that is fast on the device."""
    x = mixing.decode_images(batch["image"], None, IMAGENET_MEAN, IMAGENET_STD).permute(0, 3, 1, 2)
    return x.contiguous(memory_format=torch.channels_last if session.device.name == "cuda" else torch.contiguous_format)


def loader(session: Session, plan: Plan, split: str, workers: int) -> Iterator:
    """timm's batches of an image folder, without end, with the same augmentation settings."""
    from pcpvt import torchvision_compat  # noqa: F401 - before timm
    import timm.data  # isort: skip
    from PIL import ImageOps

    posterize = ImageOps.posterize
    # timm sometimes asks for 0 bits, which Pillow 13 refuses; its loader processes are forked and inherit this patch.
    ImageOps.posterize = lambda image, bits: posterize(image, max(bits, 1))
    config, training = session.config, split == "train"
    dataset = timm.data.create_dataset("", root=f"{config.data.path}/{split}", split=split, is_training=training)
    batches = timm.data.create_loader(
        dataset,
        input_size=(3, *session.size),
        batch_size=plan.local_batch,
        is_training=training,
        re_prob=config.augment.erase if training else 0.0,
        re_mode="pixel",
        scale=tuple(config.augment.scale),
        ratio=tuple(config.augment.ratio),
        hflip=config.augment.hflip,
        color_jitter=None,  # type: ignore[arg-type]  # timm's type hint does not allow None, its value for no jitter
        auto_augment=(config.augment.randaugment or None) if training else None,
        interpolation="bicubic",
        crop_pct=config.eval.crop,
        num_workers=workers,
        persistent_workers=workers > 0,
        device=session.device.torch,
    )
    while True:
        yield from batches
