"""`--mode=predict`: its output, skipped files, and the meaning of a heat map."""

import csv
import io
import json
from pathlib import Path

import miniature
import numpy as np
import pytest
import torch
from PIL import Image

from pcpvt import api
from pcpvt.data import sources
from pcpvt.errors import UserError
from pcpvt.predict import attribution, sorting
from pcpvt.predict import run as predict


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder with five digits, one of them in a subfolder, an unreadable image, and a text file."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "below").mkdir()
    images = sources.digits("val", (32, 32)).images
    for i in range(4):
        Image.fromarray(images[i]).save(folder / f"digit [{i}].png")
    Image.fromarray(images[4]).save(folder / "below" / "digit.JPG")
    (folder / "broken.png").write_bytes(b"not an image")
    (folder / "notes.txt").write_text("nothing to see")
    return folder


def test_a_folder_is_classified_and_stdout_holds_only_predictions(pcpvt, trained, pictures):
    words = ["--mode=predict", f"--workdir={trained}", "--config.predict.format=jsonl"]
    done = pcpvt(*words, f"--config.predict.images={pictures}")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    names = ["below/digit.JPG", *(f"digit [{i}].png" for i in range(4))]
    assert [row["image"] for row in rows] == [str(pictures / name) for name in names]

    net = api.load(trained)
    for row in rows:
        assert len(row["predictions"]) == 5
        expected = api.classify(net.model, net.params, api.read(row["image"], net.size, net.crop), net.classes)[0]
        assert [p["class"] for p in row["predictions"]] == [name for name, _ in expected]
        assert [p["probability"] for p in row["predictions"]] == pytest.approx([p for _, p in expected], abs=2e-6)

    warnings = [line for line in done.stderr.splitlines() if "warning" in line]
    assert len(warnings) == 1 and str(pictures / "broken.png") in warnings[0]
    assert "5 images, 1 unreadable and skipped" in done.stderr


def test_heat_maps_and_a_file_are_written_on_request(pcpvt, trained, pictures, tmp_path):
    out = tmp_path / "out.csv"
    words = ["--mode=predict", f"--workdir={tmp_path}", f"--config.checkpoint={trained}", "--config.predict.format=csv"]
    words += [f"--config.predict.images={pictures}/*.png", f"--config.predict.output={out}"]
    done = pcpvt(*words, "--config.predict.explain=true")
    assert done.stdout == ""
    rows = list(csv.DictReader(out.open()))
    assert len(rows) == 4 * 5 and [row["rank"] for row in rows[:5]] == list("12345")
    assert sorted(path.name for path in (tmp_path / "explain").iterdir()) == [f"digit [{i}].png.png" for i in range(4)]
    assert Image.open(tmp_path / "explain" / "digit [0].png.png").size == (2 * 256 + 8, 256)


def test_images_are_copied_into_a_folder_per_predicted_class(pcpvt, trained, pictures, tmp_path):
    target = tmp_path / "sorted"
    words = ["--mode=predict", f"--workdir={tmp_path}", f"--config.checkpoint={trained}", "--config.predict.top=2"]
    words += ["--config.predict.format=jsonl", f"--config.predict.images={pictures}"]
    done = pcpvt(*words, f"--config.predict.sort_into={target}")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [len(row["predictions"]) for row in rows] == [2] * 5
    expected = {}
    for row in rows:
        name = row["image"].removeprefix(f"{pictures}/").replace("/", "__")
        expected[target / row["predictions"][0]["class"] / name] = row["image"]
    copies = {path for path in target.rglob("*") if path.is_file()}
    assert copies == expected.keys()
    assert all(path.read_bytes() == Path(original).read_bytes() for path, original in expected.items())
    again = pcpvt(*words, f"--config.predict.sort_into={target}", check=False)
    assert again.returncode == 2 and "is not empty: name a new folder" in again.stderr


def test_every_class_gets_a_folder_of_its_own():
    names = sorting.folder_names(["cat", "a/b", "..", "a:b", "cat ", "", "Ä b"])
    assert names == ["cat", "a_b", "class 2", "a_b (3)", "cat (4)", "class 5", "Ä b"]


def test_no_readable_image_is_an_error_and_no_file_is_written(pcpvt, trained, pictures, tmp_path):
    out = tmp_path / "out.csv"
    words = ["--mode=predict", f"--workdir={trained}", f"--config.predict.output={out}"]
    done = pcpvt(*words, f"--config.predict.images={pictures}/broken.png", check=False)
    assert done.returncode == 2 and not out.exists() and "none of the 1 files can be read" in done.stderr


@pytest.fixture
def words(trained, pictures, tmp_path):
    values = {"checkpoint": trained, "predict.images": f"{pictures}/digit*.png"}
    return ["--mode=predict", f"--workdir={tmp_path / 'run'}", *(f"--config.{n}={v}" for n, v in values.items())]


def test_a_closed_pipe_ends_the_run_with_exit_code_0(words):
    ended = miniature.run(words, under=["bash", "-c", '"$@" | true; exit ${PIPESTATUS[0]}', "bash"])
    assert ended.code == 0, ended.err
    assert ended.err.splitlines()[-1] == "the reader closed the output; the rest was not written"


