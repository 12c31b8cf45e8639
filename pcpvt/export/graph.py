"""The model as a graph of `torch.export`, from images to logits or probabilities, from which formats are written."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from pcpvt.errors import UserError, suppress_logging
from pcpvt.export.formats import Size
from pcpvt.functional import tasks
from pcpvt.functional.mixing import decode_images
from pcpvt.functional.objective import normalisation
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
    """The model with its weights, which are in its compute dtype, from NCHW images to logits; both float32."""

    def __init__(self, model: PCPVT, params: Params, dynamic_size: bool, compute: torch.dtype, kernels: Kernels):
        super().__init__()
        self.compute, self.kernels = compute, kernels
        with torch.device("meta"):
            self.model = PCPVT(model.spec, model.num_classes, model.pad, model.in_chans, model.task)
            for parent in list(self.model.modules()) if dynamic_size else []:
                for name, child in parent.named_children():
                    if isinstance(child, PatchLinear):
                        c_out, c_in, patch, _ = child.weight.shape
                        setattr(parent, name, AnySize(c_in, c_out, patch))
        self.model.load_state_dict(params, assign=True)
        self.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        return self.logits(rearrange(images, "b c h w -> b h w c"))

    def logits(self, images: Tensor) -> Tensor:
        """`[b, classes]` of normalised images `[b, h, w, channels]`."""
        if self.compute == torch.float32:  # without casts, which a graph would keep as operators
            return self.model(images, kernels=self.kernels)
        return self.model(images.to(self.compute), kernels=self.kernels).to(torch.float32)


class Preprocessed(Deployed):
    """The model with its weights, from uint8 NHWC images to probabilities."""

    def forward(self, images: Tensor) -> Tensor:
        normalised = decode_images(images, None, *normalisation(self.model.in_chans))
        return tasks.choose(self.model.task).probabilities(self.logits(normalised))


def capture(
    model: PCPVT, params: Params, size: Size, dynamic_size: bool, preprocess: bool = False, *,
    compute: torch.dtype = torch.float32, kernels: Kernels = PLAIN,
) -> tuple[ExportedProgram, list[Size]]:  # fmt: skip
    """The graph of a model for any batch size, and the sizes at which a written file should be compared with the model.

    The params are in the compute dtype. The graph takes images of one size, or with `dynamic_size` of any from
    SMALLEST; raises UserError when the model then does not pad, or `size` is below SMALLEST. With `preprocess` it takes
    them as uint8 `[b, h, w, channels]` and returns probabilities.
    """
    sizes, axes, first = [size], {}, 1 if preprocess else 2  # the axis of the height
    if dynamic_size:
        if model.pad != "pad":
            raise UserError("config.export.dynamic_size: needs padding: use config.model.pad=pad, or leave it out")
        if min(size) < SMALLEST:
            raise UserError(
                f"config.export.dynamic_size: takes images from {SMALLEST} px and config.image_size is {min(size)}: "
                "leave it out, or give a larger config.image_size"
            )
        sizes += [(size[0] + 13, size[1] + 38)]  # not square, and no multiple of 4 px (the first patch) if `size` is
        axes = {first: Dim("height", min=SMALLEST), first + 1: Dim("width", min=SMALLEST)}
    height, width = sizes[-1]
    if preprocess:
        deployed: Deployed = Preprocessed(model, params, dynamic_size, compute, kernels)
        images = torch.zeros(2, height, width, model.in_chans, dtype=torch.uint8)
    else:
        deployed = Deployed(model, params, dynamic_size, compute, kernels)
        images = torch.zeros(2, model.in_chans, height, width)
    shapes = {"images": {0: Dim("batch"), **axes}}
    with suppress_logging():
        program = torch.export.export(deployed, (images,), dynamic_shapes=shapes)
    return program, sizes


def output_name(program: ExportedProgram) -> str:
    """What a captured graph returns."""
    (name,) = program.graph_signature.user_inputs
    (images,) = (node.meta["val"] for node in program.graph.nodes if node.name == name)
    return "probabilities" if images.dtype == torch.uint8 else "logits"
