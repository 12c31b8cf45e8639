"""Every kind of dataset gives its images and labels, or a one-line error."""

from __future__ import annotations

import pickle
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from pcpvt.data import sources
from pcpvt.data.augment import AugmentSpec
from pcpvt.data.decode import DecodeError, Picture
from pcpvt.data.loader import EvalBatches, TrainBatches
from pcpvt.errors import UserError
from pcpvt.readers.splits import Splits

CLASSES = ["cat", "dog", "eel"]


@pytest.fixture
def folder(tmp_path):
    """train/ and val/ with three classes of four images of a single colour, which is the label."""
    for split in ("train", "val"):
        for label, name in enumerate(CLASSES):
            (tmp_path / split / name / "deeper").mkdir(parents=True)
            for i in range(4):
                sub = "deeper" if i == 3 else "."
                Image.new("RGB", (20, 16), (50 * label, i, 0)).save(tmp_path / split / name / sub / f"{i}.png")
    return tmp_path


def test_an_image_folder_has_sorted_classes_and_every_image_once(folder):
    (folder / "train" / "cat" / "notes.txt").write_text("no image")
    dataset = sources.open_split("folder", str(folder), "train", (16, 16))
    assert dataset.classes == CLASSES and len(dataset) == 12
    seen = [(Picture(dataset[i][0]).crop()[0, 0].tolist(), dataset[i][1]) for i in range(12)]
    assert sorted(seen) == sorted(([50 * label, i, 0], label) for label in range(3) for i in range(4))
    assert dataset.name(0).endswith("cat/0.png")


def test_a_torchvision_dataset_read_by_timm_gives_its_images(tmp_path):
    root = tmp_path / "cifar-10-batches-py"
    root.mkdir()
    pixels = np.arange(5 * 3072, dtype=np.uint32).astype(np.uint8).reshape(5, 3072)
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    for name in names:
        (root / name).write_bytes(pickle.dumps({"data": pixels, "labels": [0, 1, 2, 1, 0]}))
    (root / "batches.meta").write_bytes(pickle.dumps({"label_names": CLASSES}))
    import pcpvt.torchvision_compat  # noqa: F401 - before torchvision
    from torchvision.datasets import CIFAR10  # isort: skip

    original = CIFAR10._check_integrity
    CIFAR10._check_integrity, CIFAR10.meta = (lambda self: True), {**CIFAR10.meta, "md5": None}
    try:
        dataset = sources.open_split("torch/cifar10", str(tmp_path), "val", (32, 32))
    finally:
        CIFAR10._check_integrity = original
    assert len(dataset) == 5 and dataset.classes == CLASSES
    image, label = dataset[1]
    expected = pixels[1].reshape(3, 32, 32).transpose(1, 2, 0)
    assert label == 1 and np.array_equal(Picture(image).crop(), expected)
    assert dataset.name(1) == "torch/cifar10/validation[1]"  # CIFAR10 has an attribute `filename` that is a string


@pytest.fixture
def timm_opens(monkeypatch):
    """Replaces timm.data.create_dataset by a function of the test."""
    import pcpvt.torchvision_compat  # noqa: F401 - before timm
    import timm.data  # isort: skip

    return lambda make: monkeypatch.setattr(timm.data, "create_dataset", make)


class DecodesOnIndexing:
    """Like torchvision's datasets: indexing sample 2 raises Pillow's error."""

    class_to_idx = {"cat": 0, "dog": 1}  # noqa: RUF012

    def __len__(self):
        return 4

    def __getitem__(self, index):
        if index == 2:
            raise OSError("image file is truncated")
        return Image.new("RGB", (16, 16), (index, 0, 0)), index % 2


def test_on_error_applies_to_datasets_that_decode_on_indexing(timm_opens):
    timm_opens(lambda *_, **__: DecodesOnIndexing())
    dataset = sources.open_split("torch/pets", "", "val", (16, 16))
    named = r"torch/pets/validation\[2\]: cannot be read as an image \(OSError: image file is truncated\)"
    spec = AugmentSpec((16, 16), scale=(), hflip=0.0)
    for batches in (
        EvalBatches(dataset, (16, 16), 1.0, 4, 0, 1, "error"),
        TrainBatches(dataset, spec, None, np.zeros(2), seed=0, batch=4),
    ):
        with pytest.raises(UserError, match=named):
            batches[0]
        batches.on_error = "skip"
    batch = EvalBatches(dataset, (16, 16), 1.0, 4, 0, 1, "skip")[0]
    assert batch["valid"].tolist() == [True, True, False, True] and batch["id"].tolist() == [0, 1, 2, 3]
    assert batch["label"].tolist() == [0, 1, 0, 1]
    assert sorted(batches[0]["id"].tolist()) == [0, 1, 3, 3]


