"""Batches from a dataset: fixed shapes, all random draws included, the same bytes for any number of loader processes.

Loader processes are PyTorch's. Each builds whole batches in shared memory, and they live as long as the run, because
the training stream has no end (see `order`).
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from pcpvt import rng
from pcpvt.data import augment, order
from pcpvt.data.decode import RGB, DecodeError, Picture, Reading
from pcpvt.data.label_sets import LabelSets
from pcpvt.data.sources import Dataset
from pcpvt.data.workers import block_signals_in_children, explain, init_worker, worker_errors
from pcpvt.errors import UserError, warn
from pcpvt.functional import mixing
from pcpvt.functional.objective import Batch
from pcpvt.functional.sizes import SizeSchedule
from pcpvt.images.depth import RangeWatch
from pcpvt.models.pcpvt import draw_drop_path_scale

MOST_WORKERS = 16  # loader processes of one loader that are started unasked


class Batches(Protocol):
    """What a loader reads: `batches[i]` is the i-th batch of one process."""

    @property
    def dataset(self) -> Dataset: ...

    @property
    def ranges(self) -> RangeWatch: ...

    def __getitem__(self, index: int) -> Batch: ...


@dataclasses.dataclass(eq=False)
class TrainBatches:
    """`batches[step]` is this process's part of the global batch of that step."""

    dataset: Dataset
    spec: augment.AugmentSpec
    mix: mixing.MixSpec | None
    drop_rates: np.ndarray
    _: dataclasses.KW_ONLY
    seed: int
    batch: int  # samples over all processes
    rank: int = 0
    world: int = 1
    repeats: int = 1
    on_error: str = "error"
    reading: Reading = RGB
    labels: np.ndarray | None = None  # of all samples, for a balanced sampler; None: a uniform one
    ranges: RangeWatch = dataclasses.field(default_factory=RangeWatch)
    sizes: SizeSchedule | None = None  # None: that of the spec, in every step

    @functools.cached_property
    def _balance(self) -> order.Balance | None:
        return None if self.labels is None else order.Balance(self.labels)

    def global_draws(self, step: int) -> list[order.Draw]:
        """The draws of a step, over all processes."""
        return order.global_batch(self.seed, step, self.batch, len(self.dataset), self.repeats, self._balance)

    def draws(self, step: int) -> list[order.Draw]:
        """The draws that this process reads in a step."""
        return order.rank_slice(self.global_draws(step), self.rank, self.world)

    def __getitem__(self, step: int) -> Batch:
        return self.of_rank(step, self.rank)

    def of_rank(self, step: int, rank: int) -> Batch:
        """Any process's part of the global batch of a step."""
        draws = order.rank_slice(self.global_draws(step), rank, self.world)
        spec = self.spec if self.sizes is None else augment.at_size(self.spec, self.sizes.at(step))
        height, width = spec.size
        batch = {
            "image": _shared((len(draws), height, width, self.reading.channels), torch.uint8),
            "label": _labels(self.dataset, len(draws)),
            "id": torch.empty(len(draws), dtype=torch.int64),
        }
        erase = np.zeros((len(draws), 4), np.int32)
        pixels = batch["image"].numpy()
        for row, draw in enumerate(draws):
            generator = rng.generator(self.seed, "augment", draw.epoch, draw.index, draw.copy)
            index, pixels[row], erase[row], label = self._sample(draw.index, spec, generator)
            batch["label"][row], batch["id"][row] = torch.as_tensor(label), index
        if self.spec.erase_prob:
            batch["erase"] = torch.from_numpy(erase)
        if self.drop_rates.any():
            generators = (rng.generator(self.seed, "drop_path", *draw) for draw in draws)
            scales = [draw_drop_path_scale(generator, self.drop_rates) for generator in generators]
            batch["drop_path_scale"] = torch.from_numpy(np.stack(scales))
        if self.mix is not None:
            generator = rng.generator(self.seed, "mix", step)
            lam, box = mixing.mixing_draws(generator, self.batch, spec.size, self.mix)
            batch["lam"] = torch.from_numpy(order.rank_slice(lam, rank, self.world).copy())
            batch["box"] = torch.from_numpy(order.rank_slice(box, rank, self.world).copy())
        return batch

    def _sample(
        self, index: int, spec: augment.AugmentSpec, generator: np.random.Generator
    ) -> tuple[int, np.ndarray, np.ndarray, Any]:
        """(index, pixels, erasing box, label) of the sample, or with `on_error="skip"` of the next readable one."""
        for offset in range(len(self.dataset)):
            candidate = (index + offset) % len(self.dataset)
            try:
                image, label = self.dataset[candidate]
                picture = Picture(image, self.dataset.name(candidate), self.reading)
                pixels, box = augment.train_sample(picture, spec, generator)
            except DecodeError as error:
                if self.on_error == "error":
                    raise or_skip(error) from error
                continue
            self.ranges.see(picture.depth)
            return candidate, pixels, box, label
        raise UserError("config.data.path: no training image can be read: check the files")


