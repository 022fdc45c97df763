"""Many recordings, analyses and reports in one process leave nothing behind that grows.

`python tests/steadiness.py soak` does so many thousand times.
"""

from __future__ import annotations

from typing import Any

import pytest
import soak
import torch
from torch import nn

import gradflow

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::gradflow.GradflowWarning"),
]
MOST = 1000  # bytes by which one repetition may grow the memory of the process


@pytest.mark.parametrize(("part", "times"), [("recordings", 200), ("analyses", 12)])
def test_nothing_grows(part: str, times: int) -> None:
    grown = soak.growth(soak.PARTS[part]()[0], times, soak.PARTS[part]()[1], samples=8)
    assert grown.more == {}
    assert grown.bytes_each < MOST + 3 * grown.noise


def test_reports_leave_no_figure_and_no_file_open() -> None:
    work, models = soak.reports()
    assert soak.growth(work, 1, models).more == {}


def test_what_is_kept_would_be_seen() -> None:
    kept: list[Any] = []
    model = nn.RNN(2, 8)

    def work() -> None:
        with gradflow.record(model) as recording:
            model(torch.randn(400, 3, 2))[0].sum().backward()
        kept.append(recording)
        model.register_forward_hook(lambda *_: None)

    grown = soak.growth(work, 60, [model], samples=8)
    assert grown.bytes_each > 5 * MOST
    assert grown.more["tensors"] > 60 and grown.more["hooks"] == 60


@pytest.mark.parametrize("kind", ["fused", "cells"])
def test_long_sequences_do_not_overflow_the_stack(kind: str) -> None:
    soak.long(kind, soak.LONG[kind] // (1 if kind == "fused" else 4))()