@pytest.mark.parametrize("name", ["hfids/pets", "wds/pets", "tfds/pets"])
def test_a_stream_is_refused_with_a_one_line_error(timm_opens, name):
    from timm.data.dataset import IterableImageDataset

    timm_opens(lambda *_, **__: IterableImageDataset("", reader=[(b"", 0)]))
    with pytest.raises(UserError, match=rf"config\.data\.name: '{name}' is a stream: use a reader") as caught:
        sources.open_split(name, "", "train", (16, 16))
    assert "\n" not in str(caught.value)


def test_a_missing_package_is_named_and_nothing_else_is_printed(timm_opens, capsys):
    def fails(*_, **__):
        print("Please install it.")
        raise ModuleNotFoundError("No module named 'scipy'", name="scipy")

    timm_opens(fails)
    with pytest.raises(UserError, match=r"config\.data\.name: 'torch/pets': .*: pip install scipy$"):
        sources.open_split("torch/pets", "", "train", (16, 16))
    assert capsys.readouterr().out == ""


class WithLabels(DecodesOnIndexing):
    """Without a class map; decoding any image fails, so labels must come from `targets`."""

    class_to_idx = None

    def __init__(self, targets):
        self.targets = targets

    def __getitem__(self, index):
        raise AssertionError("decoded")


def test_classes_are_counted_without_decoding(timm_opens):
    timm_opens(lambda *_, **__: WithLabels([0, 2, 1, 2]))
    dataset = sources.open_split("torch/pets", "", "train", (16, 16))
    assert dataset.classes == ["0", "1", "2"] and dataset.labels.tolist() == [0, 2, 1, 2]
    timm_opens(lambda *_, **__: WithLabels(None))
    with pytest.raises(UserError, match="tells neither class names nor labels without decoding"):
        sources.open_split("torch/pets", "", "train", (16, 16))


@pytest.mark.parametrize(
    ("kept", "labels"),
    [
        ({"targets": np.array([[3, 9], [1, 9], [0, 9], [2, 9]])}, [3, 1, 0, 2]),  # QMNIST's
        ({"index": [(1, "a"), (0, "b"), (1, "c"), (0, "d")]}, [1, 0, 1, 0]),  # iNaturalist's
        ({"samples": [("a", 1), ("b", 0), ("c", 1), ("d", 0)]}, [1, 0, 1, 0]),  # ImageFolder's
    ],
)
def test_labels_are_found_as_torchvision_keeps_them(timm_opens, kept, labels):
    data = WithLabels(None)
    vars(data).update(kept)
    timm_opens(lambda *_, **__: data)
    assert sources.open_split("torch/pets", "", "train", (16, 16)).labels.tolist() == labels


def test_splits_of_torchvisions_datasets_are_obeyed_or_refused(timm_opens):
    asked = []
    timm_opens(lambda *_, split, **__: asked.append(split) or DecodesOnIndexing())
    for split, wanted in (("train", Splits()), ("val", Splits()), ("val", Splits(val="test"))):
        assert sources.open_split("torch/cifar10", "", split, (16, 16), wanted=wanted).split == asked[-1]
    assert asked == ["train", "validation", "test"]
    with pytest.raises(UserError, match=r"val_split: 'tset': 'torch/cifar10' has the splits train and test"):
        sources.open_split("torch/cifar10", "", "val", (16, 16), wanted=Splits(val="tset"))
    with pytest.raises(UserError, match=r"4 of the 4 validation images \(train\)"):
        sources.open_training("torch/cifar10", "", (16, 16), wanted=Splits(val="train"))
    with pytest.raises(UserError, match=r"image folders are read with config\.data\.name=folder"):
        sources.open_split("torch/folder", "", "val", (16, 16))


