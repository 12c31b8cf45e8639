"""`details.json` (confusions, mistakes) at any world size, and how the report shows it, also when it is damaged."""

import errno
import json
import shutil
from types import SimpleNamespace as Namespace

import numpy as np
import pytest
import torch
from PIL import Image

from pcpvt.data import sources
from pcpvt.data.decode import RGB, DecodeError
from pcpvt.data.loader import EvalBatches
from pcpvt.evaluate import mistakes
from pcpvt.report import evaluation
from pcpvt.report import run as report
from pcpvt.report.data import RunData, summarize_classes
from pcpvt.runtime import records


def test_details_agree_with_the_best_evaluation(trained):
    found = json.loads((trained / "details.json").read_text())
    result = json.loads((trained / "result.json").read_text())
    assert found["step"] == result["best_step"] and sum(found["images"]) == 364
    assert 100 * sum(found["right"]) / 364 == pytest.approx(result["acc1"])
    assert sum(c for _, _, c in found["confusions"]) == 364 - sum(found["right"])
    confidence = [m["confidence"] for m in found["mistakes"]]
    assert confidence == sorted(confidence, reverse=True) and all(
        m["label"] != m["predicted"] for m in found["mistakes"]
    )


def test_an_evaluation_leaves_details_and_a_page_of_its_own(pcpvt, trained, tmp_path):
    before = {path.name: path.read_bytes() for path in trained.iterdir() if path.is_file()}
    pcpvt("--mode=eval", f"--config.checkpoint={trained}", "--config.precision=float32", f"--workdir={tmp_path}")
    result = json.loads((tmp_path / "result-eval.json").read_text())
    training = json.loads((trained / "result.json").read_text())
    details, trainings = (json.loads((folder / f"{name}.json").read_text())
                          for folder, name in ((tmp_path, "details-eval"), (trained, "details")))  # fmt: skip
    for name in ("images", "right", "predicted", "confusions", "mistakes", "classes"):
        assert details[name] == trainings[name], name
    rights = zip(details["classes"], details["right"], details["images"], strict=True)
    recall = {name: pytest.approx(100 * right / images, abs=1e-4) for name, right, images in rights}
    assert result["recall"] == training["recall"] == recall
    assert result["balanced_acc"] == training["balanced_acc"] == pytest.approx(np.mean(list(result["recall"].values())))
    assert result["macro_f1"] == training["macro_f1"] and sum(details["predicted"]) == 364
    page = (tmp_path / "report-eval.html").read_text()
    for text in (
        "Recall of each class",
        "Confusion matrix",
        "macro F1",
        "364 val images",
        "digits",
        str(result["acc1"])[:4],
    ):
        assert text in page, text
    assert {path.name: path.read_bytes() for path in trained.iterdir() if path.is_file()} == before


def observed(source, logits, world, rank):
    """An observer that has seen one process's part of the data."""
    observer = mistakes.PredictionLog(len(source))
    for batch in EvalBatches(source, (32, 32), 1.0, 7, rank, world, "error"):
        observer(batch, logits[batch["id"].clamp(min=0)])
    return observer


def test_details_are_the_same_at_any_number_of_processes(monkeypatch):
    source = sources.digits("val", (32, 32))
    logits = torch.randn(len(source), 10, generator=torch.Generator().manual_seed(0)) * 3
    alone = observed(source, logits, 1, 0).table()
    assert alone["seen"].all() and (alone["predicted"] == logits.argmax(-1).numpy()).all()
    np.testing.assert_array_equal(alone["confidence"], logits.softmax(-1).max(-1).values.numpy())

    parts = []
    monkeypatch.setattr(mistakes.collectives, "sum_numbers", lambda values: parts.append(values) or values)
    for rank in range(3):
        observed(source, logits, 3, rank).table()
    monkeypatch.setattr(mistakes.collectives, "sum_numbers", lambda values: np.sum(parts, axis=0).tolist())
    together = mistakes.PredictionLog(len(source)).table()
    for name, values in alone.items():
        np.testing.assert_array_equal(values, together[name], err_msg=name)


def test_unreadable_samples_are_not_counted(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "val" / name).mkdir(parents=True)
        Image.new("RGB", (40, 40), "red").save(tmp_path / "val" / name / "good.png")
    (tmp_path / "val" / "b" / "bad.png").write_bytes(b"nothing")
    source = sources.open_split("folder", str(tmp_path), "val", (32, 32))
    observer = mistakes.PredictionLog(3)
    for batch in EvalBatches(source, (32, 32), 1.0, 2, 0, 1, "skip"):
        observer(batch, torch.tensor([[2.0, 1.0], [3.0, 1.0]]))
    found = mistakes.summarize(observer.table(), source, (32, 32), 1.0)
    assert found["images"] == [1, 1] and found["right"] == [1, 0] and found["confusions"] == [[1, 0, 1]]
    assert [m["name"] for m in found["mistakes"]] == [str(tmp_path / "val" / "b" / "good.png")]
    assert found["mistakes"][0]["picture"].startswith("data:image/jpeg;base64,")


