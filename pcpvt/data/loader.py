"""Samples to batches: fixed shapes, every random draw included, the same bytes for any number of workers.

Loader processes are PyTorch's; each builds whole batches in shared memory, and they live as long as the run, because
the training stream has no end (see `order`).
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pcpvt import rng
from pcpvt.data import augment, order
from pcpvt.data.decode import DecodeError
from pcpvt.data.sources import Dataset
from pcpvt.data.workers import block_signals_in_children, init_worker, worker_errors
from pcpvt.errors import UserError
from pcpvt.functional import mixing
from pcpvt.functional.objective import Batch
from pcpvt.models.pcpvt import draw_drop_path_scale


class TrainBatches:
    """`batches[step]` is this process's part of the global batch of that step."""

    def __init__(
        self,
        source: Dataset,
        spec: augment.AugmentSpec,
        mix: mixing.MixSpec | None,
        drop_rates: np.ndarray,
        *,
        seed: int,
        batch: int,
        rank: int = 0,
        world: int = 1,
        repeats: int = 1,
        on_error: str = "error",
    ):
        self.source, self.spec, self.mix, self.drop_rates = source, spec, mix, drop_rates
        self.seed, self.batch, self.rank, self.world = seed, batch, rank, world
        self.repeats, self.on_error = repeats, on_error

    def draws(self, step: int) -> list[order.Draw]:
        """What this process reads in a step."""
        everything = order.global_batch(self.seed, step, self.batch, len(self.source), self.repeats)
        return order.rank_slice(everything, self.rank, self.world)

    def __getitem__(self, step: int) -> Batch:
        draws = self.draws(step)
        height, width = self.spec.size
        batch = {
            "image": _shared((len(draws), height, width, 3), torch.uint8),
            "label": torch.empty(len(draws), dtype=torch.int64),
            "id": torch.empty(len(draws), dtype=torch.int64),
        }
        erase = np.zeros((len(draws), 4), np.int32)
        pixels = batch["image"].numpy()
        for row, draw in enumerate(draws):
            generator = rng.generator(self.seed, "augment", draw.epoch, draw.index, draw.copy)
            index, pixels[row], erase[row], label = self._sample(draw.index, generator)
            batch["label"][row], batch["id"][row] = label, index
        if self.spec.erase_prob:
            batch["erase"] = torch.from_numpy(erase)
        if self.drop_rates.any():
            scales = [
                draw_drop_path_scale(rng.generator(self.seed, "drop_path", *draw), self.drop_rates) for draw in draws
            ]
            batch["drop_path_scale"] = torch.from_numpy(np.stack(scales))
        if self.mix is not None:
            generator = rng.generator(self.seed, "mix", step)
            lam, box = mixing.mixing_draws(generator, self.batch, self.spec.size, self.mix)
            mine = slice(self.rank * len(draws), (self.rank + 1) * len(draws))
            batch["lam"], batch["box"] = torch.from_numpy(lam[mine].copy()), torch.from_numpy(box[mine].copy())
        return batch

    def _sample(self, index: int, generator: np.random.Generator) -> tuple[int, np.ndarray, np.ndarray, int]:
        """The sample, or under `skip` the next readable one; `id` tells the reader which it was."""
        for tries in range(len(self.source)):
            chosen = (index + tries) % len(self.source)
            try:
                image, label = self.source[chosen]
                pixels, box = augment.train_sample(image, self.spec, generator, self.source.name(chosen))
            except DecodeError:
                if self.on_error == "error":
                    raise
                continue
            return chosen, pixels, box, label
        raise UserError("config.data.path: no training image can be read: check the files")


