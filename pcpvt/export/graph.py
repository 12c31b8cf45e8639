"""The model as a graph of `torch.export`, from NCHW images to logits, from which graph formats are written."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from pcpvt.errors import UserError, suppress_logging
from pcpvt.export.formats import Size
from pcpvt.models.layers import PLAIN, Kernels, PatchLinear
from pcpvt.models.pcpvt import PCPVT, Params

SMALLEST = 33  # pixels, with a dynamic size: torch.export treats a last stage of one token as a constant


class AnySize(PatchLinear):
    """PatchLinear without a branch on the size, so that one graph is valid for all sizes; with equal results."""

    def forward(self, x: Tensor, kernels: Kernels = PLAIN) -> Tensor:
        p = self.patch
        rows, columns = (x.shape[1] + p - 1) // p, (x.shape[2] + p - 1) // p
        x = F.pad(x, (0, 0, 0, columns * p - x.shape[2], 0, rows * p - x.shape[1]))
        x = rearrange(x, "b (h p) (w q) c -> b h w (p q c)", h=rows, w=columns, p=p, q=p)
        return kernels.linear(x, rearrange(self.weight, "o c p q -> o (p q c)"), self.bias)


class Deployed(nn.Module):
    """The model with its weights, from NCHW images to logits."""

    def __init__(self, model: PCPVT, params: Params, dynamic_size: bool):
        super().__init__()
        with torch.device("meta"):
            self.model = PCPVT(model.spec, model.num_classes, model.pad, model.in_chans)
            for parent in list(self.model.modules()) if dynamic_size else []:
                for name, child in parent.named_children():
                    if isinstance(child, PatchLinear):
                        c_out, c_in, patch, _ = child.weight.shape
                        setattr(parent, name, AnySize(c_in, c_out, patch))
        self.model.load_state_dict(params, assign=True)
        self.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        return self.model(rearrange(images, "b c h w -> b h w c"))


def capture(model: PCPVT, params: Params, size: Size, dynamic_size: bool) -> tuple[ExportedProgram, list[Size]]:
    """The graph of a model for any batch size, and the sizes at which a written file should be compared with the model.

    The params are float32. The graph takes images of one size, or with `dynamic_size` of any from SMALLEST; raises
    UserError when the model then does not pad, or `size` is below SMALLEST.
    """
    sizes, axes = [size], {}
    if dynamic_size:
        if model.pad != "pad":
            raise UserError("config.export.dynamic_size: needs padding: use config.model.pad=pad, or leave it out")
        if min(size) < SMALLEST:
            raise UserError(
                f"config.export.dynamic_size: takes images from {SMALLEST} px and config.image_size is {min(size)}: "
                "leave it out, or give a larger config.image_size"
            )
        sizes += [(size[0] + 13, size[1] + 38)]  # not square, and no multiple of 4 px (the first patch) if `size` is
        axes = {2: Dim("height", min=SMALLEST), 3: Dim("width", min=SMALLEST)}
    deployed = Deployed(model, params, dynamic_size)
    shapes = {"images": {0: Dim("batch"), **axes}}
    with suppress_logging():
        program = torch.export.export(deployed, (torch.zeros(2, model.in_chans, *sizes[-1]),), dynamic_shapes=shapes)
    return program, sizes
