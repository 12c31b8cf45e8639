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


def test_a_short_run_has_every_step(pcpvt, tmp_path):
    pcpvt("--mode=schedule", "--config=configs/pcpvt_s.py:cpu", "--config.steps=30", f"--workdir={tmp_path}")
    rows = list(csv.DictReader((tmp_path / "schedule.csv").open()))
    assert [int(row["step"]) for row in rows] == list(range(30))