@pytest.mark.parametrize("label", [-1, 2, 0.5, None, [0, 1]])
def test_a_label_that_is_none_is_no_fault_of_the_image_and_never_skipped(timm_opens, label):
    class Wrong(DecodesOnIndexing):
        def __getitem__(self, index):
            return Image.new("RGB", (16, 16)), label if index == 1 else 0

    timm_opens(lambda *_, **__: Wrong())
    dataset = sources.open_split("torch/pets", "", "val", (16, 16))
    named = re.escape(f"torch/pets/validation[1]: its label {label!r} is not one of the numbers from 0 to 1")
    for on_error in ("error", "skip"):
        with pytest.raises(UserError, match=named) as caught:
            EvalBatches(dataset, (16, 16), 1.0, 4, 0, 1, on_error)[0]
        assert not isinstance(caught.value, DecodeError)


def test_the_digits_are_scikit_learns():
    expected = pytest.importorskip("sklearn.datasets").load_digits()
    grey = np.round(expected.images * (255 / 16)).astype(np.uint8)
    splits = [sources.open_split("digits", "", split, (8, 8)) for split in ("train", "val")]
    ours = [
        (image[..., 0].tobytes(), label)
        for split in splits
        for image, label in zip(split.images, split.labels, strict=True)
    ]
    assert sorted(ours) == sorted((image.tobytes(), label) for image, label in zip(grey, expected.target, strict=True))


def test_the_digits_are_split_evenly_by_class_and_without_overlap():
    train, val = (sources.open_split("digits", "", split, (32, 32)) for split in ("train", "val"))
    assert len(train) + len(val) == 1797 and len(val) == 364
    assert train.classes == val.classes == [str(i) for i in range(10)]
    counts = np.bincount(val.labels) / (np.bincount(val.labels) + np.bincount(train.labels))
    assert counts.min() > 0.19 and counts.max() < 0.21
    assert train.images.shape == (1433, 32, 32, 3) and train.images.dtype == np.uint8
    seen = {image.tobytes() for image in train.images}
    assert sum(image.tobytes() in seen for image in val.images) == 0


def test_digits_at_another_size_are_enlarged():
    assert sources.open_split("digits", "", "val", (48, 64)).images.shape[1:] == (48, 64, 3)


def test_synthetic_images_have_the_requested_size_and_classes():
    dataset = sources.open_split("synthetic", "", "train", (24, 40), 7)
    image, label = dataset[3]
    assert image.shape == (24, 40, 3) and 0 <= label < 7 and len(dataset.classes) == 7


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda root: None, "has no splits, none for training"),
        (lambda root: (root / "train").mkdir(), "holds no class folders"),
        (lambda root: (root / "train" / "cat").mkdir(parents=True), "cat: no images in this class folder"),
    ],
)
def test_a_missing_or_empty_folder_is_named(tmp_path, make, words):
    make(tmp_path)
    with pytest.raises(UserError, match=words):
        sources.open_split("folder", str(tmp_path), "train", (16, 16))


def test_a_missing_path_and_unknown_names_are_one_line_errors():
    with pytest.raises(UserError, match=r"config.data.path: not set"):
        sources.open_split("folder", "", "train", (16, 16))
    for name in ("torch/nothing", "hfds/", "nothing/at/all"):
        with pytest.raises(UserError, match=r"config\.data\.name") as caught:
            sources.open_split(name, "", "train", (16, 16))
        assert "\n" not in str(caught.value)


def test_validation_may_lack_classes_but_not_have_others(folder):
    shutil.rmtree(folder / "val" / "cat")
    for path in (folder / "val" / "eel").rglob("*.png"):
        path.unlink()
    train, val = sources.open_training("folder", str(folder), (16, 16))
    assert val.classes == train.classes == CLASSES and sources.absent(val) == ["cat", "eel"]
    assert [val[i][1] for i in range(4)] == [1, 1, 1, 1]  # the label of "dog" in training
    (folder / "val" / "dog").rename(folder / "val" / "ox")
    with pytest.raises(UserError, match=r"val has images of 1 class \(ox\) that the training images lack"):
        sources.open_training("folder", str(folder), (16, 16))


def test_one_class_is_an_error(folder):
    for name in CLASSES[1:]:
        shutil.rmtree(folder / "train" / name)
    with pytest.raises(UserError, match="the training images have one class, 'cat'"):
        sources.open_training("folder", str(folder), (16, 16))
