"""Hugging Face sets: columns, splits and labels, on a stand-in for the package `datasets` and on the package itself."""

from __future__ import annotations

import io
import pickle
import sys
import tempfile
from pathlib import Path

import miniature
import numpy as np
import pytest
from PIL import Image

from pcpvt.data import sources
from pcpvt.data.decode import Picture
from pcpvt.data.loader import EvalBatches, Loader
from pcpvt.errors import UserError
from pcpvt.readers.manifest import Columns
from pcpvt.readers.splits import Splits

STANDIN = Path(__file__).parent / "datasets_standin"


@pytest.fixture
def datasets(monkeypatch):
    """The stand-in in place of the package."""
    monkeypatch.setitem(sys.modules, "datasets", None)
    del sys.modules["datasets"]
    monkeypatch.syspath_prepend(str(STANDIN))
    import datasets

    datasets.opened.clear()
    yield datasets
    sys.modules.pop("datasets")


def opened(split="train", name="hfds/pets", columns=Columns(), **wanted):  # noqa: B008 - immutable
    return sources.open_split(name, "", split, (16, 16), wanted=Splits(**wanted), columns=columns)


def test_images_and_labels_are_found_by_name_or_type(datasets):
    dataset = opened()
    assert dataset.classes == ["dog", "cat"] and dataset.labels.tolist() == [0, 1] * 4
    image, label = dataset[3]
    assert Picture(image).crop()[0, 0].tolist() == [3, 0, 0] and label == 1
    assert dataset.name(3) == "hfds/pets/train[3]"
    named = opened(name="hfds/odd")  # columns called x, y: the only ones of their types
    assert named.classes == ["dog", "cat"] and Picture(named[3][0]).crop()[0, 0].tolist() == [3, 0, 0]
    assert opened(columns=Columns("", "text")).classes == ["a", "b"]
    assert opened(columns=Columns("", "flag")).classes == ["False", "True"]
    assert opened(columns=Columns("", "number")).classes == ["0", "1", "2"]
    assert datasets.decoded == 0


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        (
            Columns("picture"),
            r"image_column: 'picture': no such column in 'hfds/pets': its columns are img \(Image\), lab",
        ),
        (Columns("", "y"), r"label_column: 'y': no such column .* text \(string\)"),
        (Columns("number"), r"image_column: 'number' of 'hfds/pets' holds no images .* img \(Image\)"),
        (Columns("", "score"), r"hfds/pets/train\[0\]: its label 0\.5 is not one of .*label_column"),
        (Columns("", "several"), r"hfds/pets/train\[0\]: its label \[0, 1\] is not one"),
        (Columns("", "gaps"), r"hfds/pets/train\[2\]: its label None is no class name"),
        (Columns("", "unknown"), r"hfds/pets/train\[5\]: its label -1 is not one of the numbers from 0 to 1: .*split"),
    ],
)
def test_wrong_columns_and_labels_are_named_with_what_there_is(datasets, columns, said):
    with pytest.raises(UserError, match=said) as caught:
        opened(columns=columns)
    assert "\n" not in str(caught.value)


def test_splits_are_found_given_or_listed(datasets):
    assert (opened("val").split, len(opened("val"))) == ("test", 4)
    assert (len(opened("val", val="train[75%:]")), len(opened("train", train="train[:75%]"))) == (2, 6)
    assert len(opened("val", val=".")) == 12
    with pytest.raises(UserError, match=r"val_split: 'tset': 'hfds/pets' has the splits train, test: name one"):
        opened("val", val="tset")
    with pytest.raises(UserError, match=r"'hfds/odd' has the splits train, none for validation.*val_fraction=0\.2"):
        opened("val", name="hfds/odd")
    train, val = sources.open_training("hfds/odd", "", (16, 16), wanted=Splits(fraction=0.25))
    assert (len(train), len(val), val.split) == (6, 2, "25% of train")


def test_parts_that_overlap_are_refused(datasets):
    def training(**wanted):
        return sources.open_training("hfds/pets", "", (16, 16), wanted=Splits(**wanted))

    with pytest.raises(
        UserError, match=r"2 of the 2 validation images \(train\[75%:\]\) are training images \(train\)"
    ):
        training(val="train[75%:]")
    assert [len(part) for part in training(train="train[:75%]", val="train[75%:]")] == [6, 2]
    assert [len(part) for part in training()] == [8, 4]


def test_a_set_that_cannot_be_opened_and_a_missing_package_are_one_line(datasets, monkeypatch):
    with pytest.raises(
        UserError, match=r"'hfds/none': cannot be opened \(no set none on the Hub\): check the name"
    ) as e:
        opened(name="hfds/none")
    assert "\n" not in str(e.value)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"config\.data\.name: 'hfds/pets': needs datasets: pip install datasets$"):
        opened()


def test_a_run_opens_a_set_once_for_all_loader_processes(tmp_path):
    env = {"PYTHONPATH": f"{miniature.FAULTS}:{STANDIN}:{miniature.ROOT}", "OPENED": str(tmp_path / "opened")}
    words = miniature.words(
        tmp_path / "run", "cpu,folder", data__name="hfds/pets", data__workers=2, steps=2, batch_size=4, image_size=32,
        eval_every="2 steps",
    )  # fmt: skip
    done = miniature.run(words, env=env, cold=True)
    assert done.code == 0 and "splits: train to train on, test to evaluate on" in done.out, done.err
    pids = (tmp_path / "opened").read_text().split()
    assert len(pids) == 2 and len(set(pids)) == 1  # the training and the test split


def test_the_package_itself(tmp_path):
    datasets = pytest.importorskip("datasets")
    place = tempfile.TemporaryDirectory(prefix="pets")  # the package takes "test" in a path for the name of a split
    folder = place.name
    features = datasets.Features({"img": datasets.Image(), "labels": datasets.ClassLabel(names=["dog", "cat"])})
    pictures = []
    for i in range(8):
        out = io.BytesIO()
        Image.new("RGB", (16, 16), (i, 0, 0)).save(out, "PNG")
        pictures.append({"bytes": out.getvalue(), "path": None})
    table = datasets.Dataset.from_dict({"img": pictures, "labels": [0, 1] * 4}, features=features)
    table.to_parquet(f"{folder}/train.parquet")
    wanted = Splits("train[:75%]", "train[75%:]")
    train, val = sources.open_training(f"hfds/{folder}", str(tmp_path / "cache"), (16, 16), wanted=wanted)
    assert train.labels.tolist() == [0, 1] * 3 and val.classes == ["dog", "cat"]
    assert [Picture(image).crop()[0, 0, 0] for image, _ in val] == [6, 7]
    assert len(pickle.dumps(train)) < 10_000  # its memory map, not its images
    batches = EvalBatches(train, (16, 16), 1.0, 3, 0, 1, "error")
    alone, shared = ([b["image"].numpy().copy() for b in Loader(batches, range(2), n)] for n in (0, 1))
    assert np.array_equal(alone, shared)
    with pytest.raises(UserError, match="has the splits train, none for validation"):
        opened("val", f"hfds/{folder}")