class EvalBatches:
    """`batches[i]` is this process's i-th evaluation batch; rows beyond the data are invalid and count nowhere.

    No sample is ever substituted. Under `skip` an unreadable one stays invalid and is reported by its id.
    """

    def __init__(
        self,
        source: Dataset,
        size: tuple[int, int],
        crop: float,
        local_batch: int,
        rank: int,
        world: int,
        on_error: str,
    ):
        self.source, self.size, self.crop, self.local_batch, self.on_error = source, size, crop, local_batch, on_error
        self.batches = order.evaluation_batches(len(source), local_batch, rank, world)

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Batch:
        shape = (self.local_batch, *self.size, 3)
        batch = {
            "image": _shared(shape, torch.uint8).zero_(),
            "label": torch.zeros(self.local_batch, dtype=torch.int64),
            "id": torch.full((self.local_batch,), -1, dtype=torch.int64),
            "valid": torch.zeros(self.local_batch, dtype=torch.bool),
        }
        pixels = batch["image"].numpy()
        for row, sample in enumerate(self.batches[index]):
            batch["id"][row] = sample
            try:
                image, batch["label"][row] = self.source[sample]
                pixels[row] = augment.eval_sample(image, self.size, self.crop, self.source.name(sample))
                batch["valid"][row] = True
            except DecodeError:
                if self.on_error == "error":
                    raise
        return batch


class _Failure(NamedTuple):
    """A user error that crosses from a loader process as data: a traceback would hide its one line."""

    message: str


class _Read(NamedTuple):
    batch: Batch
    seconds: float


class _Guarded(torch.utils.data.Dataset[_Read | _Failure]):
    def __init__(self, batches: TrainBatches | EvalBatches):
        self.batches = batches

    def __getitem__(self, index: int) -> _Read | _Failure:
        began = time.perf_counter()
        try:
            return _Read(self.batches[index], time.perf_counter() - began)
        except UserError as error:
            return _Failure(str(error))


class Loader:
    """Iterates `batches[i]` for each index, in order, read ahead by loader processes that live as long as this object.

    Args:
        workers: loader processes; 0 reads in this process.
        start: how processes start; see `Device.worker_start`.
        pin: copy into page-locked memory, for transfers that overlap.

    Attributes:
        seconds: that the batch handed out last took one process to read.
    """

    def __init__(
        self,
        batches: TrainBatches | EvalBatches,
        indices: Sequence[int],
        workers: int,
        *,
        start: str = "forkserver",
        pin: bool = False,
    ):
        self.loader = torch.utils.data.DataLoader(
            _Guarded(batches),
            batch_size=None,
            sampler=indices,
            num_workers=workers,
            collate_fn=_as_is,
            prefetch_factor=2 if workers else None,
            multiprocessing_context=start if workers else None,
            persistent_workers=workers > 0,
            worker_init_fn=functools.partial(init_worker, os.getpid()),
            generator=torch.Generator(),  # workers' seeds come from it, unused; torch's global one stays untouched
            pin_memory=pin,
        )

        self.workers, self.seconds = workers, 0.0
        self._started: Iterator | None = None

    def start(self) -> None:
        """Starts the loader processes, which takes them seconds, and their reading for the next iteration.

        Raises:
            UserError: when one died.
        """
        self._started = self._begin()

    def _begin(self) -> Iterator:
        with worker_errors(), block_signals_in_children():
            return iter(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        """Raises UserError: one that a worker met, or that a worker died."""
        batches = self._begin() if self._started is None else self._started
        self._started = None
        with worker_errors():
            for read in batches:
                if isinstance(read, _Failure):
                    raise UserError(read.message)
                self.seconds = read.seconds
                yield read.batch


def _as_is(value):
    return value


def _shared(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An empty tensor; inside a loader process in shared memory, so that handing it over copies nothing."""
    empty = torch.empty(shape, dtype=dtype)
    return empty.share_memory_() if torch.utils.data.get_worker_info() else empty


def default_workers(source: Dataset, cores: int) -> int:
    """Loader processes for `config.data.workers=-1`: none for data in memory, else the cores but one, at most 16."""
    return 0 if source.in_memory else max(1, min(16, cores - 1))
