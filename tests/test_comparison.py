"""Comparing runs: what is paired with what, and when a difference counts."""

from __future__ import annotations

import json
import math
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from seam import welch
from torch import nn

import gradflow
from gradflow import completion
from gradflow.cli import _code
from gradflow.cli import gradflow as command
from gradflow.comparison import changes, circumstances, headline, names_of, unpaired
from gradflow.loading import losses


def test_the_interval_of_a_difference_covers_as_it_says() -> None:
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(4000):
        before, after = random.normal(0, 1, 6), random.normal(0.3, 3, 11)
        low, high = welch(before, after)
        covered += low <= 0.3 <= high
    assert 0.93 < covered / 4000 < 0.97


def test_the_interval_is_welchs() -> None:
    before, after = np.array([1.0, 2.0, 4.0]), np.array([2.0, 7.0, 3.0, 9.0])
    found = stats.ttest_ind(after, before, equal_var=False).confidence_interval(0.95)
    assert welch(before, after) == pytest.approx((found.low, found.high), rel=1e-9)


def test_one_sequence_gives_no_interval() -> None:
    assert all(math.isnan(bound) for bound in welch(np.array([1.0]), np.array([1.0, 2.0])))


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
    assert (
        "the largest gain over 29 steps rises by" in counts.sentence
        and "95 % interval [+" in counts.sentence
    )
    assert same.larger is False and "does not differ" in same.sentence
    assert f"horizon in steps: {run(0.0)['l0'].horizon} in both" in same.sentence
    assert (
        headline([counts, same])
        == "Differences beyond chance (95 % interval for all at once): 1 of 2."
    )
    assert headline([same]) == "Differences beyond chance (95 % interval): none of 1."


def test_seeds_of_an_analysis_are_no_change_at_all() -> None:
    torch.manual_seed(0)
    gru = nn.GRU(4, 8)
    with torch.no_grad():
        gru.bias_ih_l0[8:16] += 3
    with gradflow.record(gru) as recording:
        gru(torch.randn(30, 8, 4))[0][-1].pow(2).mean().backward()
    runs = {str(seed): gradflow.analyze(recording, seed=seed) for seed in range(3)}
    found = changes(runs)
    assert [change.larger for change in found] == [False, False]
    assert all("does not differ" in change.sentence for change in found)


def shares_beyond_chance(among: int, draws: int = 1500) -> tuple[float, float]:
    """Of comparisons of two batches of one model of four layers: single differences, and any of four."""
    torch.manual_seed(1)
    gru = nn.GRU(4, 6, 4)
    with torch.no_grad():
        gru.bias_ih_l0[6:12] += 3
    with gradflow.record(gru) as recording:
        gru(torch.randn(20, 600, 4))[0][-1].pow(2).mean().backward()
    layers = gradflow.analyze(recording)
    gains = np.stack([layer.data["sequence_gain"].values for layer in layers.values()])  # (4, 600)
    random = np.random.default_rng(0)
    beyond = np.zeros((draws, len(gains)), dtype=bool)
    for draw in range(draws):
        batches = random.permutation(gains.shape[1])[:16].reshape(2, 8)
        ends = [welch(each[batches[0]], each[batches[1]], among) for each in gains]
        beyond[draw] = [low > 0 or high < 0 for low, high in ends]
    return float(beyond.mean()), float(beyond.any(1).mean())


def test_two_batches_of_a_model_differ_beyond_chance_at_most_5_times_in_100() -> None:
    single, any_alone = shares_beyond_chance(among=1)
    assert 0.03 < single <= 0.055
    _, any_of_four = shares_beyond_chance(among=4)
    assert (
        0.02 < any_of_four <= 0.05 < any_alone
    )  # each by itself, one in seven comparisons is wrong


def test_differences_are_held_against_all_that_are_looked_at() -> None:
    one, two = run(0.0), run(3.0)
    (alone,) = changes({"a": one, "b": two})
    both = changes({"a": one, "b": two, "c": two})
    assert (alone.among, [change.among for change in both]) == (1, [2, 2])
    assert both[0].high - both[0].low > alone.high - alone.low
    assert "for all 2 at once: " in both[0].sentence and "at once" not in alone.sentence