class Vanishing(sources.Arrays):
    """A reader that decodes by itself, as timm's `torch/...`, and fails: with DecodeError, or on the whole system."""

    error: Exception = DecodeError("x[1]: cannot be read as an image")

    def __getitem__(self, index):
        raise self.error


def test_a_picture_that_cannot_be_drawn_ends_no_training(tmp_path, monkeypatch):
    source = Vanishing(np.zeros((2, 8, 8, 3), np.uint8), np.arange(2), ["a", "b"], "x")
    rows = {"seen": [1, 1], "label": [0, 1], "predicted": [0, 0], "confidence": [0.5, 0.9], "own": [0.5, 0.1]}
    log = mistakes.PredictionLog(2)
    monkeypatch.setattr(log, "table", lambda: {n: np.array(v, bool if n == "seen" else None) for n, v in rows.items()})
    session = Namespace(workdir=tmp_path, world=Namespace(is_main=True), size=(8, 8), config=Namespace(), reading=RGB)
    session.config.eval = Namespace(crop=1.0)
    warnings: list[str] = []
    mistakes.write(session, log, source, {"step": 3}, warnings.append)
    found = json.loads((tmp_path / "details.json").read_text())
    assert [(m["name"], m["picture"]) for m in found["mistakes"]] == [("x[1]", "")] and warnings == []
    source.error = OSError(errno.EMFILE, "Too many open files")
    mistakes.write(session, log, source, 4, warnings.append)
    assert len(warnings) == 1 and "details.json: not written" in warnings[0] and "open files" in warnings[0]


def test_a_thousand_classes_stay_light(tmp_path):
    rng = np.random.default_rng(0)
    label = np.arange(50_000) % 1000
    predicted = np.where(rng.random(50_000) < 0.25, rng.integers(0, 1000, 50_000), label)
    table = {"seen": np.ones(50_000, bool), "label": label, "predicted": predicted}
    table |= {"confidence": rng.random(50_000), "own": rng.random(50_000)}
    image = np.full((320, 480, 3), 90, np.uint8)
    source = sources.Arrays(
        np.broadcast_to(image, (50_000, *image.shape)), label, [f"class {i}" for i in range(1000)], "x"
    )
    found = mistakes.summarize(table, source, (224, 224), 0.875)
    counts = [c for _, _, c in found["confusions"]]
    assert len(found["mistakes"]) == 24 and len(counts) == 10_000 and counts == sorted(counts, reverse=True)
    text = report.render_report([RunData("run", {}, [], {}, {}, found)])
    assert len(json.dumps(found)) < 500_000 and len(text) < 200_000
    assert "Most frequent confusions" in text and "The 25 lowest of 1000" in text


DETAILS = {
    "step": 3, "classes": ["a", "b"], "images": [2, 1], "right": [1, 1], "confusions": [[0, 1, 1]],
    "mistakes": [{"name": "x", "label": 0, "predicted": 1, "confidence": 0.9, "own": 0.1, "picture": ""}],
}  # fmt: skip


def test_damaged_details_remove_only_their_own_part_of_the_report(trained, tmp_path):
    assert "taken for" in str(summarize_classes(DETAILS)["matrix"])
    for name in DETAILS.keys() - {"step", "classes"}:
        assert summarize_classes({n: v for n, v in DETAILS.items() if n != name}) == {}
    for change in ({"images": 3}, {"images": []}, {"classes": [1, 2]}, {"confusions": [1]}, {"mistakes": [{}]}):
        assert summarize_classes(DETAILS | change) == {}
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    (tmp_path / records.DETAILS).write_text("[" * 100_000)
    text = report.write(tmp_path).read_text()
    assert "Confusion matrix" not in text and "Learning rate" in text


def test_the_page_of_an_ensemble_shows_a_member_that_diverged():
    """JSON has null for a loss that is not finite."""
    members = [
        {"checkpoint": name, "weights": "ema", "acc1": 12.5, "loss": loss}
        for name, loss in zip("ab", (0.25, None), strict=True)
    ]
    page = evaluation.render_evaluation({"acc1": 1.0, "ensemble": {"members": members}}, {})
    assert ">0.2500</td>" in page and ">–</td>" in page and page.count(">12.50 %</td>") == 2
