"""report.html: what it shows is what the run recorded, it needs nothing else, and a browser draws it."""

import html.parser
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image

from pcpvt.data import sources
from pcpvt.data.loader import EvalBatches
from pcpvt.modes import details, report, report_charts, report_classes, report_data
from pcpvt.modes.console import Console

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
VOID = {"meta", "img", "br", "circle", "line", "polyline"}


class Page(html.parser.HTMLParser):
    """Text, charts and pictures of a page; fails where tags are not closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.texts, self.charts, self.pictures, self.links = [], [], {}, [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        if "data-series" in attrs:
            self.charts[len(self.charts)] = json.loads(attrs["data-series"])
        if tag == "img":
            self.pictures.append(attrs["src"])
        self.links += [v for k, v in attrs.items() if k in ("href", "src") and not v.startswith("data:")]

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.texts.append(data)


def read(path):
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture
def copied(trained, tmp_path):
    """The finished run, to be changed."""
    return shutil.copytree(trained, tmp_path / "run")


def test_training_ends_with_a_report_of_what_it_recorded(trained):
    page = read(trained / "report.html")
    text = " ".join(page.texts)
    result = json.loads((trained / "result.json").read_text())
    assert f"{result['acc1']:.2f} %" in text and "pcpvt_nano" in text and torch.__version__ in text
    for heading in (
        "Loss",
        "Accuracy in %",
        "Learning rate",
        "Images/s",
        "Gradient norm",
        "Confusion matrix",
        "Recipe",
    ):
        assert heading in text, heading
    records = report_data.load(trained, "run").metrics
    validation, training = page.charts[0]
    assert len(validation["p"]) == sum(r["kind"] == "eval" for r in records)
    assert len(training["p"]) == sum(r["kind"] == "train" for r in records)
    last = [r["loss"] for r in records if r["kind"] == "train"][-1]
    assert training["p"][-1][3] == report_charts.short(last)


def test_report_needs_nothing_but_itself_and_is_light(trained):
    text = (trained / "report.html").read_text(encoding="utf-8")
    assert read(trained / "report.html").links == []
    assert "http:" not in text and "https:" not in text and "url(" not in text and "@import" not in text
    assert len(text) < 300_000


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


def observed(source, logits, world, rank):
    """An observer that has seen one process's part of the data."""
    observer = details.Observer(len(source))
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
    monkeypatch.setattr(details.collectives, "sum_numbers", lambda values: parts.append(values) or values)
    for rank in range(3):
        observed(source, logits, 3, rank).table()
    monkeypatch.setattr(details.collectives, "sum_numbers", lambda values: np.sum(parts, axis=0).tolist())
    together = details.Observer(len(source)).table()
    for name, values in alone.items():
        np.testing.assert_array_equal(values, together[name], err_msg=name)


def test_unreadable_samples_are_not_counted(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "val" / name).mkdir(parents=True)
        Image.new("RGB", (40, 40), "red").save(tmp_path / "val" / name / "good.png")
    (tmp_path / "val" / "b" / "bad.png").write_bytes(b"nothing")
    source = sources.open_split("folder", str(tmp_path), "val", (32, 32))
    observer = details.Observer(3)
    for batch in EvalBatches(source, (32, 32), 1.0, 2, 0, 1, "skip"):
        observer(batch, torch.tensor([[2.0, 1.0], [3.0, 1.0]]))
    found = details.summarize(observer.table(), source, (32, 32), 1.0)
    assert found["images"] == [1, 1] and found["right"] == [1, 0] and found["confusions"] == [[1, 0, 1]]
    assert [m["name"] for m in found["mistakes"]] == [str(tmp_path / "val" / "b" / "good.png")]
    assert found["mistakes"][0]["picture"].startswith("data:image/jpeg;base64,")


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
    found = details.summarize(table, source, (224, 224), 0.875)
    counts = [c for _, _, c in found["confusions"]]
    assert len(found["mistakes"]) == 24 and len(counts) == 10_000 and counts == sorted(counts, reverse=True)
    page = report_classes.sections(found)
    assert len(json.dumps(found)) < 500_000 and len(page) < 200_000
    assert "Most frequent confusions" in page and "the 25 lowest of 1000" in page.lower()


