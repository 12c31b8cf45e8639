"""Several labels per image from manifests and Hugging Face sets, as multi-hot rows, and what is refused."""

from __future__ import annotations

import collections
import pickle

import numpy as np
import pytest
from PIL import Image
from test_huggingface import datasets  # noqa: F401 - a fixture

from pcpvt.checkpoints import labels as matching
from pcpvt.config.fields import base
from pcpvt.data import classes, sources
from pcpvt.data.arrays import Arrays
from pcpvt.data.label_sets import LabelSets, strata
from pcpvt.data.loader import EvalBatches, Loader
from pcpvt.errors import UserError
from pcpvt.readers.manifest import Columns
from pcpvt.readers.splits import Splits
from pcpvt.train import class_weights

SEVERAL = Columns(several=True)


@pytest.fixture
def write(tmp_path):
    """Writes a manifest beside 0.png ... 9.png; returns its path."""
    for i in range(10):
        Image.new("RGB", (20, 16), (i, 0, 0)).save(tmp_path / f"{i}.png")

    def write(text: str) -> str:
        (tmp_path / "data.csv").write_text(text)
        return str(tmp_path / "data.csv")

    return write


def training(path, columns=SEVERAL, **wanted):
    return sources.open_training("folder", path, (16, 16), wanted=Splits(**wanted), columns=columns)


def rows(dataset) -> list[list[str]]:
    return [[dataset.classes[i] for i in np.flatnonzero(dataset[n][1])] for n in range(len(dataset))]


TEXT = "path,label,split\n0.png,sea;sky,train\n1.png, ,train\n2.png,sky ; sky;,train\n3.png,tree,val\n4.png,,val\n"


def test_a_cell_holds_any_number_of_labels(write):
    train, val = training(write(TEXT))
    assert train.classes == val.classes == ["sea", "sky", "tree"]
    assert rows(train) == [["sea", "sky"], [], ["sky"]] and rows(val) == [["tree"], []]
    assert train.counts.tolist() == [1, 2, 0] and sources.absent(train) == ["tree"]
    assert train[0][1].dtype == np.float32 and train.name(1).endswith("/1.png")
    assert (train.split, val.split) == ("train", "val")
    semicolons = write(TEXT.replace(",", "\t"))
    assert rows(training(semicolons)[0]) == rows(train)
    assert rows(pickle.loads(pickle.dumps(train))) == rows(train)


def test_batches_hold_multi_hot_rows_whoever_reads_them(write):
    batches = EvalBatches(training(write(TEXT))[0], (16, 16), 1.0, 2, 0, 1, "error")
    alone, shared = ([b["label"].tolist() for b in Loader(batches, range(2), n)] for n in (0, 1))
    assert alone == shared == [[[1, 1, 0], [0, 0, 0]], [[0, 1, 0], [0, 0, 0]]]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("path,label\n0.png,\n1.png,;\n", "none of the 1 images .* has a label"),
        ("path,label,split\n0.png,a,train\n1.png,,val\n", r"none of the 1 images \(val\) has a label"),
        ("path,label\n0.png,a\n0.png,b\n", "0.png has two labels: write all its labels into one row"),
        ("path,label\n,a\n", "path is empty"),
    ],
)
def test_what_is_wrong_in_a_manifest_is_one_line(write, text, said):
    with pytest.raises(UserError, match=said) as caught:
        training(write(text), **({} if "split" in text else {"fraction": 0.5}))
    assert "\n" not in str(caught.value)


def test_one_label_per_image_with_semicolons_is_a_warning(write):
    train, _ = training(write(TEXT.replace(", ,", ",sea,").replace(",,", ",sea,")), Columns())
    assert train.classes == ["sea", "sea;sky", "sky ; sky;", "tree"]
    (remark,) = train.remarks
    assert "2 labels such as 'sea;sky' are taken for one class each: for several labels per image set config." in remark


@pytest.mark.parametrize("name", ["folder", "tar", "digits", "torch/mnist"])
def test_sources_of_one_label_are_refused(name, tmp_path):
    with pytest.raises(UserError, match=r"config\.task: multilabel: .* gives one label per image: give config\.data\."):
        sources.open_split(name, str(tmp_path), "val", (16, 16), columns=SEVERAL)


