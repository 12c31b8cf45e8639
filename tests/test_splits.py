"""Splits are obeyed or refused, and named; held-out parts are pure functions; training without validation works."""

from __future__ import annotations

import json
import shutil

import miniature
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pcpvt.data import sources
from pcpvt.errors import UserError
from pcpvt.readers import splits
from pcpvt.readers.splits import Splits

COLOURS = {"cat": (250, 0, 0), "dog": (0, 0, 250), "eel": (0, 250, 0)}


def fill(folder, swap=False, **counts):
    """Class folders with images of a colour that tells the class, or, swapped, the other of cat and dog."""
    for name, count in counts.items():
        colour = COLOURS[{"cat": "dog", "dog": "cat"}[name] if swap else name]
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.new("RGB", (40, 36), colour).save(folder / name / f"{i}.png")
    return folder


def open_split(path, split="val", **wanted):
    return sources.open_split("folder", str(path), split, (16, 16), wanted=Splits(**wanted))


@settings(max_examples=30, deadline=None)
@given(
    counts=st.lists(st.integers(1, 40), min_size=2, max_size=4), fraction=st.floats(0.01, 0.99), seed=st.integers(0, 9)
)
def test_a_held_out_part_is_stratified_and_does_not_depend_on_the_order_of_files(counts, fraction, seed):
    names = [f"{c}/{i}" for c, count in enumerate(counts) for i in range(count)]
    labels = np.array([int(name[0]) for name in names])
    held_out = splits.hold_out(labels, names.__getitem__, fraction, seed)
    for c, count in enumerate(counts):
        expected = min(max(round(fraction * count), 1), count - 1)
        assert held_out[labels == c].sum() == expected
    shuffled = np.random.default_rng(seed).permutation(len(names))
    again = splits.hold_out(labels[shuffled], lambda i: names[shuffled[i]], fraction, seed)
    assert (again == held_out[shuffled]).all()


def test_a_held_out_part_moves_little_with_a_new_file_and_wholly_with_the_seed():
    names = [str(i) for i in range(1000)]
    labels = np.zeros(1000, int)
    first = splits.hold_out(labels[:999], names.__getitem__, 0.2, 0)
    assert (splits.hold_out(labels, names.__getitem__, 0.2, 0)[:999] != first).sum() <= 1
    assert (splits.hold_out(labels, names.__getitem__, 0.2, 1)[:999] != first).sum() > 200


def test_a_held_out_part_is_the_same_wherever_the_data_lie(tmp_path):
    fill(tmp_path / "one", cat=10, dog=20)
    train, val = (open_split(tmp_path / "one", split, fraction=0.2) for split in ("train", "val"))
    assert (len(train), len(val), train.split, val.split) == (24, 6, "80% of all", "20% of all")
    assert np.bincount(val.labels).tolist() == [2, 4]
    paths = {val.name(i) for i in range(6)}
    assert not paths & {train.name(i) for i in range(24)}
    shutil.move(tmp_path / "one", tmp_path / "moved" / "train")
    moved = open_split(tmp_path / "moved", fraction=0.2)
    assert {moved.name(i).replace("/moved/train/", "/one/") for i in range(6)} == paths
    assert moved.split == "20% of train" and [moved[i][1] for i in range(6)] == moved.labels.tolist()


@pytest.mark.parametrize("name", ["val", "valid", "validation", "test", "Testing", "dev"])
def test_the_usual_names_of_the_validation_split_are_found(tmp_path, name):
    for folder in ("Training", name):
        fill(tmp_path / folder, cat=1, dog=1)
    assert open_split(tmp_path).split == name and open_split(tmp_path, "train").split == "Training"


def test_a_given_name_is_meant_literally_or_refused(tmp_path):
    for count, folder in enumerate(("train", "val", "test", "holdout"), 1):
        fill(tmp_path / folder, cat=count, dog=count)
    assert [len(open_split(tmp_path, val=name)) for name in ("validation", "val", "test", "holdout")] == [4, 4, 6, 8]
    everything = open_split(tmp_path / "holdout", val=".")
    assert (everything.split, len(everything)) == ("all", 8)
    assert len(open_split(tmp_path, "train", train="holdout")) == 8
    for field, split, wanted in (("val", "val", {"val": "tset"}), ("train", "train", {"train": "trian"})):
        with pytest.raises(
            UserError, match=rf"config\.data\.{field}_split: '{wanted[field]}': .* holdout, test, train, val: name one"
        ):
            open_split(tmp_path, split, **wanted)
    with pytest.raises(UserError, match=r"config\.data\.val_split: 'test' and config\.data\.val_fraction=0\.1"):
        open_split(tmp_path, val="test", fraction=0.1)
    for name in ("digits", "synthetic"):
        for wanted in ({"val": "test"}, {"train": "all"}, {"fraction": 0.1}):
            with pytest.raises(UserError, match="has splits of its own, train and val"):
                sources.open_split(name, "", "val", (32, 32), wanted=Splits(**wanted))


def test_validation_images_that_are_training_images_are_refused(tmp_path):
    fill(tmp_path / "train", cat=2, dog=2), fill(tmp_path / "val", cat=2)
    (tmp_path / "val" / "dog").symlink_to(tmp_path / "train" / "dog")
    with pytest.raises(UserError, match=r"2 of the 4 validation images \(val\) are training images \(train\) too"):
        sources.open_training("folder", str(tmp_path), (16, 16))