def test_an_unwritable_output_is_a_one_line_error_that_names_it(words, tmp_path):
    full = miniature.run(words, under=["bash", "-c", 'exec "$@" > /dev/full', "bash"])
    assert full.code == 2, full.err
    assert "config.predict.output: standard output: cannot be written (No space left on device)" in full.err
    assert full.err.splitlines()[-1].startswith("pcpvt: error: ")
    for path in (tmp_path, tmp_path / "none" / "out.csv"):
        with pytest.raises(UserError, match=rf"config\.predict\.output: {path}: cannot be written .*: name a file"):
            predict.write_output(str(path), lambda out: None)


def test_an_unwritable_heat_map_folder_is_an_error_about_the_workdir(pcpvt, words, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "explain").write_text("a file where the folder should be")
    done = pcpvt(*words, "--config.predict.explain=true", f"--config.predict.output={tmp_path / 'a'}", check=False)
    assert done.returncode == 2 and f"--workdir: {tmp_path / 'run' / 'explain'}: heat maps" in done.stderr
    assert not (tmp_path / "a").exists()


def test_files_folders_and_patterns_are_found(pictures):
    assert len(predict.find(str(pictures))) == 6  # without the text file
    assert predict.find(str(pictures / "digit [1].png")) == [str(pictures / "digit [1].png")]  # not a pattern
    assert len(predict.find(f"{pictures}/*.png")) == 5
    assert len(predict.find(f"{pictures}/**/*.JPG")) == 1
    for pattern in ("", str(pictures / "none.png"), f"{pictures}/*.tiff"):
        with pytest.raises(UserError, match=r"config\.predict\.images"):
            predict.find(pattern)


def test_heat_map_names_are_unique():
    names = predict.unique_names(["/a/x/1.png", "/a/y/1.png", "/a/x__1.png"])
    assert names == ["x__1.png", "y__1.png", "x__1.png-2"]


def test_a_named_pipe_is_written_to_and_not_replaced(tmp_path):
    import os

    fifo = tmp_path / "pipe"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    predict.write_output(str(fifo), lambda out: out.write("rows"))
    assert os.read(reader, 10) == b"rows" and fifo.is_fifo()
    os.close(reader)


@pytest.mark.parametrize("name", ["table", "jsonl", "csv"])
def test_formats_keep_special_characters_of_class_names(name):
    classes, out = ['comma, "quote"', "línea\nbreak", "ascii"], io.StringIO()
    header, write_image = predict.FORMATS[name]
    out.write(header)
    write_image(out, "a,b.png", predict.best(torch.tensor([0.2, 0.5, 0.3]), classes))
    text = out.getvalue()
    if name == "jsonl":
        (line,) = text.splitlines()
        assert [p["class"] for p in json.loads(line)["predictions"]] == [classes[1], classes[2], classes[0]]
    elif name == "csv":
        rows = list(csv.reader(io.StringIO(text)))
        assert rows[1] == ["a,b.png", "1", classes[1], "1", "0.500000"] and len(rows) == 4
    else:
        assert text.startswith("a,b.png\n   50.000 %  línea") and text.count("%") == 3


def test_equal_probabilities_are_in_class_order():
    ranked = predict.best(torch.tensor([0.1, 0.3, 0.3, 0.3]), ["a", "b", "c", "d"])
    assert [(name, i) for name, i, _ in ranked] == [("b", 1), ("c", 2), ("d", 3), ("a", 0)]


# Attribution.


def images(net, count, size=None):
    return torch.from_numpy(sources.digits("val", size or net.size).images[:count])


@pytest.mark.parametrize(("size", "grid"), [((32, 32), (8, 8)), ((72, 40), (18, 10)), ((224, 224), (14, 14))])
def test_a_heat_map_sums_to_the_logit_difference_from_the_mean_colour(trained, size, grid):
    net = api.load(trained)
    x = images(net, 6, size)
    labels = api.logits(net.model, net.params, x).argmax(-1)
    heat, added = attribution.attribute(net.model, net.params, x, labels)
    assert heat.shape == (6, *grid)
    torch.testing.assert_close(heat.sum((1, 2)), added, rtol=0.03, atol=0.03)


def test_the_hottest_pixels_matter_most_for_the_logit(trained):
    """Replacing the hottest fifth of the pixels by the mean colour costs more than replacing the coldest fifth."""
    net = api.load(trained)
    x = images(net, 40)
    before = api.logits(net.model, net.params, x)
    labels = before.argmax(-1)
    heat, _ = attribution.attribute(net.model, net.params, x, labels)
    heat = torch.nn.functional.interpolate(heat[:, None], net.size, mode="bilinear")[:, 0].flatten(1)
    mean = x.float().mean((1, 2), keepdim=True).to(torch.uint8)
    losses = []
    for largest in (True, False):
        where = heat.topk(heat.shape[1] // 5, largest=largest).indices
        mask = torch.zeros_like(heat).scatter_(1, where, 1).view(-1, *net.size, 1) > 0
        after = api.logits(net.model, net.params, torch.where(mask, mean, x))
        losses.append((before - after).gather(1, labels[:, None]).mean())
    assert losses[0] > 1 and losses[0] > losses[1] + 2


def test_a_picture_is_red_for_and_blue_against_the_class():
    heat = np.array([[1.0, 0.0], [0.0, -1.0]])
    picture = np.asarray(attribution.draw(np.full((300, 400, 3), 128, np.uint8), heat), np.int64)
    assert picture.shape == (300, 2 * 400 + 8, 3)
    assert (picture[:, :400] == 128).all()
    right = picture[:, 408:]
    red, blue = right[20, 20], right[-20, -20]
    assert red[0] > red[2] + 80 and blue[2] > blue[0] + 80
