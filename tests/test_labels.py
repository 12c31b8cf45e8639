"""Labels go by name: orders of classes, class maps, and which output of a model belongs to which class of the data."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from pcpvt import torchvision_compat  # noqa: F401
from pcpvt.checkpoints import checkpoint, labels
from pcpvt.checkpoints.description import Description
from pcpvt.checkpoints.foreign import Weights
from pcpvt.checkpoints.load import LoadedModel
from pcpvt.config.fields import base
from pcpvt.data import classes, sources
from pcpvt.errors import UserError
from pcpvt.models import pcpvt as models
from pcpvt.models.init import init

NAMES = ["class10", "class9", "B", "a", "n2x", "n10", "n10a2", "N2", "_", "Ä", "9", "10", "²", ""]


def test_orders_are_timms_and_torchvisions():
    from timm.utils.misc import natural_key

    plain = [name for name in NAMES if name != "²"]  # which timm takes for a number and fails
    assert classes.class_order(plain, "natural") == sorted(sorted(plain), key=natural_key)
    assert classes.class_order(NAMES, "bytes") == sorted(NAMES, key=str.encode)
    assert classes.orders_differ(["a", "B"]) and classes.orders_differ(["10", "9"])
    assert not classes.orders_differ(["cat", "dog"])


def model(outputs: int, names: list[str] | None = None) -> LoadedModel:
    built = models.build("pcpvt_nano", outputs)
    return LoadedModel("FILE", "params", built, {}, Description(classes=names), {}, [])


def data(*names: str) -> sources.Arrays:
    """One image of each class."""
    return sources.Arrays(np.zeros((len(names), 2, 2, 3), np.uint8), np.arange(len(names)), names, "x")


def matched(loaded: LoadedModel, *names: str, **fields) -> labels.Matched:
    config = base()
    config.update_from_flattened_dict(fields)
    arranged = classes.arrange(data(*names), config.data.class_order, config.data.class_map)
    return labels.match(loaded, arranged, config)


def pairs(found: labels.Matched) -> list[tuple[int, int]]:
    """(image, output) of each sample."""
    return [(int(found.dataset.name(i)[2:-1]), found.dataset[i][1]) for i in range(len(found.dataset))]


def test_a_file_that_names_its_classes_is_matched_by_name():
    named = model(4, ["eel", "dog", "cat", "fox"])
    same = matched(named, "eel", "dog", "cat", "fox")
    assert type(same.dataset) is sources.Arrays and not same.notes + same.warnings
    assert pairs(matched(named, "cat", "dog", "eel", "fox")) == [(0, 2), (1, 1), (2, 0), (3, 3)]
    assert pairs(matched(named, "cat", "fox")) == [(0, 2), (1, 3)]
    more = matched(named, "ant", "cat", "dog", "yak")
    assert pairs(more) == [(1, 2), (2, 1)] and more.left_out == {"ant": 1, "yak": 1}
    assert "does not know 2 classes of the data (ant, yak): their 2 images are left out" in more.warnings[0]
    assert more.dataset.classes == ["eel", "dog", "cat", "fox"] and more.dataset.labels.tolist() == [2, 1]
    assert pairs(more._replace(dataset=pickle.loads(pickle.dumps(more.dataset)))) == [(1, 2), (2, 1)]
    with pytest.raises(UserError, match="none of those"):
        matched(named, "ant", "bee", "gnu", "yak")


def test_a_file_without_names_says_which_order_it_assumes_where_orders_differ():
    assert not matched(model(3), "cat", "dog", "eel").warnings
    found = matched(model(3), "class1", "class10", "class9")
    assert pairs(found) == [(0, 0), (1, 1), (2, 2)]
    assert "in the order bytes (class1, class10, class9); in natural order, timm's, they are class1, class9" in str(
        found.warnings
    )
    settled = matched(model(3), "class1", "class10", "class9", **{"data.class_order": "natural"})
    assert pairs(settled) == [(0, 0), (1, 2), (2, 1)] and not settled.warnings
    with pytest.raises(UserError, match="has 5 classes and the data have 3"):
        matched(model(5), "cat", "dog", "eel")
    assert pairs(matched(model(5), "cat", "dog", **{"num_classes": 5})) == [(0, 0), (1, 1)]


def test_imagenet_is_matched_by_wordnet_ids_and_numbers():
    assert pairs(matched(model(1000), "n01443537", "n15075141", "n99999999")) == [(0, 1), (1, 999)]
    assert pairs(matched(model(1000), "0", "10", "9")) == [(0, 0), (1, 10), (2, 9)]
    every = sorted(str(i) for i in range(1000))
    assert [label for _, label in pairs(matched(model(1000), *every))] == list(map(int, every))
    with pytest.raises(UserError, match="has 1000 classes and the data have 2"):
        matched(model(1000), "n01443537", "dog")


@pytest.mark.parametrize(
    ("text", "names", "found"),
    [
        ("eel\ncat\n\ndog\n", ("cat", "dog"), [(0, 1), (1, 2)]),
        ("\ufeffcat\t2\r\ndog\t0\r\nwolf\t0\r\n", ("cat", "dog", "wolf"), [(0, 2), (1, 0), (2, 0)]),
        ("Katze\teel\nHund\tdog\n", ("Katze", "Hund"), [(0, 0), (1, 1)]),
    ],
)
def test_a_class_map_overrides_all(tmp_path, text, names, found):
    (tmp_path / "map.txt").write_text(text, encoding="utf-8", newline="")
    named = model(3, ["eel", "dog", "cat"])
    assert pairs(matched(named, *names, **{"data.class_map": str(tmp_path / "map.txt")})) == found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("cat\ncat\n", "map.txt:2: 'cat' is named twice"),
        ("cat\t0\ndog\n", "is not like the other lines"),
        ("cat\t\ndog\t1\n", "is not like the other lines"),
        ("cat\t99999999\n", "out of range"),
        ("cat\n", "lacks 1 classes of the data"),
        ("cat\na\nb\ndog\n", "has labels up to 3 and FILE has 3 outputs"),
    ],
)
def test_a_class_map_that_cannot_be_is_one_line(tmp_path, text, message):
    (tmp_path / "map.txt").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        matched(model(3), "cat", "dog", **{"data.class_map": str(tmp_path / "map.txt")})
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"none\.txt: cannot be read"):
        classes.read_map(str(tmp_path / "none.txt"))


def test_a_head_to_fine_tune_from_is_taken_by_name():
    theirs, fresh = init(models.build("pcpvt_nano", 3), 0), init(models.build("pcpvt_nano", 4), 1)
    weights = Weights(theirs, "params", Description(classes=["eel", "dog", "cat"]), [], {})
    head, notes = labels.fit_head("FILE", weights, fresh, ["ant", "cat", "dog", "yak"], base())
    assert head is not None and notes == [
        "head: 2 of 4 classes are taken by name from the file's 3, 2 start anew",
    ]
    rows = [fresh["head.weight"][0], theirs["head.weight"][2], theirs["head.weight"][1], fresh["head.weight"][3]]
    torch.testing.assert_close(head["head.weight"], torch.stack(rows), rtol=0, atol=0)
    assert labels.fit_head("FILE", weights, fresh, ["a", "b", "c", "d"], base()) == (None, [])
    unnamed = Weights(theirs, "params", Description(), [], {})
    small = init(models.build("pcpvt_nano", 3), 1)
    found = labels.fit_head("FILE", unnamed, small, ["1", "10", "9"], base())
    assert found[0] is None and "names no classes" in found[1][0]


def test_the_program_evaluates_other_folders_by_name_and_trains_in_the_order_that_is_set(pcpvt, tmp_path):
    """With its classes matched, an evaluation on more folders in another order has the figures of the plain one."""
    names = ["k10", "k9", "k1"]
    for split in ("train", "val"):
        for i, name in enumerate(names):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for j in range(4):
                colour = [30, 30, 30 + j]
                colour[i] = 220
                Image.new("RGB", (32, 32), tuple(colour)).save(tmp_path / "data" / split / name / f"{j}.png")
    words = ["--config=configs/pcpvt_s.py:cpu,folder", f"--config.data.path={tmp_path / 'data'}", "--config.steps=2"]
    words += ["--config.model.name=pcpvt_nano", "--config.image_size=32", "--config.batch_size=12", "--config.mixup=0"]
    words += ["--config.cutmix=0", "--config.data.workers=0", f"--workdir={tmp_path / 'run'}"]
    pcpvt(*words, "--config.data.class_order=natural")
    last = list(checkpoint.steps(tmp_path / "run" / "checkpoints").values())[-1]
    assert checkpoint.read_meta(last)["classes"] == ["k1", "k9", "k10"]
    plain = json.loads((tmp_path / "run" / "result.json").read_text())

    (tmp_path / "data" / "val" / "extra").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "data" / "val" / "extra" / "0.png")
    words = ["--mode=eval", f"--config.checkpoint={tmp_path / 'run'}", f"--workdir={tmp_path / 'eval'}"]
    done = pcpvt(*words, "--config.data.class_order=bytes")
    found = json.loads((tmp_path / "eval" / "result-eval.json").read_text())
    assert (found["acc1"], found["seen"], found["left_out"]) == (plain["acc1"], 12, {"extra": 1})
    assert found["loss"] == pytest.approx(plain["loss"], rel=1e-6)  # in another order
    assert "does not know 1 classes of the data (extra)" in done.stderr and done.stderr.count("\n") == 1
