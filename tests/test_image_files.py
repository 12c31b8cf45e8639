"""Which files of a folder are images: links, hidden entries and other files; the same for training and predict."""

from __future__ import annotations

import os
import shutil

import pytest
from PIL import Image

from pcpvt.data import sources
from pcpvt.data.decode import Picture
from pcpvt.errors import UserError
from pcpvt.predict import run as predict
from pcpvt.readers import files


@pytest.fixture
def folder(tmp_path):
    """train/ and val/ with cat and dog, two images each, in a folder of their own."""
    for split in ("train", "val"):
        for label, name in enumerate(("cat", "dog")):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (20, 16), (50 * label, i, 0)).save(tmp_path / "data" / split / name / f"{i}.png")
    return tmp_path / "data"


def opened(folder, split="train"):
    return sources.open_split("folder", str(folder), split, (16, 16))


@pytest.mark.parametrize("target", [".", "..", "../..", "../../..", "../../val", "../cat"])
def test_links_between_folders_add_no_image_twice_and_none_of_another_class(folder, target):
    """A link of class dog; the one into val/ is followed, as it leads nowhere that was read."""
    os.symlink(target, folder / "train" / "dog" / "a_loop")
    dataset = opened(folder)
    expected = 8 if target == "../../val" else 4
    assert len(dataset) == expected
    for path, label in (dataset[i] for i in range(4)):
        assert f"/{dataset.classes[label]}/" in path


def test_a_link_takes_no_images_from_the_folder_of_another_class(folder):
    (folder / "train" / "dog" / "deep").mkdir()
    shutil.copy(folder / "train" / "dog" / "0.png", folder / "train" / "dog" / "deep" / "x.png")
    os.symlink("../dog/deep", folder / "train" / "cat" / "link")  # cat is read first
    assert [label for _, label in opened(folder)] == [0, 0, 1, 1, 1]


def test_links_to_folders_elsewhere_are_followed(folder, tmp_path):
    (tmp_path / "pool").mkdir()
    (folder / "train" / "dog").rename(tmp_path / "pool" / "dog")
    os.symlink(tmp_path / "pool" / "dog", folder / "train" / "dog")
    assert len(opened(folder)) == 4
    os.symlink("dog", folder / "train" / "wolf")
    with pytest.raises(UserError, match=r"wolf: is the folder .*/dog by another name"):
        opened(folder)


def test_predict_follows_links_once(folder):
    os.symlink("..", folder / "train" / "dog" / "loop")
    assert len(predict.find(str(folder))) == 8
    found = predict.find(f"{folder}/**/*.png")
    assert len(found) == 8 and not any("loop" in path for path in found)


def test_what_is_hidden_or_the_systems_is_no_data(folder):
    for hidden in (".cache", "__MACOSX", "@eaDir"):
        shutil.copytree(folder / "train" / "cat", folder / "train" / hidden)
        shutil.copytree(folder / "train" / "cat", folder / "train" / "cat" / hidden)
    (folder / "train" / "cat" / "._0.png").write_bytes(b"\0\5\26\7")
    (folder / "train" / "cat" / "Thumbs.db").write_bytes(b"")
    (folder / "train" / ".DS_Store").write_bytes(b"")
    dataset = opened(folder)
    assert dataset.classes == ["cat", "dog"] and len(dataset) == 4 and dataset.remarks == []
    warnings = []
    assert len(predict.find(str(folder), warnings.append)) == 8 and warnings == []


def test_what_is_left_out_is_counted_by_suffix(folder, monkeypatch):
    monkeypatch.setattr(files, "SUFFIXES", files.SUFFIXES - files.HEIF)
    for name in ("cat/a.heic", "cat/b.HEIC", "dog/notes.txt", "dog/README"):
        (folder / "train" / name).write_bytes(b"")
    shutil.copy(folder / "train" / "cat" / "0.png", folder / "train" / "loose.png")
    (remark,) = opened(folder).remarks
    assert remark == (
        f"{folder}/train: left out 4 files: 2 .heic (pip install 'pcpvt[heic]' reads them), 1 without suffix, 1 .txt; "
        "1 image beside the class folders"
    )
    warnings = []
    predict.find(str(folder / "train"), warnings.append)
    assert warnings == [f"{folder}/train: left out {remark.partition('left out ')[2].partition(';')[0]}"]


def test_images_without_class_folders_get_a_remedy(folder):
    shutil.rmtree(folder / "train" / "cat")
    for path in (folder / "train" / "dog").iterdir():
        path.rename(folder / "train" / path.name)
    (folder / "train" / "dog").rmdir()
    with pytest.raises(UserError, match="2 images lie in it: put them into folders named after their classes"):
        opened(folder)


SAVED_AS = {".mpo": "JPEG", ".jfif": "JPEG", ".jpe": "JPEG", ".dib": "BMP", ".pnm": "PPM", ".heic": "HEIF",
            ".heif": "HEIF"}  # fmt: skip


@pytest.mark.parametrize("suffix", sorted(files.SUFFIXES - {".npy"}))
def test_every_suffix_is_of_a_format_that_is_read(suffix, folder):
    mode = {".pgm": "L", ".pbm": "1"}.get(suffix, "RGB")
    path = folder / "train" / "cat" / f"x{suffix.upper()}"
    Image.new("RGB", (64, 64), "white").convert(mode).save(path, format=SAVED_AS.get(suffix))
    assert str(path) in [name for name, _ in opened(folder)]
    assert Picture(str(path)).crop().mean() > 250


def test_heic_is_read_where_its_package_is_installed(folder):
    pytest.importorskip("pillow_heif")
    assert {".heic", ".heif"} <= files.SUFFIXES


def test_pipes_broken_links_and_links_to_themselves_wait_for_nobody(folder):
    cat = folder / "train" / "cat"
    os.mkfifo(cat / "pipe.png")
    os.symlink("nowhere", cat / "broken.png")
    os.symlink("itself.png", cat / "itself.png")
    os.symlink("itself", folder / "train" / "itself")
    dataset = opened(folder)
    assert dataset.classes == ["cat", "dog"] and len(dataset) == 7
    for index in range(len(dataset)):
        path, _ = dataset[index]
        if not os.path.isfile(path):
            with pytest.raises(UserError, match="cannot be read"):
                Picture(path).crop()


def test_a_folder_that_cannot_be_read_is_an_error_and_no_loss_of_images(folder, monkeypatch):
    (folder / "train" / "dog" / "locked").mkdir()
    scan = os.scandir

    def refuses(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuses)
    with pytest.raises(UserError, match=r"dog/locked: cannot be read \(Permission denied\)"):
        opened(folder)
