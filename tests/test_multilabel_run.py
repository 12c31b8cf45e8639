"""docs/multilabel.md: its commands run one after the other, and their numbers are those of the images."""

from __future__ import annotations

import csv
import io
import json
import re
import shlex
from pathlib import Path

import miniature
import numpy as np
import pytest
import torch
from PIL import Image

from pcpvt import api
from pcpvt.config import resolve
from pcpvt.config.fields import FIELDS
from pcpvt.config.recipes import from_arg
from pcpvt.errors import UserError
from pcpvt.functional import multilabel
from pcpvt.predict import run as predict

TEXT = (Path(__file__).parent.parent / "docs" / "multilabel.md").read_text()
COMMANDS = [line for block in re.findall(r"^```bash\n(.*?)^```$", TEXT, re.M | re.S) for line in block.splitlines()]
STANDIN = Path(__file__).parent / "datasets_standin"
CLASSES = ["blue", "green", "red"]
MINIATURE = {
    "model.name": "pcpvt_nano", "image_size": 32, "batch_size": 12, "steps": 6, "eval.batch_size": 4, "lr": 3e-3,
    "precision": "float32", "warmup_epochs": 0, "mixup": 0, "cutmix": 0, "augment.randaugment": "", "ema": 0.5,
    "eval_every": "3 steps", "save_every": "3 steps", "log_every": "3 steps", "restarts": 0,
}  # fmt: skip
FIELD_WORDS = [f"--config.{name}={value}" for name, value in MINIATURE.items()]


