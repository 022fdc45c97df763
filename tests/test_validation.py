"""The page of validation figures: what it pins in closed form holds, and it draws."""

from __future__ import annotations

import itertools

import known
import numpy as np
import pytest
import validation
from seam import png

from gradflow.analysis import Rate

pytestmark = pytest.mark.usefixtures("one_thread")


def test_networks_with_a_known_rate() -> None:
    rows = list(itertools.islice(known.networks(), 5))
    assert [row.name for row in rows][2:] == [
        "h' = σ(8h − 4), at h = ½",
        "LSTM, W = 0, forget bias 1",
        "GRU, W = 0, update bias 1",
    ]
    for row in rows:
        assert row.rate.value == pytest.approx(row.known, abs=1e-9), row.name
        assert row.holds


def test_half_lives_and_horizons() -> None:
    for one in known.memories(60):
        expected, measured = one.half_life
        assert measured == pytest.approx(expected, rel=1e-9), one.name
        assert one.searched == 59
        first, found = one.horizon
        assert found == (first if first < 60 else None), one.name


def test_coverage_of_what_is_claimed_and_of_what_is_not() -> None:
    shares = known.coverage(repeats=600, steps=50)
    assert 0.92 <= np.min(list(shares.values())) <= np.max(list(shares.values())) <= 0.98
    assert known.coverage_of_a_regression(repeats=500) < 0.2


def test_a_row_can_miss() -> None:
    assert known.Row("", "", 0.1, Rate(0.1, 0.09, 0.11)).holds
    assert not known.Row("", "", 0.12, Rate(0.1, 0.09, 0.11)).holds
    assert known.Row("", "", 0.12, Rate(0.1, 0.09, 0.11), within=0.03).holds


def test_the_page_is_drawn_and_written_as_a_table() -> None:
    rows = [
        known.Row("maps", "logistic", 0.69, Rate(0.7, 0.68, 0.72)),
        known.Row("maps", "", -0.69, Rate(-0.7, -0.71, -0.695)),
        known.Row("networks", "RNN", -0.55, Rate(-0.54, -0.56, -0.52), within=0.06),
    ]
    shares = dict.fromkeys(known.KINDS, [0.95] * len(known.COUNTS))
    memory = [
        known.Memory("RNN", (6.58, 6.58), (66, 66), 299),
        known.Memory("slow", (69.0, 69.0), (688, None), 299),
    ]
    figure = validation.draw(rows, shares, 0.93, 0.12, memory)
    words = " ".join(text.get_text() for text in figure.texts)
    assert "1 of 2 intervals" in words and "cover 12 %" in words
    assert png(figure, dpi=40).startswith(b"\x89PNG")
    text = validation.table(rows, shares, memory)
    assert text.startswith("Made by `python tests/validation.py`.")
    assert "| slow | 69.0000 | 69.0000 | 688 | > 299 |" in text
    assert "| logistic | −0.6900 | closed form | −0.7000 | −0.7100 … −0.6950 |" in text
