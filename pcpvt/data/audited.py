"""Batches for audits: in some steps a process reads another one's part too, whose work it repeats (`train.audit`)."""

import dataclasses
from typing import NamedTuple

from pcpvt.data.loader import TrainBatches
from pcpvt.data.sources import Dataset
from pcpvt.functional.objective import Batch
from pcpvt.images.depth import RangeWatch

_OTHER = "audited/"  # before the names of the other process's tensors


class Turns(NamedTuple):
    """Which steps are audited, and who repeats whose work then; `step` counts the steps done, that one included."""

    every: int  # steps; 0: never
    world: int  # processes

    def due(self, step: int) -> bool:
        """Whether a step is audited."""
        return self.every > 0 and step % self.every == 0

    def passed(self, step: int) -> int:
        """The last audited step up to a step; 0 before the first."""
        return step // self.every * self.every

    def audited_by(self, step: int, rank: int) -> int:
        """The process whose work a process repeats: in turn each of the others, which may be on another host."""
        if self.world == 1:
            return rank
        return (rank + 1 + (step // self.every - 1) % (self.world - 1)) % self.world


@dataclasses.dataclass(eq=False)
class AuditedBatches:
    """As the process's own batches, but those of audited steps hold the other process's part too (see `separate`)."""

    own: TrainBatches
    turns: Turns

    @property
    def dataset(self) -> Dataset:
        return self.own.dataset

    @property
    def ranges(self) -> RangeWatch:
        return self.own.ranges

    def __getitem__(self, index: int) -> Batch:
        batch, step = self.own[index], index + 1
        if self.turns.due(step):
            other = self.own.of_rank(index, self.turns.audited_by(step, self.own.rank))
            batch |= {_OTHER + name: value for name, value in other.items()}
        return batch


def separate(batch: Batch) -> tuple[Batch, Batch]:
    """The process's own part of an audited batch, and the other process's, which is empty in other batches."""
    own = {name: value for name, value in batch.items() if not name.startswith(_OTHER)}
    return own, {name.removeprefix(_OTHER): value for name, value in batch.items() if name.startswith(_OTHER)}
