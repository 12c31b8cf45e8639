"""CSV manifests as data: paths, labels, splits, and one-line errors for what is wrong in them."""

from __future__ import annotations

import pytest
from PIL import Image

from pcpvt.data import sources
from pcpvt.errors import UserError
from pcpvt.readers.manifest import Columns
from pcpvt.readers.splits import Splits


@pytest.fixture
def write(tmp_path):
    """Writes a manifest beside a.png ... d.png; returns its path."""
    for name in "abcd":
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.new("RGB", (20, 16)).save(tmp_path / "images" / f"{name}.png")

    def write(text: str, encoding="utf-8") -> str:
        (tmp_path / "data.csv").write_text(text, encoding=encoding)
        return str(tmp_path / "data.csv")

    return write


def training(path, columns=Columns(), **wanted):  # noqa: B008 - immutable
    return sources.open_training("folder", path, (16, 16), wanted=Splits(**wanted), columns=columns)


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_rows_become_samples_of_their_split(write, tmp_path, delimiter, encoding):
    rows = ["path,label,split", "images/a.png,dog,train", "images/b.png,cät,train", "", "images/c.png,dog,Valid"]
    path = write("\n".join([*rows, f"{tmp_path}/images/d.png,cät,test"]).replace(",", delimiter), encoding)
    train, val = training(path)
    assert train.classes == val.classes == ["cät", "dog"] and (train.split, val.split) == ("train", "Valid")
    assert [train[i] for i in range(2)] == [(f"{tmp_path}/images/a.png", 1), (f"{tmp_path}/images/b.png", 0)]
    assert [val[i] for i in range(len(val))] == [(f"{tmp_path}/images/c.png", 1)]
    test = sources.open_split("folder", path, "val", (16, 16), wanted=Splits(val="test"))
    assert test.split == "test" and test[0] == (f"{tmp_path}/images/d.png", 0)


def test_columns_may_have_other_names_and_a_manifest_no_splits(write):
    path = write("id,breed\n" + "".join(f"images/{name}.png,{name in 'ab'}\n" for name in "abcd"))
    with pytest.raises(UserError, match=r"image_column: .* has no column path or .*: its columns are id, breed"):
        training(path)
    named = Columns("ID", "breed")
    with pytest.raises(UserError, match=r"train_split: .* has no splits, .*config\.data\.val_fraction=0\.2"):
        training(path, named)
    train, val = training(path, named, fraction=0.5)
    assert (len(train), len(val), val.split) == (2, 2, "50% of all")
    assert len(sources.open_split("folder", path, "val", (16, 16), wanted=Splits(val="."), columns=named)) == 4


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("path,label\nimages/a.png,\n", r"data\.csv:2: label is empty"),
        ("path,label\n,cat\n", r"data\.csv:2: path is empty"),
        ("path,label,split\nimages/a.png,cat\n", r"data\.csv:2: split is empty"),
        ("path,label\n", "has no rows below its header"),
        ("", "its columns are none"),
        ("a,b\nc,d\n", "its columns are a, b"),
        ("path,label\na.png,x\na.png,y\n", "a.png has two labels"),
        ("path,label,split\na.png,x,train\nb.png,y,train\na.png,x,val\n", "1 of the 1 validation images"),
        ("path,label,split\na.png,x,train\nb.png,y,train\n", "val_split: .* has the splits train, none for validation"),
    ],
)
def test_what_is_wrong_is_named(write, text, said):
    with pytest.raises(UserError, match=said) as caught:
        training(write(text))
    assert "\n" not in str(caught.value)


def test_a_column_field_is_refused_where_there_are_no_columns(tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match=r"config\.data\.label_column: 'x': only manifests and hfds/"):
        training(str(tmp_path), Columns("", "x"))