def test_a_validation_split_without_any_image_is_refused(tmp_path):
    """Of classes with one image each nothing can be held out, whichever mode asks for it."""
    fill(tmp_path, cat=1, dog=1)
    wanted = Splits(fraction=0.2)
    for opened in (sources.open_split, sources.open_training):
        arguments = ("val", (16, 16)) if opened is sources.open_split else ((16, 16),)
        with pytest.raises(UserError, match=r"config\.data\.val_fraction: 0\.2: every class has one image"):
            opened("folder", str(tmp_path), *arguments, wanted=wanted)
    train, val = sources.open_training("folder", str(tmp_path), (16, 16), wanted=wanted, validates=False)
    assert (len(train), len(val)) == (2, 0)
    (tmp_path / "a.csv").write_text("path,label,split\ncat/0.png,cat,train\ndog/0.png,dog,train\n")
    with pytest.raises(UserError, match="val"):
        sources.open_training("folder", str(tmp_path / "a.csv"), (16, 16))


def result(workdir, name="result.json"):
    return json.loads((workdir / name).read_text())


def words(tmp_path, run, data, arg="cpu,folder", **fields):
    given = {"steps": 8, "batch_size": 8, "eval_every": "8 steps", "image_size": 32, "data__workers": 0, **fields}
    options = {"mixup": 0, "augment__randaugment": "", "augment__erase": 0, "lr": "5e-3", "save_every": 0, **given}
    return miniature.words(tmp_path / run, arg, data__path=data, **options)


def test_a_run_names_the_split_that_it_reports_and_holds_out_the_same_at_any_number_of_processes(tmp_path):
    data = fill(tmp_path / "data", cat=12, dog=12, eel=6)
    outcomes = []
    for run, arg in (("one", "cpu,folder"), ("two", "cpu2,folder")):
        done = miniature.run(words(tmp_path, run, data, arg, data__val_fraction=0.2))
        assert done.code == 0 and "splits: 80% of all to train on, 20% of all to evaluate on" in done.out, done.err
        outcomes.append(result(tmp_path / run))
    assert outcomes[0]["split"] == outcomes[1]["split"] == "20% of all" and outcomes[0]["last"]["seen"] == 5
    assert outcomes[0]["last"]["loss"] == pytest.approx(outcomes[1]["last"]["loss"], rel=1e-4)
    for name in ("one", "two"):
        (tmp_path / name / "result.json").unlink()
    again = miniature.run(["--mode=eval", f"--workdir={tmp_path / 'one'}", "--config=configs/pcpvt_s.py:cpu"])
    assert again.code == 0, again.err
    assert result(tmp_path / "one", "result-eval.json")["loss"] == pytest.approx(outcomes[0]["last"]["loss"], rel=1e-5)


def test_val_split_is_what_is_evaluated_and_other_data_have_no_held_out_part(tmp_path):
    """In test/ the pictures of the two classes are exchanged: what is right on val is wrong there."""
    data = tmp_path / "data"
    fill(data / "train", cat=8, dog=8), fill(data / "test", swap=True, cat=4, dog=4)
    done = miniature.run(words(tmp_path, "run", data, data__val_fraction=0.25, steps=24, eval_every="24 steps"))
    assert done.code == 0, done.err
    assert result(tmp_path / "run")["acc1"] == 100
    for field in ("data.val_split=test", f"data.path={data}/test/../../other"):
        fill(tmp_path / "other" / "test", swap=True, cat=4, dog=4)
        command = ["--mode=eval", "--config=configs/pcpvt_s.py:cpu", f"--workdir={tmp_path / 'run'}"]
        done = miniature.run([*command, f"--config.{field}"])
        assert done.code == 0, done.err
        assert result(tmp_path / "run", "result-eval.json")["acc1"] == 0
        assert result(tmp_path / "run", "result-eval.json")["seen"] == 8


def test_classes_may_be_missing_from_validation_which_is_said_once(tmp_path):
    data = tmp_path / "data"
    fill(data / "train", cat=8, dog=8, eel=8), fill(data / "val", cat=0, dog=0, eel=4)
    done = miniature.run(words(tmp_path, "run", data, "cpu2,folder"))
    assert done.code == 0 and result(tmp_path / "run")["last"]["seen"] == 4, done.err
    assert done.err.count("val has no images of 2 classes (cat, dog) of 3: metrics are over the others") == 1
    assert done.err.count("\n") == 1


def test_without_validation_data_a_run_trains_with_eval_every_0_and_else_says_what_to_do(tmp_path):
    data = tmp_path / "data"
    fill(data / "train", cat=4, dog=4)
    done = miniature.run(words(tmp_path, "run", data))
    assert done.code == 2
    for remedy in ("config.data.val_split", "config.data.val_fraction=0.2", "config.eval_every=0"):
        assert remedy in done.error
    done = miniature.run(words(tmp_path, "run", data, eval_every=0))
    assert done.code == 0 and result(tmp_path / "run")["split"] == "none", done.err
    assert result(tmp_path / "run")["acc1"] is None


def test_random_images_and_digits_are_trained_on_without_a_warning(tmp_path):
    command = miniature.words(
        tmp_path / "run", "cpu", data__name="synthetic", num_classes=1000, steps=1, image_size=32, batch_size=4,
        eval_every="1 step",
    )  # fmt: skip
    done = miniature.run(command)
    assert (done.code, done.err) == (0, "") and result(tmp_path / "run")["split"] == "val"
