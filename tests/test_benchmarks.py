"""The benchmark suite runs, on tiny shapes; nothing here is timed against a goal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmarks import page, suite
from benchmarks.rows import Row
from benchmarks.timing import exponent, in_pairs


@pytest.mark.slow
def test_every_part_runs_and_is_written(tmp_path: Path) -> None:
    assert suite.main(["--quick", "-o", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "benchmarks.json").read_text())
    assert list(found["parts"]) == list(suite.PARTS) and all(found["parts"].values())
    text = (tmp_path / "index.html").read_text()
    assert text.count("data:image/png") == len(page.PICTURES)
    assert "recorded step against the plain step" in page.markdown(found)


def test_a_ratio_is_that_of_its_pairs() -> None:
    spent = []
    ratio = in_pairs(lambda: spent.append("a"), lambda: spent.append("b"), pairs=4, warm_up=False)
    assert "".join(spent) == "abbaabba"
    assert ratio.low <= ratio.median <= ratio.high and ratio.pairs == 4


def test_a_power_is_found() -> None:
    assert exponent([10, 20, 40], [5e2, 2e3, 8e3]) == pytest.approx(2.0)


def test_a_goal_is_met_or_missed() -> None:
    assert Row("g", "w", 2.0, "×", most=2.5).met and not Row("g", "w", 2.0, "×", least=2.5).met
    assert Row("g", "w", 2.0, "×").met is None