def test_less_than_gains_are_measured_to_is_no_difference() -> None:
    """Sequences that are all alike have an interval without width."""
    torch.manual_seed(0)
    rnn = nn.RNN(3, 8)
    one = gradflow.diagnose(rnn, torch.zeros(30, 4, 3))
    with torch.no_grad():
        rnn.weight_hh_l0.mul_(1 + 1e-6)
    (change,) = changes({"a": one, "b": gradflow.diagnose(rnn, torch.zeros(30, 4, 3))})
    assert change.larger is False and 0 < abs(change.difference) < 1e-3
    with torch.no_grad():
        rnn.weight_hh_l0.mul_(1.01)
    (change,) = changes({"a": one, "b": gradflow.diagnose(rnn, torch.zeros(30, 4, 3))})
    assert change.larger is True and change.low > 1e-3


def test_what_both_do_is_said_to_be_faster_or_slower() -> None:
    slower, faster = changes({"a": run(0.0), "b": run(0.5), "c": run(-1.0)})
    assert "vanishing in both, more slowly; " in slower.sentence
    assert "vanishing in both, faster; " in faster.sentence and "falls by" in faster.sentence


def test_what_else_differs_between_two_runs_is_said() -> None:
    one, other = run(0.0), gradflow.diagnose(nn.LSTM(3, 8).eval(), torch.randn(20, 8, 3))
    probed, given = (
        replace(one, provenance={**one.provenance, "input": said})
        for said in ("probes: zeros; B = 16, T = 30", "batch.pt")
    )
    assert circumstances({"a": one, "b": one}) == []
    steps, modes = circumstances({"a": one, "b": other})
    assert steps.startswith("a ran for 30 steps, b for 20")
    assert modes.startswith("a ran in training mode, b in evaluation mode")
    (inputs,) = circumstances({"a": probed, "b": given})
    assert inputs.startswith("a was measured on probes, b on batch.pt")


def test_layers_of_other_names_are_paired_in_order_where_there_are_as_many() -> None:
    one = run(0.0, layers=2)
    other = gradflow.diagnose(nn.Sequential(nn.LSTM(3, 8, 2)), torch.randn(30, 8, 3))
    first, second = changes({"a": one, "b": other})
    assert "l0 → 0.l0" in first.sentence and "l1 → 0.l1" in second.sentence


