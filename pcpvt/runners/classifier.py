"""A model with weights that stay the same, as a function from pixels to logits."""

from collections.abc import Callable

from torch import Tensor

from pcpvt.devices.compile import backend
from pcpvt.models import pcpvt
from pcpvt.models.pcpvt import PCPVT, Params
from pcpvt.runtime.session import Session


def classifier(session: Session, model: PCPVT, params: Params) -> Callable[[Tensor], Tensor]:
    """uint8 images `[b, h, w, channels]` on the device to logits `[b, classes]`, by weights that are copied now.

    Equal to `Session.predictor`, with less work in Python per call, because the weights stay in the model. Compiled
    functions take their weights with every call.
    """
    weights = session.inference(params)
    if backend(session.device, session.config.compile) == "none":
        model, weights = pcpvt.bind(model, weights), {}
    predict = session.predictor(model)
    return lambda images: predict(weights, images)
