"""The table of the study behind docs/results.md."""

from __future__ import annotations

import study


def test_each_arm_has_mean_and_deviation_over_its_seeds_and_its_share_of_the_references_time():
    runs = [
        study.Run("reference", 0, 30.0, 20.0, 50.0),
        study.Run("fast", 0, 33.0, 11.0, 40.0),
        study.Run("reference", 1, 32.0, 20.0, 50.0),
    ]
    assert study.table(runs).splitlines()[2:] == [
        "| reference | 2 | 31.0 ± 1.4 | 20.0 ± 0.0 | 1.00 |",
        "| fast | 1 | 33.0 | 11.0 | 0.55 |",
    ]
