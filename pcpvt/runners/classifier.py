"""A model with weights that stay the same, as a function from pixels to logits."""

from collections.abc import Callable

import torch
from torch import Tensor

from pcpvt.devices.compile import backend
from pcpvt.functional import mixing
from pcpvt.functional.objective import normalisation
from pcpvt.models import pcpvt
from pcpvt.models.pcpvt import PCPVT, Params
from pcpvt.runtime.session import Session


def classifier(session: Session, model: PCPVT, params: Params) -> Callable[[Tensor], Tensor]:
    """uint8 images `[b, h, w, channels]` on the device to logits `[b, classes]`, by weights that are copied now.

    Equal to `Session.predictor`, with less work in Python per call: the weights stay in the model, and in inference
    mode operators record nothing for gradients. Compiled functions take their weights with every call.
    """
    weights, policy, kernels = session.inference(params), session.policy, session.kernels
    if backend(session.device, session.config.compile) != "none":
        predict = session.predictor(model)
        return lambda images: predict(weights, images)
    bound = pcpvt.bind(model, weights)

    @torch.inference_mode()
    def classify(images: Tensor) -> Tensor:
        x = mixing.decode_images(images, None, *normalisation(model.in_chans))
        return bound(x.to(policy.compute), kernels=kernels).to(policy.output)

    return classify
