"""Before the first step is done: code and memory for image sizes that come later (`config.size_schedule`)."""

from collections.abc import Callable, Sequence

from torch import Tensor

from pcpvt.devices.compile import backend
from pcpvt.functional.objective import Batch
from pcpvt.functional.sizes import Size, SizeSchedule
from pcpvt.functional.state import TrainState
from pcpvt.functional.step import Addends, Inspect
from pcpvt.runtime.session import Session


def of_sizes(session: Session, sizes: SizeSchedule, step: int) -> Inspect:
    """For `functional.step.make_step`: computes a gradient of each size to come inside the first step, and drops it.

    What a later size would compile, or would lack in memory, thus takes its time, or fails, now. Without a compiler
    only the largest size is tried.

    Args:
        step: the first one of this part of the run, counted from 0.
    """
    left = list(sizes.following(step))
    if backend(session.device, session.config.compile) == "none":
        left = left[-1:]

    def inspect(state: TrainState, batch: Batch, addends: Addends, work: Callable[[Batch], Addends]) -> None:
        while left:
            work({**batch, "image": _blank(batch["image"], left.pop())})

    return inspect


def _blank(images: Tensor, size: Size) -> Tensor:
    """As many images `[b, *size, c]`, all black; boxes of the draws may exceed a smaller size."""
    return images.new_zeros(images.shape[0], *size, images.shape[-1])


def together(inspects: Sequence[Inspect]) -> Inspect | None:
    """One function in the place of several; None for none."""
    if not inspects:
        return None

    def inspect(state: TrainState, batch: Batch, addends: Addends, work: Callable[[Batch], Addends]) -> None:
        for each in inspects:
            each(state, batch, addends, work)

    return inspect