def pictures(folder: Path) -> str:
    """A manifest of 24 training and 13 validation images, some without a label; a label is a bright channel."""
    draws, lines = np.random.default_rng(0), ["path,label,split"]
    for i in range(37):
        has = np.array([i >> bit & 1 for bit in (0, 1, 2)], bool)
        pixels = draws.integers(0, 90, (32, 32, 3)) + 160 * has[::-1]
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:02}.png")
        noisy = has ^ (draws.random(3) < 0.15)  # no model is right everywhere
        label = ";".join(name for name, own in zip(CLASSES, noisy, strict=True) if own)
        lines.append(f"{i:02}.png,{label},{'train' if i < 24 else 'val'}")
    (folder / "FILE.csv").write_text("\n".join(lines))
    return "\n".join(lines)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The workdir after all commands, and what each of them printed."""
    place = tmp_path_factory.mktemp("place")
    (place / "PHOTOS").mkdir()
    pictures(place / "PHOTOS")
    outputs = []
    for line in COMMANDS:
        for name in ("FILE.csv", "PHOTOS"):
            where = place / "PHOTOS" / "FILE.csv" if name == "FILE.csv" else place / name
            line = line.replace(f"={name}", f"={where}")
        words, env = shlex.split(line)[3:], None
        if "hfds/" in line:
            env = {"PYTHONPATH": f"{miniature.FAULTS}:{STANDIN}:{miniature.ROOT}"}
        workdir = place / ("hub" if env else "run")
        words += [f"--workdir={workdir}", *([] if "--mode" in line else FIELD_WORDS)]
        ended = miniature.run(words, env=env, cold=env is not None)
        assert ended.code == 0, ended.err
        outputs.append(ended)
    return place, outputs


def truth(place: Path) -> tuple[np.ndarray, np.ndarray]:
    """Logits of the validation images by the API from the best checkpoint, and their labels."""
    net = api.load(place / "run")
    rows = [row for row in csv.DictReader((place / "PHOTOS" / "FILE.csv").open()) if row["split"] == "val"]
    images = [api.read(place / "PHOTOS" / row["path"], net.size, net.crop) for row in rows]
    logits = api.logits(net.model, net.params, torch.cat(images))
    return logits.numpy(), np.array([[name in row["label"].split(";") for name in net.classes] for row in rows])


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def test_training_and_evaluation_report_the_metrics_of_all_images(done):
    place, outputs = done
    logits, labels = truth(place)
    for name, threshold in (("result.json", 0.5), ("result-eval.json", 0.3)):
        result, predicted = read(place / "run" / name), torch.from_numpy(logits).sigmoid().numpy() >= threshold
        precision = multilabel.average_precision(logits, labels)
        assert result["map"] == pytest.approx(100 * np.mean(precision)) and result["threshold"] == threshold
        assert result["average_precision"] == pytest.approx(
            {name: 100 * value for name, value in zip(CLASSES, precision, strict=True)}, abs=1e-4
        )
        hits, counts = (labels & predicted).sum(0), labels.sum(0) + predicted.sum(0)
        assert result["micro_f1"] == pytest.approx(200 * hits.sum() / counts.sum())
        assert result["macro_f1"] == pytest.approx(np.mean(200 * hits / counts))
        assert result["f1"] == pytest.approx(dict(zip(CLASSES, 200 * hits / counts, strict=True)), abs=1e-4)
        assert result["recall"] == pytest.approx(dict(zip(CLASSES, 100 * hits / labels.sum(0), strict=True)), abs=1e-4)
        assert not {"acc1", "acc5", "balanced_acc"} & result.keys()
    trained = read(place / "run" / "result.json")
    assert (
        "map_raw" in trained
        and trained["loss_raw"] != trained["loss"]
        and "top-1" not in outputs[0].out
        and "acc1" not in outputs[0].out
    )
    assert f"mAP {trained['map']:.3f} %   macro F1 {trained['macro_f1']:.3f} %" in outputs[0].out
    assert f"(best in map, step {trained['best_step']})" in outputs[0].out
    assert "note: config.best: map, because config.task=multilabel" in outputs[0].out
    assert read(place / "run" / "config.json")["best"] == "map"
    assert 60 < trained["map"] < 100  # colours are easy


def test_the_reports_show_them(done):
    place, _ = done
    for page, result in (("report.html", "result.json"), ("report-eval.html", "result-eval.json")):
        text = (place / "run" / page).read_text()
        assert f"<b>{read(place / 'run' / result)['map']:.2f} %</b><span>mAP</span>" in text
        assert "Average precision of each class" in text and "top-1" not in text and "Confusion" not in text
    details = read(place / "run" / "details-eval.json")
    assert details["images"] == truth(place)[1].sum(0).tolist() and details["seen"] == 13
    assert len(details["answers"]) == sum(details["images"]) + sum(details["predicted"]) - 2 * sum(details["right"])
    assert all(answer["label"] == (answer["probability"] < 0.3) for answer in details["answers"])


def test_prediction_lists_every_class_over_the_threshold(done):
    place, outputs = done
    listed = outputs[COMMANDS.index(next(line for line in COMMANDS if "mode=predict" in line))].out
    logits, _ = truth(place)
    for i, row in enumerate(torch.from_numpy(logits).sigmoid().tolist(), 24):
        over = sorted(((p, name) for p, name in zip(row, CLASSES, strict=True) if p >= 0.3), reverse=True)
        lines = [f"  {100 * p:7.3f} %  {name}" for p, name in over] or ["  no class"]
        assert "\n".join([f"{place}/PHOTOS/{i}.png", *lines]) in listed


def test_an_exported_file_and_two_processes_give_the_same_metrics(done, tmp_path):
    place, _ = done
    exported = miniature.run(
        ["--mode=export", f"--workdir={place}/run", f"--config.export.output={tmp_path}/a.safetensors"]
    )
    assert exported.code == 0, exported.err
    words = ["--mode=eval", "--config=configs/pcpvt_s.py:cpu2", f"--config.checkpoint={tmp_path}/a.safetensors"]
    words += [
        f"--config.data.path={place}/PHOTOS/FILE.csv",
        f"--workdir={tmp_path}/run",
        "--config.predict.threshold=0.3",
    ]
    ended = miniature.run([*words, "--config.eval.batch_size=8", "--config.precision=float32"])
    assert ended.code == 0, ended.err
    found, expected = read(tmp_path / "run" / "result-eval.json"), read(place / "run" / "result-eval.json")
    for name in ("map", "macro_f1", "micro_f1", "average_precision", "f1", "recall", "loss", "threshold", "images"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5), name
    assert api.load(tmp_path / "a.safetensors").model.task == "multilabel"


@pytest.mark.parametrize("preprocess", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_an_exported_graph_gives_the_same_metrics(preprocess, done, tmp_path):
    """Its probabilities are sigmoids, of which the graph with preprocessing gives nothing else."""
    place, _ = done
    fields = {"export.format": "pt2", "export.preprocess": preprocess, "export.output": tmp_path / "a.pt2"}
    words = [f"--config.{name}={value}" for name, value in fields.items()]
    exported = miniature.run(["--mode=export", f"--workdir={place}/run", *words])
    assert exported.code == 0, exported.err
    words = [f"--config.checkpoint={tmp_path}/a.pt2", f"--config.data.path={place}/PHOTOS/FILE.csv"]
    words += [f"--workdir={tmp_path}/run", "--config.predict.threshold=0.3", "--config=configs/pcpvt_s.py:cpu"]
    ended = miniature.run(["--mode=eval", *words])
    assert ended.code == 0, ended.err
    found, expected = read(tmp_path / "run" / "result-eval.json"), read(place / "run" / "result-eval.json")
    for name in ("map", "macro_f1", "micro_f1", "loss", "threshold", "images"):
        assert found[name] == pytest.approx(expected[name], rel=1e-4), name


def test_formats_for_one_label_per_image_are_refused(done):
    place, _ = done
    for name in ("hub", "om"):
        ended = miniature.run(["--mode=export", f"--workdir={place}/run", f"--config.export.format={name}"])
        assert ended.code == 2 and f"config.export.format: {name} is for one label per image" in ended.error


def test_an_ensemble_has_the_figures_of_its_members(done):
    place, _ = done
    ended = miniature.run(["--mode=eval", f"--workdir={place}/run", "--config.eval.ensemble=ema"])
    assert ended.code == 0, ended.err
    members = read(place / "run" / "result-eval.json")["ensemble"]["members"]
    trained = read(place / "run" / "result.json")
    assert [round(member["map"], 6) for member in members] == [round(trained[name], 6) for name in ("map_raw", "map")]
    assert '<th class="number">mAP</th>' in (place / "run" / "report-eval.html").read_text()


def test_an_image_without_a_class_is_in_every_format():
    found = {}
    for name, (_, write) in predict.FORMATS.items():
        write(out := io.StringIO(), "a.png", [])
        found[name] = out.getvalue()
    assert found == {
        "table": "a.png\n  no class\n", "jsonl": '{"image": "a.png", "predictions": []}\n', "csv": "a.png,,,,\n",
    }  # fmt: skip


def test_a_run_goes_on_as_if_it_had_not_been_interrupted(done, tmp_path):
    place, _ = done
    words = ["--config=configs/pcpvt_s.py:cpu", "--config.task=multilabel", *FIELD_WORDS]
    words += [f"--config.data.path={place}/PHOTOS/FILE.csv", f"--workdir={tmp_path}/run"]
    interrupted = miniature.run(words, {"at": "step", "n": 4, "do": "SIGTERM"})
    assert interrupted.code == 75, interrupted.err
    again = miniature.run(words)
    assert again.code == 0, again.err
    ours, theirs = miniature.newest(tmp_path / "run"), miniature.newest(place / "run")
    assert all(torch.equal(ours.tensors[name], theirs.tensors[name]) for name in theirs.tensors)
    assert miniature.records(tmp_path / "run") == miniature.records(place / "run")


def resolved(mode: str = "train", where: str = "", trained=None, said=None, **overrides: object):
    named, about = (
        {name.replace("__", "."): value for name, value in overrides.items()},
        {"trained": trained, "said": said},
    )
    return resolve.resolve(
        lambda arg: from_arg(arg, "pcpvt_s", 0.2), "cpu,folder", named, mode=mode, where=where, **about
    )[0]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"task": "classes", "best": "map"}, "config.best: 'map' needs several labels per image"),
        ({"task": "classes", "predict__threshold": 0.4}, "config.predict.threshold: 0.4 needs several labels"),
        ({"best": "acc1"}, "config.best: 'acc1' needs one label per image"),
        ({"best": "balanced_acc"}, "use map or loss"),
        ({"class_weights": "balanced"}, "config.class_weights: 'balanced' does not go with config.task=multilabel"),
        ({"data__sampler": "balanced"}, "config.data.sampler: 'balanced' does not go with"),
        ({"predict__sort_into": "x"}, "config.predict.sort_into: 'x' does not go with"),
        ({"predict__top": 3}, "config.predict.top: 3 does not go with"),
        ({"bench__against": "timm"}, "config.bench.against: 'timm' does not go with"),
        ({"task": "several"}, "config.task: 'several' is not known"),
    ],
)
def test_fields_that_do_not_go_with_the_task_are_one_line(fields, said):
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        resolved(**{"task": "multilabel", **fields})
    assert "\n" not in str(caught.value)


def test_another_task_than_that_of_the_weights_is_one_line():
    for options in ({"trained": {"task": "multilabel"}}, {"said": {"task": "multilabel"}}):
        with pytest.raises(
            UserError, match=r"config\.task: 'classes' but W was trained with 'multilabel': leave it out"
        ):
            resolved("eval", task="classes", where="W", **options)
        config = resolved("eval", where="W", **options)
        assert (config.task, config.best) == ("multilabel", "map")
    with pytest.raises(UserError, match=r"config\.task: 'multilabel' but W was trained with 'classes'"):
        resolved("predict", task="multilabel", where="W", trained={"seed": 0})  # of an earlier version


def test_the_best_is_by_map_unless_another_is_given():
    assert resolved(task="multilabel").best == "map" and resolved(task="multilabel", best="loss").best == "loss"
    assert resolved().best == "acc1" and resolved(task="multilabel", class_weights="FILE").class_weights == "FILE"
    assert resolved("bench", task="multilabel", bench__against="onnx,timm.onnx").bench.against == "onnx,timm.onnx"


def test_every_field_that_the_document_names_exists():
    named = set(re.findall(r"config\.([a-z_]+(?:\.[a-z_]+)?)", TEXT))
    assert named <= set(FIELDS), named - set(FIELDS)
