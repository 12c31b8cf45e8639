"""The balanced sampler: equal classes, a pure function of seed and epoch, the same at any world size and resume."""

from __future__ import annotations

import dataclasses

import miniature
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pcpvt.data import order
from pcpvt.data.augment import AugmentSpec
from pcpvt.data.loader import Loader, TrainBatches
from pcpvt.data.sources import Arrays
from pcpvt.distributed.signals import PREEMPTED
from pcpvt.functional.mixing import MixSpec

LABELS = np.repeat([0, 1, 2, 5], [37, 9, 3, 1]).astype(np.int32)  # the data have no sample of 3 and 4


@settings(max_examples=40, deadline=None)
@given(counts=st.lists(st.integers(0, 60), min_size=1, max_size=8), seed=st.integers(0, 3), epoch=st.integers(0, 3))
def test_classes_and_samples_of_a_class_are_equally_frequent(counts, seed, epoch):
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts)).astype(np.int32)
    if not len(labels):
        return
    rows = order.epoch_order(seed, epoch, len(labels), 1, order.Balance(labels))
    assert rows.shape == (len(labels), 2) and len({tuple(row) for row in rows}) == len(rows)  # no draw occurs twice
    frequency = np.bincount(labels[rows[:, 0]], minlength=len(counts))[np.array(counts) > 0]
    assert frequency.max() - frequency.min() <= 1
    for label in np.unique(labels):
        uses = np.bincount(rows[:, 0], minlength=len(labels))[labels == label]
        assert uses.max() - uses.min() <= 1
    for index in np.unique(rows[:, 0]):
        copies = rows[rows[:, 0] == index, 1]
        assert sorted(copies) == list(range(len(copies)))


def test_the_order_is_a_function_of_seed_and_epoch():
    orders = [order.epoch_order(s, e, 50, 1, order.Balance(LABELS)).tobytes() for s in (0, 1) for e in (0, 1)]
    assert len(set(orders)) == 4
    assert orders == [order.epoch_order(s, e, 50, 1, order.Balance(LABELS)).tobytes() for s in (0, 1) for e in (0, 1)]


def batches(rank: int = 0, world: int = 1) -> TrainBatches:
    images = np.random.default_rng(0).integers(0, 256, (len(LABELS), 16, 16, 3), dtype=np.uint8)
    data = Arrays(images, LABELS, [str(i) for i in range(6)], "test")
    spec = AugmentSpec((16, 16), crop_padding=2, erase_prob=0.5)
    return TrainBatches(
        data, spec, MixSpec(), np.zeros(2), seed=0, batch=16, rank=rank, world=world, labels=LABELS
    )  # fmt: skip


@pytest.mark.parametrize("world", [2, 4])
def test_a_global_batch_is_the_same_at_any_number_of_processes(world):
    for step in (0, 3, 7):  # step 3 spans two epochs
        alone = batches()[step]
        parts = [batches(rank, world)[step] for rank in range(world)]
        assert all(torch.equal(alone[name], torch.cat([part[name] for part in parts])) for name in alone)
    assert [batch["id"].tolist() for batch in Loader(batches(), range(2, 5), 1)] == [
        batches()[step]["id"].tolist() for step in range(2, 5)
    ]


def test_the_copies_of_a_sample_are_augmented_differently():
    rare = [(step, row) for step in range(3) for row, i in enumerate(batches()[step]["id"].tolist()) if i == 49]
    images = {batches()[step]["image"][row].numpy().tobytes() for step, row in rare}
    assert len(rare) > 6 and len(images) > 0.7 * len(rare)
    plain = dataclasses.replace(batches(), labels=None)
    assert sum(plain[step]["id"].tolist().count(49) for step in range(3)) <= 1


@pytest.mark.slow
def test_a_balanced_run_goes_on_with_another_number_of_processes(tmp_path):
    data = miniature.image_folder(tmp_path / "data")
    for path in (data / "train" / "cat").glob("1*.png"):
        path.unlink()  # 9 cats and 16 dogs
    options = {"data__path": data, "data__sampler": "balanced", "data__workers": 0, "image_size": 32, "batch_size": 8}
    words = miniature.words(tmp_path / "b", "cpu2,folder", **options)
    cut = miniature.run(words, {"at": "step", "n": 5, "do": "SIGTERM", "rank": 0})
    assert cut.code == PREEMPTED, cut.err
    ended = miniature.run(miniature.words(tmp_path / "b", "cpu,folder", **options))
    assert ended.code == 0 and miniature.newest(tmp_path / "b").meta["step"] == 12, ended.err


def test_a_run_that_is_cut_is_bit_for_bit_the_whole_one(tmp_path):
    data = miniature.image_folder(tmp_path / "data")
    (data / "train" / "cat" / "0.png").unlink()
    options = {"data__path": data, "data__sampler": "balanced", "data__workers": 0, "image_size": 32, "batch_size": 8}
    whole = miniature.words(tmp_path / "a", "cpu,folder", **options)
    parts = miniature.words(tmp_path / "b", "cpu,folder", **options)
    assert miniature.run(whole).code == 0
    assert miniature.run(parts, {"at": "step", "n": 5, "do": "SIGTERM"}).code == PREEMPTED
    assert miniature.run(parts).code == 0
    miniature.assert_same_run(tmp_path / "b", tmp_path / "a")
    refused = miniature.run([*parts, "--config.data.sampler=uniform", "--config.steps=13"])
    assert refused.code == 2 and "config.data.sampler" in refused.error
    assert "config.augment.repeats" in miniature.refusal([*whole, "--config.augment.repeats=2"])
