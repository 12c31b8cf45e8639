"""The peer of the benchmark: timm's model in a plain PyTorch training loop, and timm's loader, with equal settings."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from pcpvt.config.plan import Plan
from pcpvt.functional import mixing
from pcpvt.functional.objective import Batch, normalisation
from pcpvt.models.pcpvt import TIMM_NAMES
from pcpvt.runtime.session import Session


def train_step(session: Session, plan: Plan, batch: Batch, compiled: bool = False) -> Callable[[], object]:
    """Forward, backward, clipping and AdamW on one normalised batch with soft targets, as timm's train.py does them."""
    config = session.config
    network, logits = _network(session, plan.num_classes, batch, compiled)
    decayed = [p for p in network.parameters() if p.ndim > 1]
    undecayed = [p for p in network.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": undecayed, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-5)
    targets = mixing.mix_targets(batch["label"], batch.get("lam"), plan.num_classes, config.label_smoothing)

    def step() -> None:
        optimizer.zero_grad()
        loss = -(targets * torch.log_softmax(logits().float(), -1)).sum(-1).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), config.clip_norm or 5.0)
        optimizer.step()

    return step


def forward(session: Session, num_classes: int, batch: Batch, compiled: bool = False) -> Callable[[], object]:
    """Logits `[b, classes]` of one normalised batch."""
    network, logits = _network(session, num_classes, batch, compiled)
    network.eval()
    predict = torch.inference_mode()(logits)
    if compiled:
        with torch._inductor.config.patch(freezing=True):  # weights as constants: a third faster on CPUs
            predict()
    return predict


def _network(
    session: Session, num_classes: int, batch: Batch, compiled: bool
) -> tuple[torch.nn.Module, Callable[[], Tensor]]:
    """timm's model of the same size, on the device, and a function that gives its logits of a normalised batch."""
    from pcpvt import torchvision_compat  # noqa: F401 - before timm
    import timm  # isort: skip

    config, device, dtype = session.config, session.device, session.policy.compute
    options = {"num_classes": num_classes, "drop_path_rate": config.model.drop_path}
    options["in_chans"] = config.model.in_chans
    network = timm.create_model(TIMM_NAMES[config.model.name], **options).to(device.torch)
    images = mixing.decode_images(batch["image"], None, *normalisation(config.model.in_chans)).permute(0, 3, 1, 2)
    layout = torch.channels_last if device.name == "cuda" else torch.contiguous_format  # the fast one on each
    network.to(memory_format=layout)  # type: ignore[call-overload]  # missing in PyTorch's hints
    images = images.contiguous(memory_format=layout)
    # Without `dynamic=False`, the second batch size (that of the latency) is compiled for all sizes, which is slower.
    predict = torch.compile(network, dynamic=False) if compiled else network

    def logits() -> Tensor:
        with torch.autocast(device.name, dtype=dtype, enabled=dtype != torch.float32):
            return predict(images)

    return network, logits


def loader(session: Session, plan: Plan, split: str, root: str, workers: int) -> Iterator:
    """timm's batches of the class folders below `root`, without end, with the same augmentation settings."""
    from pcpvt import torchvision_compat  # noqa: F401 - before timm
    import timm.data  # isort: skip
    from PIL import ImageOps

    posterize = ImageOps.posterize
    # timm sometimes asks for 0 bits, which Pillow 13 refuses; its loader processes are forked and inherit this patch.
    ImageOps.posterize = lambda image, bits: posterize(image, max(bits, 1))
    config, a, training = session.config, session.config.augment, split == "train"
    dataset = timm.data.create_dataset("", root=root, split=split, search_split=False, is_training=training)
    options: dict[str, Any] = {
        "interpolation": "bicubic", "crop_pct": config.eval.crop, "device": session.device.torch,
        "num_workers": workers, "persistent_workers": workers > 0,
    }  # fmt: skip
    if training:
        options |= {
            "re_prob": a.erase, "re_mode": "pixel", "scale": tuple(a.scale), "ratio": tuple(a.ratio), "hflip": a.hflip,
            "color_jitter": None, "auto_augment": a.randaugment or None,
        }  # fmt: skip
    batches = timm.data.create_loader(dataset, (3, *session.size), plan.local_batch, is_training=training, **options)
    while True:
        yield from batches