def test_names_cannot_break_the_page(copied):
    found = json.loads((copied / "details.json").read_text())
    found["classes"][0] = "<script>alert(1)</script>"
    found["classes"][1] = "\"'><b>\udcff\u202e&amp;"
    found["mistakes"][0]["name"] = '/x/" onload="y/<img>.png'
    (copied / "details.json").write_text(json.dumps(found))
    report.write(copied)
    text = (copied / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in text and 'onload="' not in text and "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    read(copied / "report.html")


def test_runs_are_compared(trained, copied, pcpvt, tmp_path):
    config = json.loads((copied / "config.json").read_text())
    config["lr"] = 0.125
    (copied / "config.json").write_text(json.dumps(config))
    done = pcpvt("--mode=report", f"--workdir={copied}", f"--config.report.compare={trained}")
    assert "report.html" in done.stdout
    page = read(copied / "report.html")
    assert [s["n"] for s in page.charts[1]] == [f"{tmp_path.name}/run", f"{trained.parent.name}/run"]
    text = " ".join(page.texts)
    assert "0.125" in text and "0.003" in text and "fields are equal" in text


@pytest.mark.parametrize("missing", ["details.json", "result.json", "environment.json", "metrics.jsonl", "config.json"])
def test_report_shows_what_there_is(copied, missing):
    (copied / missing).write_text("{ cut")
    page = read(report.write(copied))
    assert "Loss" in page.texts or missing == "metrics.jsonl"


def test_folders_without_a_run_are_refused(pcpvt, tmp_path):
    for folder, say in ((tmp_path / "none", "no such folder"), (tmp_path, "holds no run")):
        done = pcpvt("--mode=report", f"--workdir={folder}", check=False)
        assert done.returncode == 2 and say in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "none").exists()


def test_a_report_that_fails_is_a_warning(copied, capsys, monkeypatch):
    monkeypatch.setattr(report.report_page, "page", lambda runs: 1 / 0)

    class Session:
        workdir = copied

        class world:
            is_main = True

    report.at_end(Session, Console())
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "report.html is not written (ZeroDivisionError" in captured.err


@pytest.mark.parametrize(
    ("low", "high", "options", "expected"),
    [
        (0.23, 2.3, {}, [0.5, 1, 1.5, 2]),
        (60.4, 97.6, {}, [60, 70, 80, 90]),
        (5, 5, {}, [0, 2, 4]),
        (0, 0, {}, [-1, -0.5, 0, 0.5, 1]),
        (3, 1900, {"zero": True}, [0, 500, 1000, 1500, 2000]),
        (0.02, 700, {"log": True}, [0.1, 1, 10, 100]),
    ],
)
def test_axes_have_round_numbers(low, high, options, expected):
    assert report_charts.ticks(report_charts.scale(low, high, **options)) == pytest.approx(expected)


def test_numbers_are_short():
    shown = [report_charts.short(x) for x in (0, 0.1064983, 97.5274, 3564.2, 123456, 1.01e-5, -2.5, 0.003)]
    assert shown == ["0", "0.1065", "97.53", "3,564", "1.23e5", "1.01e-5", "-2.5", "0.003"]


def test_long_runs_are_thinned_by_means():
    metrics = [{"kind": "train", "epoch": i / 10, "loss": float(i)} for i in range(1, 3001)]
    curve = report_data.RunData("r", {}, metrics, {}, {}, {}).curve("train", "loss")
    assert len(curve) == 300 and curve[0] == (1.0, 5.5) and curve[-1] == (300.0, 2995.5)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_a_browser_draws_it_in_light_and_dark(trained, tmp_path):
    def chromium(*words):
        flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
        flags += (
            f" --disable-component-update --disable-sync --hide-scrollbars --user-data-dir={tmp_path / words[0][2:6]}"
        )
        done = subprocess.run(
            [CHROMIUM, *flags.split(), *words, f"file://{page}"], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0 and "Uncaught" not in done.stderr, done.stderr
        return done.stdout

    # The script adds a box for the tooltip to every chart, and shows it under the pointer.
    page = tmp_path / "pointed.html"
    point = "const s = document.querySelector('svg'), b = s.getBoundingClientRect(); s.dispatchEvent(new PointerEvent("
    point += "'pointermove', {clientX: b.left + 300, clientY: b.top + 60}))"
    text = (trained / "report.html").read_text(encoding="utf-8")
    page.write_text(text.replace("</body>", f"<script>{point}</script></body>"), encoding="utf-8")
    dom = chromium("--dump-dom", "--enable-logging=stderr")
    assert dom.count('class="tip"') == dom.count('class="chart"') == 6
    (tip,) = re.findall(r'class="tip" style="display: block; left: (\d\S*)px; top: (\d\S*)px;"', dom)
    assert 250 < float(tip[0]) < 450 and float(tip[1]) < 100

    page = trained / "report.html"
    brightness = {}
    for scheme, words in (("light", ()), ("dark", ("--blink-settings=preferredColorScheme=0",))):
        shot = tmp_path / f"{scheme}.png"
        chromium(f"--screenshot={shot}", "--window-size=1200,2600", *words)
        pixels = np.asarray(Image.open(shot).convert("L"))
        brightness[scheme] = np.median(pixels)
        assert pixels.std() > 15
    assert brightness["light"] > 220 and brightness["dark"] < 60
