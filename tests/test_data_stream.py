"""Samples and draws are a pure function of (seed, step), at any world size and number of loader processes."""

from __future__ import annotations

import hashlib
import os
import pickle
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pcpvt import rng
from pcpvt.data import order, sources
from pcpvt.data.augment import AugmentSpec
from pcpvt.data.loader import EvalBatches, Loader, TrainBatches, default_workers, shared_workers
from pcpvt.data.shared import Samples
from pcpvt.data.sources import Arrays
from pcpvt.devices import base
from pcpvt.errors import UserError
from pcpvt.functional.mixing import MixSpec
from pcpvt.models import pcpvt
from pcpvt.runtime import session as sessions


def dataset(n: int = 50, size: int = 16) -> Arrays:
    draws = rng.generator(0, "test source")
    images = draws.integers(0, 256, (n, size, size, 3), dtype=np.uint8)
    return Arrays(images, np.arange(n) % 5, [str(i) for i in range(5)], "test")


def train_batches(rank: int = 0, world: int = 1, seed: int = 0, **options) -> TrainBatches:
    spec = AugmentSpec(size=(16, 16), crop_padding=2, hflip=0.5, erase_prob=0.5)
    rates = pcpvt.drop_rates(pcpvt.SPECS["pcpvt_nano"], 0.3)
    return TrainBatches(dataset(), spec, MixSpec(), rates, seed=seed, batch=16, rank=rank, world=world, **options)


def digest(batch: dict[str, torch.Tensor]) -> str:
    total = hashlib.sha256()
    for name in sorted(batch):
        total.update(name.encode() + batch[name].contiguous().numpy().tobytes())
    return total.hexdigest()


def joined(batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([b[name] for b in batches]) for name in batches[0]}


@settings(max_examples=40, deadline=None)
@given(examples=st.integers(2, 2000), repeats=st.integers(2, 4), seed=st.integers(0, 3))
def test_repeated_augmentation_draws_a_fraction_of_the_samples_with_distinct_keys(examples, repeats, seed):
    rows = order.epoch_order(seed, 0, examples, repeats)
    assert len(rows) == examples
    assert len({tuple(row) for row in rows}) == examples  # no draw occurs twice
    values, counts = np.unique(rows[:, 0], return_counts=True)
    assert counts.max() <= repeats and len(values) >= examples // repeats
    if examples >= repeats * order.BLOCK:
        assert (np.diff(rows[:, 0]) != 0).all()  # copies are never adjacent, where mixing would pair them


def test_epochs_and_seeds_are_ordered_differently():
    first, second = order.epoch_order(0, 0, 100), order.epoch_order(0, 1, 100)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, order.epoch_order(1, 0, 100))


@pytest.mark.parametrize("world", [2, 4])
def test_the_global_batch_is_the_same_at_any_world_size(world):
    for step in (0, 3, 7):  # step 3 spans the end of an epoch: 50 samples in batches of 16
        alone = train_batches()[step]
        parts = joined([train_batches(rank, world)[step] for rank in range(world)])
        assert digest(alone) == digest(parts)


def test_the_batches_are_the_same_with_0_1_and_3_workers():
    found = []
    for workers, early in ((0, False), (0, True), (1, False), (3, True)):
        loader = Loader(train_batches(), range(2, 8), workers)
        if early:
            loader.start()
        found.append([digest(batch) for batch in loader])
    assert found.count(found[0]) == 4
    assert len(set(found[0])) == 6
    assert [digest(batch) for batch in loader] == found[0]  # iterated again from the start


class Slow(TrainBatches):
    def __getitem__(self, step):
        time.sleep(0.05)
        return super().__getitem__(step)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_loader_measures_how_long_one_process_reads_a_batch(workers):
    slow = train_batches()
    slow.__class__ = Slow
    loader = Loader(slow, range(2), workers)
    for _ in loader:
        assert 0.05 <= loader.seconds < 5


def test_another_seed_changes_every_draw():
    first, second = train_batches(seed=0)[0], train_batches(seed=1)[0]
    for name in ("image", "id", "drop_path_scale", "lam"):
        assert not torch.equal(first[name], second[name]), name


def test_a_batch_has_the_documented_shapes_and_types():
    batch = train_batches()[0]
    assert {n: (tuple(t.shape), t.dtype) for n, t in batch.items()} == {
        "image": ((16, 16, 16, 3), torch.uint8),
        "label": ((16,), torch.int64),
        "id": ((16,), torch.int64),
        "drop_path_scale": ((16, 10), torch.float32),
        "lam": ((16,), torch.float32),
        "box": ((16, 4), torch.int32),
        "erase": ((16, 4), torch.int32),
    }
    labels = torch.from_numpy(dataset().labels)
    assert torch.equal(batch["label"], labels[batch["id"]])


def test_the_global_random_states_are_neither_read_nor_changed():
    import random

    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before = states()
    first = digest(next(iter(Loader(train_batches(), range(1), 0))))
    assert states() == before
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    assert digest(next(iter(Loader(train_batches(), range(1), 0)))) == first


