"""report.html: it shows what the run recorded, is one self-contained file, and a browser draws it."""

import configparser
import html.parser
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import miniature
import numpy as np
import pytest
import torch
from PIL import Image

from pcpvt.errors import UserError
from pcpvt.report import charts as report_charts
from pcpvt.report import data as report_data
from pcpvt.report import run as report
from pcpvt.runtime.console import Console

ROOT = Path(__file__).parent.parent
TEMPLATES = ROOT / "pcpvt" / "report" / "templates"
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
    assert len(validation["points"]) == sum(r["kind"] == "eval" for r in records)
    assert len(training["points"]) == sum(r["kind"] == "train" for r in records)
    last = [r["loss"] for r in records if r["kind"] == "train"][-1]
    assert training["points"][-1][3] == report_charts.short(last)


def test_restarts_are_marked_in_the_curves_and_listed_with_their_reasons(copied, trained):
    lines = (copied / "metrics.jsonl").read_text().splitlines()
    middle = json.loads(lines[len(lines) // 2])
    reason = "rank 3 was killed by <SIGKILL>"
    again = {"kind": "restart", "step": middle["step"], "epoch": middle["epoch"], "restart": 1, "reason": reason}
    lines.insert(len(lines) // 2 + 1, json.dumps(again))
    (copied / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    text = report.write(copied).read_text(encoding="utf-8")
    page = Page(text)
    marks = re.findall(r'<g class="mark"><title>(.*?)</title>\s*<line x1="([\d.]+)"', text)
    epochs = [record["epoch"] for record in report_data.load(copied, "run").metrics]
    axis = report_charts.Axis(0.0, max(epochs), False, report_charts.LEFT, report_charts.RIGHT)
    position, said = axis.place(middle["epoch"])[0], f"restart at step {middle['step']}: {reason}"
    assert marks == [(said.replace("<", "&lt;").replace(">", "&gt;"), str(position))] * len(page.charts)
    assert reason in page.texts and "Restarts" in page.texts
    assert [len(curve["points"]) for curve in page.charts[0]] == [
        len(curve["points"]) for curve in read(trained / "report.html").charts[0]
    ]
    assert "Restarts" not in read(trained / "report.html").texts
    other = shutil.copytree(trained, copied.parent / "other")
    assert reason in read(report.write(other, [copied])).texts


def test_report_is_self_contained_and_small(trained):
    text = (trained / "report.html").read_text(encoding="utf-8")
    assert read(trained / "report.html").links == []
    assert "http:" not in text and "https:" not in text and "url(" not in text and "@import" not in text
    assert len(text) < 300_000


def test_names_cannot_break_the_page(copied):
    found = json.loads((copied / "details.json").read_text())
    found["classes"][0] = "<script>alert(1)</script>"
    found["classes"][1] = "\"'><b>\udcff\u202e&amp;"
    found["mistakes"][0]["name"] = '/x/" onload="y/<img>.png'
    found["mistakes"][0]["picture"] = 'x" onload="z'
    found["step"] = "<script>alert(2)</script>"
    (copied / "details.json").write_text(json.dumps(found))
    report.write(copied)
    text = (copied / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in text and 'onload="' not in text and "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    read(copied / "report.html")


def test_titles_curves_and_tables_are_escaped():
    name = "</pre><script>'\"&"
    curve = report_charts.Series(name, [(0, 1), (1, 2)])
    text = report.render(name, [report_charts.chart(name, [curve], x=name), {}], table=name)
    assert text.count("<script>") == text.count("</script>") == text.count("</pre>") == 1
    page = Page(text)
    assert page.texts.count(name) == 4 and [curve["name"] for curve in page.charts[0]] == [name]


def test_style_and_script_are_in_the_page_as_they_are_in_their_files():
    text = report.render("title", [])
    for file in ("report.css", "report.js"):
        assert (TEMPLATES / file).read_text().strip() in text


def test_installed_package_has_all_templates():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    patterns = config["options.package_data"]["pcpvt.report"].split()
    packaged = {path for pattern in patterns for path in (ROOT / "pcpvt" / "report").glob(pattern)}
    files = {path for path in TEMPLATES.rglob("*") if path.is_file()}
    assert files and files <= packaged


def test_installed_package_has_all_packages():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "pcpvt").rglob("*.py")}
    assert set(config["options"]["packages"].split()) == {".".join(path.parts) for path in folders} | {"pcpvt.configs"}


def test_jinja_is_imported_only_when_a_page_is_rendered():
    code = (
        "import sys; from pcpvt.report import run, schedule; assert 'jinja2' not in sys.modules\n"
        "run.render('title', []); assert 'jinja2' in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_runs_are_compared(trained, copied, pcpvt, tmp_path):
    config = json.loads((copied / "config.json").read_text())
    config["lr"] = 0.125
    (copied / "config.json").write_text(json.dumps(config))
    done = pcpvt("--mode=report", f"--workdir={copied}", f"--config.report.compare={trained}")
    assert "report.html" in done.stdout
    page = read(copied / "report.html")
    assert [s["name"] for s in page.charts[1]] == [f"{tmp_path.name}/run", f"{trained.parent.name}/run"]
    text = " ".join(page.texts)
    assert "0.125" in text and "0.003" in text and "fields are equal" in text


def test_runs_are_named_by_the_shortest_distinct_ends_of_their_paths(trained, tmp_path):
    for folder in "ab":
        shutil.copytree(trained, tmp_path / folder / "x" / "run")
    compared = [tmp_path / "a" / ".." / "b" / "x" / "run", tmp_path / "a" / "x" / "run"]  # its own once more
    page = read(report.write(tmp_path / "a" / "x" / "run", compared))
    assert [s["name"] for s in page.charts[1]] == ["a/x/run", "b/x/run"]


def test_folder_to_compare_with_that_holds_no_run_is_refused_naming_the_field(trained, copied, tmp_path):
    with pytest.raises(UserError, match=rf"config\.report\.compare: {tmp_path / 'typo'} holds no run"):
        report.write(copied, [trained, tmp_path / "typo"])


@pytest.mark.parametrize("change", [{"mode": "eval"}, {"steps": 7}])
def test_result_of_an_evaluation_or_of_a_run_extended_since_is_not_shown(copied, change):
    result = json.loads((copied / "result.json").read_text())
    (copied / "result.json").write_text(json.dumps(result | change))
    text = " ".join(read(report.write(copied)).texts)
    assert "not finished" in text and "duration" not in text
    (copied / "result.json").write_text(json.dumps(result))
    text = " ".join(read(report.write(copied)).texts)
    assert "not finished" not in text and "duration" in text


@pytest.mark.parametrize("missing", ["details.json", "result.json", "environment.json", "metrics.jsonl", "config.json"])
def test_report_leaves_out_what_a_missing_or_damaged_file_holds(copied, missing):
    (copied / missing).write_text("{ cut")
    page = read(report.write(copied))
    assert "Loss" in page.texts or missing == "metrics.jsonl"


def test_folders_without_a_run_are_refused(pcpvt, tmp_path):
    assert "no such folder" in miniature.refusal(["--mode=report", f"--workdir={tmp_path / 'none'}"])
    assert not (tmp_path / "none").exists()
    done = pcpvt("--mode=report", f"--workdir={tmp_path}", check=False)
    assert done.returncode == 2 and "holds no run" in done.stderr and len(done.stderr.splitlines()) == 1


def test_failure_of_the_report_is_only_a_warning(copied, capsys, monkeypatch):
    monkeypatch.setattr(report, "render_report", lambda runs: 1 / 0)

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
        (0, 0, {"zero": True}, [0, 0.5, 1]),
        (3, 1900, {"zero": True}, [0, 500, 1000, 1500, 2000]),
        (0.02, 700, {"log": True}, [0.1, 1, 10, 100]),
    ],
)
def test_axes_have_round_numbers(low, high, options, expected):
    assert report_charts.ticks(report_charts.scale(low, high, **options), 5) == pytest.approx(expected)


def test_numbers_are_short():
    shown = [report_charts.short(x) for x in (0, 0.1064983, 97.5274, 3564.2, 123456, 1.01e-5, -2.5, 0.003)]
    assert shown == ["0", "0.1065", "97.53", "3,564", "1.23e5", "1.01e-5", "-2.5", "0.003"]


def test_curves_of_long_runs_are_means_of_equal_parts():
    metrics = [{"kind": "train", "epoch": i / 10, "loss": float(i)} for i in range(1, 3001)]
    curve = report_data.RunData("r", {}, metrics, {}, {}, {}).curve("train", "loss")
    assert len(curve) == 300 and curve[0] == (1.0, 5.5) and curve[-1] == (300.0, 2995.5)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_browser_draws_the_report_in_light_and_dark(trained, tmp_path):
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
    assert dom.count('class="card tip"') == dom.count('class="card chart"') == 6
    (tip,) = re.findall(r'class="card tip" style="display: block; left: (\d\S*)px; top: (\d\S*)px;"', dom)
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
