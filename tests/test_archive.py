"""Tar archives: the same images, labels and order as timm's reader; WebDataset's labels; no index that can be stale."""

from __future__ import annotations

import io
import os
import tarfile

import numpy as np
import pytest
from PIL import Image

from pcpvt.data import sources
from pcpvt.data.decode import Picture
from pcpvt.data.loader import EvalBatches, Loader
from pcpvt.errors import UserError
from pcpvt.readers.splits import Splits


def png(color=(0, 0, 0), format="PNG") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (20, 16), color).save(out, format)
    return out.getvalue()


def pack(path, members: dict[str, bytes]):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def packed(members: dict[str, bytes], tmp_path) -> bytes:
    return pack(tmp_path / "inner" / "inner.tar", members).read_bytes()


def classes(*names, prefix="", count=11):
    """Members of one colour each; in natural order 2 comes before 10."""
    return {f"{prefix}{n}/{i}.png": png((50 * c, i, 9)) for c, n in enumerate(names) for i in range(count)}


def opened(path, split="train", **wanted):
    return sources.open_split("tar", str(path), split, (16, 16), wanted=Splits(**wanted))


@pytest.mark.parametrize("form", ["one", "dotted", "one per class", "nested", "long names"])
def test_images_labels_and_order_are_timms(tmp_path, form):
    import pcpvt.torchvision_compat  # noqa: F401 - before timm
    from timm.data.readers.reader_image_in_tar import ReaderImageInTar  # isort: skip

    names, file = ("cat10", "cat2", "Dog"), tmp_path / "train.tar"
    if form == "one per class":
        file = tmp_path / "train"
        for i, name in enumerate(names):
            pack(file / f"{name}.tar", {f"{name}_{k}.png": png((i, k, 3)) for k in range(4)})
    elif form == "nested":
        pack(file, {f"{n}.tar": packed({f"{n}_{k}.png": png((i, k, 3)) for k in range(4)}, tmp_path)
                    for i, n in enumerate(names)})  # fmt: skip
    else:
        pack(file, classes(*names, prefix={"dotted": "./", "long names": "x" * 120 + "/"}.get(form, "")))
    ours, theirs = opened(tmp_path), ReaderImageInTar(str(file))
    assert len(ours) == len(theirs) > 0
    assert ours.classes == sorted(theirs.class_name_to_idx, key=theirs.class_name_to_idx.get)
    for (image, label), index in zip((ours[i] for i in range(len(ours))), range(len(ours)), strict=True):
        file, target = theirs[index]
        assert image == file.read() and label == target
    batches = EvalBatches(ours, (16, 16), 1.0, 5, 0, 1, "error")
    alone = [b["image"].sum().item() for b in Loader(batches, range(3), 0)]
    assert alone == [b["image"].sum().item() for b in Loader(batches, range(3), 1)]  # pickled to a worker


def test_members_that_are_no_data_or_no_images(tmp_path):
    more = {"cat/._0.png": b"", "__MACOSX/cat/0.png": b"", ".git/x.png": b"", "cat/a.bmp": png(format="BMP"),
            "cat/b.jfif": png(format="JPEG"), "cat/c.xyz": b"", "cat/d.json": b""}  # fmt: skip
    dataset = opened(pack(tmp_path / "train.tar", classes("cat", "dog", count=2) | more).parent)
    assert dataset.classes == ["cat", "dog"] and dataset.labels.tolist() == [0] * 4 + [1] * 2
    assert dataset.remarks == [f"{tmp_path}/train.tar: left out 2 files: 1 .json, 1 .xyz"]
    assert all(Picture(image).crop().shape == (16, 20, 3) for image, _ in dataset)
    assert dataset.name(0) == f"{tmp_path}/train.tar:cat/0.png"