def test_a_held_out_part_has_its_share_of_every_rarest_label(write):
    cells = ["common;rare"] * 2 + ["common"] * 4 + [""] * 4
    path = write("path,label\n" + "".join(f"{i}.png,{cell}\n" for i, cell in enumerate(cells)))
    train, val = training(path, fraction=0.5)
    assert collections.Counter(map(str, rows(val))) == {"['common', 'rare']": 1, "['common']": 2, "[]": 2}
    assert (len(train), val.split) == (5, "50% of all") and train.counts.tolist() == val.counts.tolist() == [3, 1]
    again = sources.open_split("folder", path, "val", (16, 16), wanted=Splits(fraction=0.5), columns=SEVERAL)
    assert [again.name(i) for i in range(5)] == [val.name(i) for i in range(5)] and rows(again) == rows(val)
    assert strata(np.array([0, 1, 2, 2]), [(0, 1), (0,), ()], 2).tolist() == [1, 0, -1, -1]


def opened(columns, split="train"):
    return sources.open_split("hfds/scenes", "", split, (16, 16), columns=columns)


def test_lists_of_a_hugging_face_set(datasets):  # noqa: F811
    tags = opened(Columns("", "tags", True))
    assert tags.classes == ["dog", "cat"] and rows(tags)[:4] == [[], ["dog"], ["dog", "cat"], ["cat"]]
    words = opened(Columns("", "words", True))
    assert words.classes == ["sea", "sky"] and rows(words)[:3] == [["sea"], ["sea", "sky"], []]
    assert datasets.decoded == 0
    with pytest.raises(UserError, match=r"scenes/train\[0\]: its labels 'sea' are no list, as config\.task=multilabel"):
        opened(Columns("", "caption", True))
    with pytest.raises(UserError, match=r"scenes/train\[1\]: its labels None are no list"):
        opened(Columns("", "holes", True))
    with pytest.raises(UserError, match=r"scenes/train\[0\]: its label \[\] .* set config\.task=multilabel for lists"):
        opened(Columns("", "tags"))


def whole(write) -> LabelSets:
    return training(write(TEXT))[0]


def test_other_orders_and_class_maps_move_the_columns(write, tmp_path):
    (tmp_path / "map").write_text("sky\tabove\ntree\tbelow\nsea\tbelow\n")
    merged = classes.arrange(whole(write), "auto", str(tmp_path / "map"))
    assert merged.classes == ["above", "below"] and rows(merged) == [["above", "below"], [], ["above"]]
    val = training(write("path,label,split\n0.png,b,train\n1.png,a10;a9,train\n2.png,a9;b,val\n"))[1]
    assert classes.arrange(val, "natural", "").classes == ["a9", "a10", "b"]
    assert rows(classes.arrange(val, "natural", "")) == [["a9", "b"]]


def matched(dataset, names, outputs=None):
    class Loaded:
        path, classes = "weights", names

    Loaded.outputs = outputs or len(names)
    return matching.match(Loaded, dataset, base())


def test_labels_are_matched_to_the_models_by_name(write):
    dataset = whole(write)
    found = matched(dataset, ["zebra", "sky", "tree"])
    assert found.dataset.classes == ["zebra", "sky", "tree"] and rows(found.dataset) == [["sky"], [], ["sky"]]
    assert found.left_out == {"sea": 1}
    assert [w.partition(" (")[0] for w in found.warnings] == [
        "weights: does not know 1 classes of the data", "weights: 1 of its 3 classes"
    ]  # fmt: skip
    assert "1 labels are left out, the images stay" in found.warnings[0]
    same = matched(dataset, ["sea", "sky", "tree"])
    assert rows(same.dataset) == rows(dataset) and not same.warnings
    wider = matched(dataset, ["sea", "sky", "tree", "zebra"])
    assert wider.dataset[0][1].tolist() == [1, 1, 0, 0] and "(zebra) are no labels of the data" in wider.warnings[0]
    with pytest.raises(UserError, match="none of those"):
        matched(dataset, ["x", "y", "z"])


def test_unequal_classes_are_a_warning_that_names_map():
    numbers = np.repeat([0, 1, 2], [18, 2, 2])
    images = Arrays(np.zeros((22, 2, 2, 3), np.uint8), numbers, ["-"] * 3, "x")
    found = class_weights.of_run("none", LabelSets(images, [(0,), (0, 1), (0,)], ["a", "b"]), 2)
    (text,) = found.warnings
    assert "differ 11-fold in number: a has 22 training images, b 2" in text
    assert "judge by map" in text and "balanced" not in text
    assert class_weights.of_run("none", LabelSets(images, [(0,), (0, 1), (1,)], ["a", "b"]), 2).warnings == []


def test_synthetic_images_for_benchmarks_have_a_label_each():
    noise = sources.open_split("synthetic", "", "train", (16, 16), 5, columns=SEVERAL)
    assert noise[0][1].shape == (5,) and all(noise[i][1].sum() == 1 for i in range(9))
