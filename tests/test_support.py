"""What the README says is supported is; what it says is refused is, in those words."""

from __future__ import annotations

import pytest
import support
import torch

from gradflow.cells import CELLS

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("row", support.SUPPORTED, ids=lambda row: row.what)
def test_supported(row: support.Supported) -> None:
    recording = row.run()
    assert len(recording)
    for track in recording.values():
        assert track.grads[track.main_state].isfinite().any()
        assert track.operator(torch.float64).length == track.steps
        if track.cell in CELLS:
            assert track.parity.status == "passed", track.parity


@pytest.mark.parametrize("row", support.REFUSED, ids=lambda row: row.what)
def test_refused_in_these_words(row: support.Refused) -> None:
    assert row.words in row.run()


def test_the_readme_says_so() -> None:
    """If not: python tests/support.py"""
    text = support.README.read_text()
    assert support.written(text) == text


def test_another_table_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "REFUSED", support.REFUSED[1:])
    text = support.README.read_text()
    assert support.written(text) != text