def test_labels_of_webdataset_are_read(tmp_path):
    for shard in range(2):
        pack(
            tmp_path / f"train-{shard:04d}.tar",
            {f"{shard}{i:03d}.{ext}": content for i in range(6)
             for ext, content in (("seg.png", png((i, 0, 0))), ("cls", str(i % 3).encode()))},
        )  # fmt: skip
    dataset = opened(tmp_path)
    assert dataset.classes == ["0", "1", "2"] and dataset.labels.tolist() == [0, 1, 2] * 4
    assert [Picture(image).crop()[0, 0, 0] % 3 for image, _ in dataset] == dataset.labels.tolist()
    pack(tmp_path / "val.tar", {"a.png": png(), "a.cls": b"dog", "b.png": png(), "b.cls": b"cat"})
    assert (opened(tmp_path, "val").classes, opened(tmp_path, "val").labels.tolist()) == (["cat", "dog"], [1, 0])


@pytest.mark.parametrize("label", [b"-1", None, b"0.5", b""])
def test_a_label_that_is_none_is_named(tmp_path, label):
    members = {"a.png": png(), "a.cls": b"0", "b.png": png()} | ({"b.cls": label} if label is not None else {})
    pack(tmp_path / "train.tar", members)
    said = repr(-1 if label == b"-1" else None if label is None else label.decode())
    if label == b"0.5":  # then all of them are names
        assert opened(tmp_path).classes == ["0", "0.5"]
        return
    with pytest.raises(UserError, match=rf"train\.tar:b\.png: its label {said} is .*: correct its \.cls file"):
        opened(tmp_path)


def test_an_archive_that_was_replaced_is_read_anew_and_nothing_is_written(tmp_path):
    cats, dogs = ({f"{n}/{i}.bmp": png((c, i, 0), "BMP") for i in range(3)} for n, c in (("cat", 7), ("dog", 9)))
    pack(tmp_path / "train.tar", cats | dogs)
    first, stat = opened(tmp_path), os.stat(tmp_path / "train.tar")
    pack(tmp_path / "train.tar", dogs | cats)  # of the same size
    os.utime(tmp_path / "train.tar", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert os.stat(tmp_path / "train.tar").st_size == stat.st_size
    colours = [int(Picture(image).crop()[0, 0, 0]) for image, _ in opened(tmp_path)]
    assert colours == [7] * 3 + [9] * 3
    os.utime(tmp_path / "train.tar")
    with pytest.raises(UserError, match="has changed since it was opened"):
        first[0]
    assert os.listdir(tmp_path) == ["train.tar"]


def test_splits_of_archives_are_obeyed_or_refused(tmp_path):
    for name, count in (("train", 4), ("valid", 2), ("test", 3)):
        pack(tmp_path / f"{name}.tar", classes("cat", "dog", count=count))
    train, val = sources.open_training("tar", str(tmp_path), (16, 16))
    assert (len(train), len(val), val.split) == (8, 4, "valid")
    assert len(opened(tmp_path, "val", val="test")) == 6
    with pytest.raises(UserError, match=r"val_split: 'tset': .* has the splits test\.tar, train\.tar, valid\.tar"):
        opened(tmp_path, "val", val="tset")
    with pytest.raises(UserError, match=r"holds \.tar archives: set config\.data\.name=tar"):
        sources.open_split("folder", str(tmp_path), "train", (16, 16))
    with pytest.raises(UserError, match="8 of the 8 validation images"):
        sources.open_training("tar", str(tmp_path), (16, 16), wanted=Splits(val="train"))
    one = sources.open_training("folder", str(tmp_path / "train.tar"), (16, 16), wanted=Splits(fraction=0.25))
    assert [len(part) for part in one] == [6, 2] and np.bincount(one[1].labels).tolist() == [1, 1]


def test_damaged_and_compressed_archives_are_named(tmp_path):
    (tmp_path / "train.tar").write_bytes(b"\x1f\x8b" + b"x" * 2000)
    with pytest.raises(UserError, match=r"train\.tar: cannot be read as a tar archive"):
        opened(tmp_path)
    pack(tmp_path / "train.tar", {"notes.txt": b""})
    with pytest.raises(UserError, match=r"train\.tar: holds no images"):
        opened(tmp_path)
