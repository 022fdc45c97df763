"""Comparing runs: what is paired with what, and when a difference counts."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import gradflow
from gradflow.cli import _code
from gradflow.cli import gradflow as command
from gradflow.comparison import _interval, changes, names_of, unpaired


def test_the_interval_of_a_difference_covers_as_it_says() -> None:
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(4000):
        before, after = random.normal(0, 1, 6), random.normal(0.3, 3, 11)
        low, high = _interval(before, after)
        covered += low <= 0.3 <= high
    assert 0.93 < covered / 4000 < 0.97


def test_the_interval_is_welchs() -> None:
    before, after = np.array([1.0, 2.0, 4.0]), np.array([2.0, 7.0, 3.0, 9.0])
    found = stats.ttest_ind(after, before, equal_var=False).confidence_interval(0.95)
    assert _interval(before, after) == pytest.approx((found.low, found.high), rel=1e-9)


def test_one_sequence_gives_no_interval() -> None:
    assert all(math.isnan(bound) for bound in _interval(np.array([1.0]), np.array([1.0, 2.0])))


def run(bias: float, layers: int = 1, batch: int = 8, seed: int = 0) -> gradflow.Analysis:
    torch.manual_seed(seed)
    lstm = nn.LSTM(3, 8, layers)
    with torch.no_grad():
        lstm.bias_ih_l0[8:16] = bias
    return gradflow.diagnose(lstm, torch.randn(30, batch, 3))


def test_a_change_that_counts_and_one_that_does_not() -> None:
    counts, same = changes({"a": run(0.0), "b": run(3.0), "c": run(0.0)})
    assert counts.larger is True and counts.low > 0
    assert (
        "vanishing → stable" in counts.sentence and "more than sequences differ" in counts.sentence
    )
    assert same.larger is False and "do not differ" in same.sentence


def test_one_sequence_is_said() -> None:
    (change,) = changes({"a": run(0.0, batch=1), "b": run(3.0)})
    assert change.larger is None and "give two sequences or more" in change.sentence


def test_layers_that_stand_alone_are_named() -> None:
    runs = {"a": run(0.0, layers=2), "b": run(0.0)}
    assert [change.layer for change in changes(runs)] == ["l0"]
    assert unpaired(runs) == ["l1 is in a only"]


def test_single_layers_are_paired_whatever_their_names() -> None:
    one, other = run(0.0), gradflow.diagnose(nn.Sequential(nn.GRU(3, 8)), torch.randn(30, 4, 3))
    (change,) = changes({"a": one, "b": other})
    assert "l0 → 0.l0" in change.sentence


def test_names_are_told_apart() -> None:
    assert names_of([Path("a.pt"), Path("a.pt"), Path("x/a.pt")]) == ["a.pt", "a.pt (2)", "x/a.pt"]


def call(*arguments: str) -> int:
    return _code(lambda: command.main(arguments, standalone_mode=False, prog_name="gradflow"))


def test_model_files_are_analyzed_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    torch.manual_seed(0)
    for name in ("before", "after"):
        torch.save(nn.GRU(3, 6).state_dict(), f"{name}.pt")
    assert call("compare", "before.pt", "after.pt", "--seq-len", "20") == 0
    out = capsys.readouterr().out
    assert "l0, before → after: vanishing in both" in out
    assert max(map(len, out.splitlines())) <= 80
    assert Path("reports/comparison/comparison.png").exists()


def test_quiet_and_verbose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    torch.save(nn.LSTM(3, 6, 2).state_dict(), "m.pt")
    assert call("analyze", "m.pt", "--seq-len", "20", "-q") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all("vanishes" in line for line in lines)
    assert call("report", "reports/m", "-v") == 0
    said = capsys.readouterr().out
    assert "more finding" not in said and "4. " in said


def test_completion_needs_no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    import subprocess
    import sys

    code = "import sys; from gradflow.cli import main\ntry: main()\nfinally: print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={
            "_GRADFLOW_COMPLETE": "bash_complete",
            "COMP_WORDS": "gradflow comp",
            "COMP_CWORD": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines() == ["plain,compare", "False"]