@dataclasses.dataclass(eq=False)
class EvalBatches:
    """`batches[i]` is this process's i-th evaluation batch; rows beyond the data are invalid and are not counted.

    No sample is ever substituted. With `on_error="skip"` an unreadable one stays invalid and is reported by its id.
    """

    dataset: Dataset
    size: tuple[int, int]
    crop: float
    local_batch: int
    rank: int
    world: int
    on_error: str
    reading: Reading = RGB
    ranges: RangeWatch = dataclasses.field(default_factory=RangeWatch)

    def __post_init__(self) -> None:
        self.batches = order.evaluation_batches(len(self.dataset), self.local_batch, self.rank, self.world)

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Batch:
        shape = (self.local_batch, *self.size, self.reading.channels)
        batch = {
            "image": _shared(shape, torch.uint8).zero_(),
            "label": _labels(self.dataset, self.local_batch),
            "id": torch.full((self.local_batch,), -1, dtype=torch.int64),
            "valid": torch.zeros(self.local_batch, dtype=torch.bool),
        }
        pixels = batch["image"].numpy()
        for row, sample in enumerate(self.batches[index]):
            batch["id"][row] = sample
            try:
                image, label = self.dataset[sample]
                batch["label"][row] = torch.as_tensor(label)
                picture = Picture(image, self.dataset.name(sample), self.reading)
                pixels[row] = augment.eval_sample(picture, self.size, self.crop)
                self.ranges.see(picture.depth)
                batch["valid"][row] = True
            except DecodeError as error:
                if self.on_error == "error":
                    raise or_skip(error) from error
        return batch


def or_skip(error: DecodeError) -> DecodeError:
    """The error with the other remedy that a user of the loader has."""
    return DecodeError(f"{error}, or skip such images with config.data.on_error=skip")


class _Read(NamedTuple):
    """What a loader process returns. A user error is returned as text: raised, it would arrive inside a traceback."""

    batch: Batch
    seconds: float
    error: str = ""
    warning: str = ""


class _Timed(torch.utils.data.Dataset[_Read]):
    def __init__(self, batches: Batches):
        self.batches = batches

    def __getitem__(self, index: int) -> _Read:
        began = time.perf_counter()
        try:
            batch = self.batches[index]
            return _Read(batch, time.perf_counter() - began, warning=self.batches.ranges.warning())
        except UserError as error:
            return _Read({}, 0.0, str(error))
        except (RuntimeError, OSError, MemoryError) as error:
            if line := explain(error):
                return _Read({}, 0.0, line)
            raise


class Loader:
    """Iterates over `batches[i]` for each index, in order, read ahead by loader processes that live as long as this.

    Args:
        workers: the number of loader processes; 0 reads in this process.
        start: how processes start; see `Device.worker_start`.
        pin: copy into page-locked memory, so that transfers to the device overlap with computation.
        warn: called with a warning about how images are read, once.

    Attributes:
        seconds: the time that one process took to read the last batch.
    """

    def __init__(
        self, batches: Batches, indices: Sequence[int], workers: int, *,
        start: str = "forkserver", pin: bool = False, warn: Callable[[str], None] = warn,
    ):  # fmt: skip
        self.loader = torch.utils.data.DataLoader(
            _Timed(batches), batch_size=None, sampler=indices, num_workers=workers, collate_fn=_identity,
            prefetch_factor=2 if workers else None, multiprocessing_context=start if workers else None,
            persistent_workers=workers > 0, worker_init_fn=init_worker, pin_memory=pin,
            generator=torch.Generator(),  # for the workers' seeds (unused), in place of torch's global generator
        )  # fmt: skip
        self.workers, self.seconds, self._warn, self._warned = workers, 0.0, warn, False
        self._started: Iterator[_Read] | None = None

    def start(self) -> None:
        """Starts the loader processes, which takes seconds, and lets them read ahead for the next iteration.

        Raises:
            UserError: when one died.
        """
        self._started = self._iterator()

    def _iterator(self) -> Iterator[_Read]:
        with worker_errors(), block_signals_in_children():
            return iter(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        """Raises UserError: an error of reading, or the death of a loader process."""
        iterator = self._iterator() if self._started is None else self._started
        self._started = None
        with worker_errors():
            for read in iterator:
                if read.error:
                    raise UserError(read.error)
                if read.warning and not self._warned:
                    self._warned = True
                    self._warn(read.warning)
                self.seconds = read.seconds
                yield read.batch


def _identity(value: Any) -> Any:
    return value


def _labels(dataset: Dataset, rows: int) -> Tensor:
    """Zeros for the labels of a batch: int64 `[rows]`, or float32 `[rows, classes]` where images have several."""
    return torch.zeros(rows, len(dataset.classes)) if isinstance(dataset, LabelSets) else torch.zeros(rows).long()


def _shared(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An empty tensor; in a loader process in shared memory, so that sending it to the training process is free."""
    empty = torch.empty(shape, dtype=dtype)
    return empty.share_memory_() if torch.utils.data.get_worker_info() else empty


def default_workers(dataset: Dataset, cores: int) -> int:
    """Loader processes of one loader for `config.data.workers=-1`: none for data in memory, else one less than cores.

    Args:
        cores: of this training process; 0 when it shares one with others, which then read by themselves.
    """
    return 0 if dataset.in_memory else min(MOST_WORKERS, max(cores - 1, min(1, cores)))


def shared_workers(train: Dataset, val: Dataset, cores: int) -> tuple[int, int]:
    """As `default_workers`, for a training and its evaluation: together at most `cores`, a quarter for evaluation."""
    if train.in_memory or val.in_memory:
        return default_workers(train, cores), default_workers(val, cores)
    training = min(MOST_WORKERS, max(cores - max(1, cores // 4), min(1, cores)))
    return training, min(MOST_WORKERS, cores - training)
