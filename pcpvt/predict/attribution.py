"""`--config.predict.explain=true`: which parts of an image speak for and against the predicted class, as a PNG.

The network has no class token whose attention could be drawn, and its last map is 7x7 at 224 px (1x1 at 32 px). So
the logit of the predicted class is attributed to the positions of one of its named maps, `stages.{s}`: the deepest
that is at least 8x8. The image is blended in from its own mean colour; at each step, every position's change is
multiplied by the gradient of the logit there, and the products are summed (conductance: Dhamdhere et al. 2018, after
integrated gradients, Sundararajan et al. 2017). The sums add up to the image's logit less that of the plain colour.

Limits: a position of the map depends on more of the image than the square it is drawn on, at least on the
neighbouring squares; and "for the class" means for this network's output, right or wrong, not for the object.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pcpvt.errors import UserError
from pcpvt.functional import mixing
from pcpvt.functional.objective import normalisation
from pcpvt.images import bands
from pcpvt.models import pcpvt
from pcpvt.models.pcpvt import PCPVT, Params

STEPS = 32  # of the numerical integral, whose total is then off by about 1 % (16: 5 %)
BATCH = 8  # images at once: every map of every block is kept for the gradient
SIDE = 256  # pixels of the shorter side of a picture
GAP = 8  # pixels between its halves
FOR, AGAINST = (226, 64, 24), (32, 104, 224)  # RGB


def attribute(model: PCPVT, params: Params, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Attributes the logits of the classes `labels`, int64 `[b]`, to the positions of a map.

    The params are float32 or float64, the images uint8 `[b, H, W, 3]`. Returns the attribution `[b, h, w]`, and the
    difference `[b]` of the image's logit to that of its mean colour, which each attribution sums to up to the error of
    the numerical integral.
    """
    params = {name: value.detach() for name, value in params.items()}
    dtype = next(iter(params.values())).dtype
    target = mixing.decode_images(images, None, *normalisation(model.in_chans)).to(dtype)
    plain = target.mean((1, 2), keepdim=True).expand_as(target)
    total, previous, logits = torch.zeros(()), None, []
    for step in range(STEPS + 1):
        # The steps are denser near the plain image, where normalisation makes the network steepest.
        x = torch.lerp(plain, target, (step / STEPS) ** 2).requires_grad_()
        outputs, named = pcpvt.intermediates(model, params, x)
        logit = outputs.gather(1, labels[:, None])[:, 0]
        # The deepest stage whose map is at least 8x8; for a tiny image, the first.
        maps = [named[f"stages.{stage}"] for stage in range(4)]
        activation = next((m for m in reversed(maps) if min(m.shape[1:3]) >= 8), maps[0])
        (gradient,) = torch.autograd.grad(logit.sum(), activation)
        activation = activation.detach()
        if previous is not None:
            # The trapezoid rule: the gradient between two steps is the mean of both.
            total = total + ((gradient + previous[1]) / 2 * (activation - previous[0])).sum(-1)
        previous = activation, gradient
        logits.append(logit.detach())
    return total, logits[-1] - logits[0]


def draw(image: np.ndarray, heat: np.ndarray) -> Image.Image:
    """The image, and beside it a grey copy that is red where a position speaks for the class and blue where against.

    The image is uint8 `[H, W, 3]`, the heat float `[h, w]`; its largest magnitude gets the full colour.
    """
    scale = max(1.0, SIDE / min(image.shape[:2]))
    height, width = (round(side * scale) for side in image.shape[:2])
    large = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
    heat_map = torch.from_numpy(np.ascontiguousarray(heat, np.float32))[None, None]
    smooth = F.interpolate(heat_map, (height, width), mode="bicubic")[0, 0].numpy()
    strength = np.clip(np.abs(smooth) / max(float(np.abs(heat).max()), 1e-12), 0, 1)[..., None] * 0.8
    grey = np.asarray(large.convert("L"), np.float32)[..., None].repeat(3, -1)
    color = np.where(smooth[..., None] > 0, np.array(FOR, np.float32), np.array(AGAINST, np.float32))
    overlay = Image.fromarray((grey * (1 - strength) + color * strength).round().astype(np.uint8))
    picture = Image.new("RGB", (2 * width + GAP, height), "white")
    picture.paste(large, (0, 0))
    picture.paste(overlay, (width + GAP, 0))
    return picture


def write(folder: Path, names: list[str], model: PCPVT, params: Params, images: Tensor, labels: Tensor) -> None:
    """Writes one PNG per image, `<folder>/<name>.png`, or raises UserError; the other arguments as in `attribute`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for start in range(0, len(images), BATCH):
            part = slice(start, start + BATCH)
            heats, _ = attribute(model, params, images[part], labels[part])
            for name, image, heat in zip(names[part], images[part].cpu().numpy(), heats.cpu().numpy(), strict=True):
                draw(bands.shown(image), heat).save(folder / f"{name}.png")
    except OSError as error:
        raise UserError(
            f"--workdir: {folder}: heat maps cannot be written ({error.strerror or error}): free space, choose "
            "another --workdir, or leave out config.predict.explain"
        ) from None