def test_dead_layers_are_compared_in_words() -> None:
    rnn = nn.RNN(3, 8)
    alive = gradflow.diagnose(rnn, torch.randn(30, 4, 3))
    nn.init.zeros_(rnn.weight_hh_l0)
    dead = gradflow.diagnose(rnn, torch.randn(30, 4, 3))
    died, same = changes({"a": alive, "b": dead})[0], changes({"a": dead, "b": dead})[0]
    assert died.larger is True and "vanishing → dead" in died.sentence
    assert "exact zeros cut every path in one of them" in died.sentence
    assert same.larger is False and "exact zeros cut every path in both" in same.sentence


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
    assert names_of([Path("runs/a"), Path("runs/a")]) == ["a", "a (2)"]


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
    assert out.splitlines()[-1] == "next: gradflow analyze after.pt --seq-len 20"


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
    assert "more finding" not in said and "; likewise l" in said  # one remedy for the stack


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("gradflow comp", ["plain,compare"]),
        ("gradflow analyze --loss c", ["plain,cross-entropy"]),
        ("gradflow analyze --fail-on st", ["plain,stable"]),
        (
            "gradflow report --fail-on vanishing,horizon<5,e",
            ["plain,vanishing,horizon<5,exploding"],
        ),
        ("gradflow report --forc", ["plain,--force"]),
        ("gradflow compare re", ["file,re"]),
    ],
)
def test_completion_needs_no_torch(typed: str, completed: list[str]) -> None:
    code = "import sys; from gradflow.cli import main\ntry: main()\nfinally: print('torch' in sys.modules)"
    words = shlex.quote(typed.split()[-1])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={
            "_GRADFLOW_COMPLETE": "bash_complete",
            "COMP_WORDS": " ".join([*typed.split()[:-1], words]),
            "COMP_CWORD": str(len(typed.split()) - 1),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines() == [*completed, "False"]


def test_completion_knows_the_losses_there_are() -> None:
    assert completion.LOSSES == losses.LOSS_NAMES


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_help_says_how_completion_is_switched_on(
    shell: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("--help") == 0
    assert f"_GRADFLOW_COMPLETE={shell}_source gradflow" in capsys.readouterr().out


def test_bash_completes_what_the_help_says(tmp_path: Path) -> None:
    program = tmp_path / "gradflow"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m gradflow "$@"\n')
    program.chmod(0o755)
    script = """
        eval "$(_GRADFLOW_COMPLETE=bash_source gradflow)"
        COMP_WORDS=(gradflow analyze --loss b); COMP_CWORD=3
        _gradflow_completion gradflow b --loss; echo "${COMPREPLY[@]}"
    """
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script],
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("bce\n", "")


def test_a_comparison_in_python_is_table_figure_page_and_json(tmp_path: Path) -> None:
    found = gradflow.compare(run(0.0), run(3.0))
    assert list(found.table["run"]) == ["LSTM", "LSTM (2)"] and list(found.changes["larger"]) == [
        True
    ]
    assert "vanishing → stable" in repr(found) and found.sentences[1] in found._repr_html_()
    words = [text.get_text() for text in found.figure.texts]
    assert any("LSTM (2)" in text for text in words)
    page = found.save(tmp_path / "both").read_text()
    assert "vanishing → stable" in page and "<script>" in page and len(page) < 1e6
    assert "half-life" in page and "half- life" not in page
    assert (
        'class="fits"' in page and page.count("data:image/png") == 2
    )  # one of them for a telephone
    told = json.loads((tmp_path / "both/comparison.json").read_text())
    assert set(told["runs"]) == {"LSTM", "LSTM (2)"}
    assert told["changes"][0]["sentence"] == found.changes["sentence"][0]


def test_more_than_four_runs_are_a_trend_and_a_name_is_escaped(tmp_path: Path) -> None:
    runs = {f"epoch {n} <b>": run(float(n)) for n in range(5)}
    found = gradflow.compare(runs)
    gain, reach = found.figure.axes
    decades = [one["l0"].decades for one in runs.values()]
    assert gain.lines[0].get_ydata().tolist() == pytest.approx(decades)
    far = [one["l0"].horizon or one["l0"].searched for one in runs.values()]
    assert reach.lines[0].get_ydata().tolist() == far
    assert "<b>," not in found._repr_html_()
    page = found.save(tmp_path / "trend").read_text()
    assert 'class="fits"' in page and page.count("data:image/png") == 2  # one for a telephone


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(gradflow.GradflowError, match="must be two runs or more, got 1"):
        gradflow.compare(run(0.0))
    with pytest.raises(gradflow.GradflowError, match="must be an Analysis or a History, got str"):
        gradflow.compare(run(0.0), "reports/run")  # type: ignore[arg-type]


def test_runs_of_folders_of_batches_are_compared_over_batches(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Welch's interval over the batches' own gains, and it says that these are the unit."""
    (tmp_path / "batches").mkdir()
    for n in range(4):
        torch.manual_seed(n)
        np.save(tmp_path / f"batches/{n}.npy", torch.randn(30, 5, 3).numpy())
    files = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        files.append(str(tmp_path / f"{seed}.pt"))
        torch.save(nn.GRU(3, 8).state_dict(), files[-1])
    options = ["--model", "torch.nn:GRU(3, 8)", "--input", str(tmp_path / "batches"), "--json"]
    assert call("compare", *files, *options, "-o", str(tmp_path / "made")) == 0
    (change,) = json.loads(capsys.readouterr().out)["changes"]
    each = []
    for file in files:
        model = nn.GRU(3, 8)
        model.load_state_dict(torch.load(file))
        paths = [tmp_path / f"batches/{n}.npy" for n in range(4)]
        runs = [gradflow.diagnose(model, torch.from_numpy(np.load(path))) for path in paths]
        each.append(np.array([run["l0"].gain.value for run in runs]))
    assert change["difference"] == pytest.approx(each[1].mean() - each[0].mean(), rel=1e-9)
    assert (change["low"], change["high"]) == pytest.approx(welch(*each), rel=1e-6)
    assert "more than batches differ by chance" in change["sentence"]
