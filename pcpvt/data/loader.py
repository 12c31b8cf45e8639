"""Samples to batches: fixed shapes, every random draw included, the same bytes for any number of workers.

Loader processes are PyTorch's; each builds whole batches in shared memory, and they live as long as the run, because
the training stream has no end (see `order`).
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from multiprocessing import resource_tracker
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pcpvt.data import augment, order
from pcpvt.data.decode import DecodeError
from pcpvt.data.sources import Source
from pcpvt.devices.allocator import keep_freed_memory
from pcpvt.errors import UserError
from pcpvt.functional import mixing, rng
from pcpvt.models.pcpvt import draw_keep

Batch = dict[str, Tensor]


class TrainBatches:
    """`batches[step]` is this process's part of the global batch of that step."""

    def __init__(
        self,
        source: Source,
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
            keep = [draw_keep(rng.generator(self.seed, "drop_path", *draw), self.drop_rates) for draw in draws]
            batch["keep"] = torch.from_numpy(np.stack(keep))
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
        self, source: Source, size: tuple[int, int], crop: float, local_batch: int, rank: int, world: int, on_error: str
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


class _Guarded(torch.utils.data.Dataset[Batch | _Failure]):
    def __init__(self, batches: TrainBatches | EvalBatches):
        self.batches = batches

    def __getitem__(self, index: int) -> Batch | _Failure:
        try:
            return self.batches[index]
        except UserError as error:
            return _Failure(str(error))


class Loader:
    """Iterates `batches[i]` for each index, in order, read ahead by loader processes that live as long as this object.

    Args:
        workers: loader processes; 0 reads in this process.
        start: how processes start; see `Device.worker_start`.
        pin: copy into page-locked memory, for transfers that overlap.
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
            worker_init_fn=functools.partial(_begin_worker, os.getpid()),
            generator=torch.Generator(),  # workers' seeds come from it, unused; torch's global one stays untouched
            pin_memory=pin,
        )

    def __iter__(self) -> Iterator[Batch]:
        """Raises UserError: one that a worker met, or that a worker died."""
        try:
            with _deaf_children():
                batches = iter(self.loader)
            for batch in batches:
                if isinstance(batch, _Failure):
                    raise UserError(batch.message)
                yield batch
        except (RuntimeError, ConnectionError, EOFError) as error:
            reason = _why_worker_died(error)
            if not reason:
                raise
            raise UserError(
                f"config.data.workers: a loader process {reason}: free memory and /dev/shm, or use fewer of them"
            ) from error


@contextlib.contextmanager
def _deaf_children() -> Iterator[None]:
    """Processes started inside never see a signal that is sent to a whole group: the run answers it, and needs them.

    They end when this process tells them to, or is gone. The mask is inherited; a handler would come too late.
    """
    _end_children_at_exit()
    resource_tracker.ensure_running()  # which unblocks signals when it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT, signal.SIGHUP))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin_worker(parent: int, worker: int) -> None:
    keep_freed_memory()
    _end_with(parent)


def _end_with(parent: int) -> None:
    """Ends this loader process soon after the training process, however that ends.

    PyTorch watches its parent, which is the forkserver; and that lives as long as any process that it has started.
    """

    def watch() -> None:
        while _runs(parent):
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def _runs(pid: int) -> bool:
    """Whether a process exists and is more than an entry that nobody has collected yet."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return not Path("/proc/self").exists()


@functools.cache
def _end_children_at_exit() -> None:
    """Arranges, once, that this process does not wait for loader processes that an error has left running.

    multiprocessing would send them a SIGTERM, to which they are deaf, and wait. They only read: nothing is lost.
    """

    def end() -> None:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would take it for a fault
        for child in multiprocessing.active_children():
            child.kill()

    atexit.register(end)  # after multiprocessing's own, and so called before it


def _why_worker_died(error: Exception) -> str:
    """What befell a loader process, from PyTorch's message; empty for an ordinary error raised inside one."""
    message = str(error)
    lines = message.strip().splitlines() or [type(error).__name__]
    if not isinstance(error, RuntimeError):  # the other end of the pipe is gone
        return f"died ({lines[0]})"
    if "exited unexpectedly" in message or "is killed by signal" in message:
        return f"died ({lines[0]})"
    if "shared memory" in message or "unable to resize file" in message or "No space left on device" in message:
        return f"has no shared memory left ({lines[-1]})"
    return ""


def _as_is(value):
    return value


def _shared(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An empty tensor; inside a loader process in shared memory, so that handing it over copies nothing."""
    empty = torch.empty(shape, dtype=dtype)
    return empty.share_memory_() if torch.utils.data.get_worker_info() else empty


def default_workers(source: Source, cores: int) -> int:
    """Loader processes for `config.data.workers=-1`: none for data in memory, else the cores but one, at most 16."""
    return 0 if source.in_memory else max(1, min(16, cores - 1))
