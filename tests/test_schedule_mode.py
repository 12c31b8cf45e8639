"""`--mode=schedule`: the learning rate of any config on any machine, without training."""

from __future__ import annotations

import csv


def test_the_schedule_of_a_pod_recipe_is_printed_and_plotted_on_any_machine(pcpvt, tmp_path):
    done = pcpvt("--mode=schedule", "--config=configs/pcpvt_s.py:npu8,paper", f"--workdir={tmp_path}")
    assert "1,281,167 training images are assumed" in done.stdout and "peak 0.00125" in done.stdout
    rows = list(csv.DictReader((tmp_path / "schedule.csv").open()))
    assert [rows[0]["step"], rows[-1]["step"]] == ["0", "300273"]
    rates = {float(row["epoch"]): float(row["lr"]) for row in rows}
    assert all(lr == 1e-6 for at, lr in rates.items() if at < 1.99)  # the reference's first two epochs
    assert max(rates.values()) < 1.25e-3 * 1.0001 and min(rates.values()) == 1e-6
    page = (tmp_path / "schedule.html").read_text()
    assert "<svg" in page and "http" not in page.replace("http://www.w3.org", "")


def test_a_short_run_has_every_step_with_its_image_size(pcpvt, tmp_path):
    words = ["--mode=schedule", "--config=configs/pcpvt_s.py:cpu", "--config.steps=30", f"--workdir={tmp_path}"]
    done = pcpvt(*words, "--config.image_size=64", "--config.size_schedule=32x48@0,64@20 steps")
    assert done.stdout.count("  32x48 px\n") > 10 and done.stdout.count("  64x64 px\n") > 5
    rows = list(csv.DictReader((tmp_path / "schedule.csv").open()))
    assert [int(row["step"]) for row in rows] == list(range(30))
    assert [(row["height"], row["width"]) for row in rows] == [("32", "48")] * 20 + [("64", "64")] * 10
    assert "Image height in training" in (tmp_path / "schedule.html").read_text()