class Broken(Arrays):
    """A dataset whose samples 3 and 4 are files that are not images."""

    def __init__(self, folder):
        whole = dataset()
        super().__init__(whole.images, whole.labels, whole.classes, whole.what)
        self.path = folder / "broken.jpg"
        self.path.write_bytes(b"this is no image")

    def __getitem__(self, index):
        return (str(self.path), int(self.labels[index])) if index in (3, 4) else super().__getitem__(index)


def test_an_unreadable_training_image_stops_or_is_replaced_by_the_next(tmp_path):
    batches = train_batches()
    batches.dataset = Broken(tmp_path)
    hits = [step for step in range(4) if {3, 4} & {d.index for d in batches.draws(step)}]
    with pytest.raises(UserError, match=r"test\[[34]\]: cannot be read.*config\.data\.on_error=skip$"):
        list(Loader(batches, hits, 0))
    with pytest.raises(UserError, match=r"test\[[34]\]: cannot be read"):  # the same line from a loader process
        list(Loader(batches, hits, 1))
    batches.on_error = "skip"
    for step in hits:
        drawn, used = [d.index for d in batches.draws(step)], batches[step]["id"].tolist()
        assert used == [5 if index in (3, 4) else index for index in drawn]


def test_evaluation_never_replaces_a_sample(tmp_path):
    broken = Broken(tmp_path)
    strict = EvalBatches(broken, (16, 16), 1.0, 8, 0, 1, "error")
    with pytest.raises(UserError, match=r"test\[[34]\]: cannot be read.*config\.data\.on_error=skip$"):
        strict[0]
    batch = EvalBatches(broken, (16, 16), 1.0, 8, 0, 1, "skip")[0]
    assert batch["id"].tolist() == list(range(8))
    assert batch["valid"].tolist() == [True, True, True, False, False, True, True, True]
    last = EvalBatches(broken, (16, 16), 1.0, 8, 0, 1, "skip")[6]
    assert last["valid"].tolist() == [True, True] + [False] * 6 and last["id"].tolist()[2:] == [-1] * 6


def test_in_memory_data_need_no_workers():
    assert default_workers(dataset(), 8) == 0
    on_disk = dataset()
    on_disk.in_memory = False
    assert [default_workers(on_disk, n) for n in (0, 1, 2, 8, 64)] == [0, 1, 1, 7, 16]


def test_loader_processes_of_a_training_are_no_more_than_cores(monkeypatch):
    on_disk = dataset()
    on_disk.in_memory = False
    found = {n: shared_workers(on_disk, on_disk, n) for n in range(200)}
    assert all(sum(workers) <= n for n, workers in found.items())
    assert [found[n] for n in (0, 1, 2, 4, 16, 24, 64)] == [(0, 0), (1, 0), (1, 1), (3, 1), (12, 4), (16, 8), (16, 16)]
    monkeypatch.setattr(base, "cores", lambda: 32)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    session = SimpleNamespace(config=SimpleNamespace(data=SimpleNamespace(workers=-1)))
    assert sessions.training_workers(session, on_disk, on_disk) == (3, 1)
    monkeypatch.setenv("PCPVT_CORES", "0,1,2,3 4,5,6,7")  # the process is bound to its share, and `cores` counts that
    monkeypatch.setattr(base, "cores", lambda: 4)
    assert sessions.training_workers(session, on_disk, on_disk) == (3, 1)
    for configured, workers in {0: (0, 0), 2: (2, 2), 3: (3, 1), 6: (6, 1)}.items():
        session.config.data.workers = configured
        assert sessions.training_workers(session, on_disk, on_disk) == workers


def test_loader_processes_share_the_list_of_samples(tmp_path):
    pairs = [(f"/data/{os.fsdecode(bytes([0xFF]))}é {i}.jpg", i % 7) for i in range(100)] + [("", 3)]
    samples = Samples(iter(pairs))
    assert list(samples) == pairs and samples[-1] == ("", 3) and len(samples) == 101
    assert samples.labels.tolist() == [label for _, label in pairs] and list(Samples([])) == []
    with pytest.raises(IndexError):
        samples[101]
    large = Samples((f"{i:050}", 0) for i in range(20_000))
    pickled = pickle.dumps(large)
    assert len(pickled) < 200  # a reference
    code = "import pickle, sys; x = pickle.load(sys.stdin.buffer); print(x[7], len(x), x.labels.sum())"
    done = subprocess.run([sys.executable, "-c", code], input=pickled, capture_output=True, check=True)
    assert done.stdout.decode().split()[0] == f"('{7:050}',"
    path = tmp_path / "train" / "a"
    path.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(path / "x.png")
    assert isinstance(sources.open_split("folder", str(tmp_path), "train", (8, 8)).samples, Samples)


def test_a_generator_depends_on_its_whole_key_only():
    keys = [(0, "a", 1), (1, "a", 1), (0, "b", 1), (0, "a", 2), (0, "a", 1, 0, 1), (0, "a")]
    values = [rng.generator(*key).random() for key in keys]
    assert len(set(values)) == len(keys)
    assert values == [rng.generator(*key).random() for key in keys]
