"""Image sizes over the steps of a run: a pure function of the step, so that it needs no state and no order of calls."""

from __future__ import annotations

from typing import NamedTuple

Size = tuple[int, int]  # height, width


class SizeSchedule(NamedTuple):
    """The size of the training images of each step; steps are counted from 0."""

    starts: tuple[int, ...]  # steps from which the sizes hold, ascending from 0
    sizes: tuple[Size, ...]  # ascending; the last is that of evaluation
    costs: tuple[float, ...]  # operations of an image of each size, relative to the last

    def at(self, step: int) -> Size:
        """The size of a step."""
        return self.sizes[self._index(step)]

    def following(self, step: int) -> tuple[Size, ...]:
        """The sizes that come after that of a step."""
        return self.sizes[self._index(step) + 1 :]

    def changes_before(self, step: int) -> bool:
        """Whether a step's size is another one than the size of the step before it."""
        return step > 0 and step in self.starts

    def cost(self, first: int, last: int) -> float:
        """The steps at the last size that need as many operations as the steps from `first` up to before `last`."""
        total, ends = 0.0, (*self.starts[1:], max(last, self.starts[-1]))
        for start, end, cost in zip(self.starts, ends, self.costs, strict=True):
            total += cost * max(0, min(end, last) - max(start, first))
        return total

    def _index(self, step: int) -> int:
        return sum(start <= step for start in self.starts) - 1


def constant(size: Size) -> SizeSchedule:
    """One size for all steps."""
    return SizeSchedule((0,), (size,), (1.0,))
