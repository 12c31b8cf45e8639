"""`--config.predict.explain=true`: which parts of an image speak for and against the predicted class, as a PNG.

The network has no class token whose attention could be drawn, and its last map is 7x7 at 224 px (1x1 at 32 px). So
the logit of the predicted class is attributed to the positions of one of its named maps, `stages.{s}`: the deepest
that is at least 8x8. The image is blended in from its own mean colour, and along the way each position's change is
multiplied by the logit's gradient there and summed up (conductance: Dhamdhere et al. 2018, after integrated
gradients, Sundararajan et al. 2017). The sums add up to what the image adds to the logit over the plain colour.

What it does not show: a position of the map sees more of the image than the square it is drawn on, its neighbours at
the least; and "for the class" means for this network's output, right or wrong, not for the object.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pcpvt.functional import mixing
from pcpvt.functional.objective import IMAGENET_MEAN, IMAGENET_STD
from pcpvt.models import pcpvt
from pcpvt.models.pcpvt import PCPVT, Params

STEPS = 32  # of the sum along the way; its error in the total is then about 1 % (16: 5 %)
AT_ONCE = 8  # images: every map of every block is kept for the gradient
SIDE = 256  # pixels of the shorter side of a picture
GAP = 8
FOR, AGAINST = (226, 64, 24), (32, 104, 224)


def attribute(model: PCPVT, params: Params, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The logit of a class, position by position.

    Args:
        params: float32 or float64.
        images: uint8 `[b, H, W, 3]`.
        labels: int64 `[b]`, the class whose logit is attributed.

    Returns:
        `[b, h, w]` of the map that is used, and `[b]`, the logit less that of the mean colour, which is what each map
        sums to up to the error of the numerical integral.
    """
    params = {name: value.detach() for name, value in params.items()}
    dtype = next(iter(params.values())).dtype
    target = mixing.decode_images(images, None, IMAGENET_MEAN, IMAGENET_STD).to(dtype)
    plain = target.mean((1, 2), keepdim=True).expand_as(target)
    total, before, logits = None, None, []
    for step in range(STEPS + 1):
        # Denser at the plain image, where normalisation makes the network steepest.
        x = torch.lerp(plain, target, (step / STEPS) ** 2).requires_grad_()
        every, named = pcpvt.intermediates(model, params, x)
        logit = every.gather(1, labels[:, None])[:, 0]
        found = named[f"stages.{_stage(named)}"]
        (gradient,) = torch.autograd.grad(logit.sum(), found)
        found = found.detach()
        if before is not None:
            # The trapezoid rule: the gradient between two steps is the mean of both.
            part = ((gradient + before[1]) / 2 * (found - before[0])).sum(-1)
            total = part if total is None else total + part
        before = found, gradient
        logits.append(logit.detach())
    assert total is not None
    return total, logits[-1] - logits[0]


def _stage(named: dict[str, Tensor]) -> int:
    """The deepest stage whose map is at least 8x8; of a tiny image the first."""
    return max((s for s in range(4) if min(named[f"stages.{s}"].shape[1:3]) >= 8), default=0)


def draw(image: np.ndarray, heat: np.ndarray) -> Image.Image:
    """The image beside itself in grey, reddish where a position speaks for the class and bluish where against it.

    Args:
        image: uint8 `[H, W, 3]`.
        heat: float `[h, w]`; its largest magnitude gets the full colour.
    """
    scale = max(1.0, SIDE / min(image.shape[:2]))
    height, width = (round(side * scale) for side in image.shape[:2])
    large = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
    field = torch.from_numpy(np.ascontiguousarray(heat, np.float32))[None, None]
    smooth = F.interpolate(field, (height, width), mode="bicubic")[0, 0].numpy()
    strength = np.clip(np.abs(smooth) / max(float(np.abs(heat).max()), 1e-12), 0, 1)[..., None] * 0.8
    grey = np.asarray(large.convert("L"), np.float32)[..., None].repeat(3, -1)
    color = np.where(smooth[..., None] > 0, np.array(FOR, np.float32), np.array(AGAINST, np.float32))
    overlay = Image.fromarray((grey * (1 - strength) + color * strength).round().astype(np.uint8))
    picture = Image.new("RGB", (2 * width + GAP, height), "white")
    picture.paste(large, (0, 0))
    picture.paste(overlay, (width + GAP, 0))
    return picture


def write(folder: Path, names: list[str], model: PCPVT, params: Params, images: Tensor, labels: Tensor) -> None:
    """One PNG per image, `<folder>/<name>.png`; arguments as in `attribute`."""
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(images), AT_ONCE):
        part = slice(start, start + AT_ONCE)
        heat, _ = attribute(model, params, images[part], labels[part])
        for name, image, field in zip(names[part], images[part].cpu().numpy(), heat.cpu().numpy(), strict=True):
            draw(image, field).save(folder / f"{name}.png")
