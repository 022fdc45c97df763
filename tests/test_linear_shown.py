"""A linear recurrence analyzed, saved, drawn and put into words."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from linear_oracles import random, unit
from seam import LinearSteps, decay_words, heads, is_linear, paint, time_scales
from test_linear_measured import recorded

import gradflow
from gradflow.analysis import Analysis, LayerAnalysis
from gradflow.reporter import KINDS

T, B = 64, 3


def of_heads(*decays: float, beta: float | None = None, scatter: float = 1e-3) -> LinearSteps:
    """Heads of these decays; with beta a delta rule."""
    count, d_k, d_v = len(decays), 3, 2
    noise = random(T, B, count, 1, 1, seed=7, low=1 - scatter)
    decay = torch.tensor(decays).double().view(1, 1, -1, 1, 1) * noise
    keys = unit(random(T, B, count, d_k, seed=8, low=-1.0))
    write = (keys.unsqueeze(-1), random(T, B, count, 1, d_v, seed=9, low=-1.0))
    if beta is None:
        return LinearSteps(shape=(count, d_k, d_v), decay=decay, write=write)
    left = -beta * decay[..., 0] * keys
    return LinearSteps(shape=(count, d_k, d_v), decay=decay, left=left, right=keys, write=write)


def analyzed(steps: LinearSteps) -> Analysis:
    return gradflow.analyze(recorded(steps))


@pytest.fixture(scope="module")
def mixed() -> Analysis:
    return analyzed(of_heads(0.5, 1.0, 0.85))


def test_the_sentence_tells_the_heads_apart(mixed: Analysis) -> None:
    layer = mixed["mixer"]
    assert layer.verdict == "stable"
    assert "; of its 3 heads 2 vanish, 1 is stable" in layer.sentence
    assert layer.findings == ()


def test_the_table_of_heads(mixed: Analysis) -> None:
    table = mixed.frame("heads")
    assert table["verdict"].tolist() == ["vanishing", "stable", "vanishing"]
    assert table["horizon"].isna().tolist() == [False, True, False]
    assert table["horizon"][0] in (10, 11)  # 0.5¹⁰ < 10⁻³
    assert (table["gain_low"] <= table["gain"]).all()


def test_the_picture_of_heads_is_drawn_by_hand(mixed: Analysis) -> None:
    """A row per head, the longest memory on top; a column per distance, on a logarithmic axis."""
    gains = mixed.frame("head_lags").pivot(index="head", columns="lag", values="median") / np.log(
        10
    )
    order = mixed.frame("heads").sort_values("gain", ascending=False, kind="stable")["head"]
    lags = gains.columns.to_numpy(dtype=float)
    distances = np.log(np.geomspace(lags[0], lags[-1], 240))
    nearest = np.abs(distances[:, None] - np.log(lags)).argmin(1)
    wanted = paint(gains.loc[order].to_numpy()[:, nearest])
    images = [
        np.asarray(one.get_array())
        for ax in gradflow.plot(mixed, "heads").axes
        for one in ax.images
    ]
    assert any(image.shape == wanted.shape and (image == wanted).all() for image in images)
    assert not any(
        image.shape == wanted.shape and (image == wanted[::-1]).all() for image in images
    )


def test_the_picture_of_heads_is_sorted_by_memory(mixed: Analysis) -> None:
    chart = heads.prepare(mixed["mixer"])
    assert chart.heads == (2, 3, 1)
    assert chart.values.shape[0] == 3
    assert (np.diff(chart.values[:, -1]) < 0).all()
    assert chart.message.startswith(
        "of 3 heads 2 vanishing, 1 stable; 1 of them not gone within 63"
    )
    gradflow.plot(mixed, "heads")


def test_a_layer_without_heads_says_so() -> None:
    steps = LinearSteps(shape=(4,), decay=random(T, B, 4, low=0.9), write=(random(T, B, 4),))
    run = analyzed(steps)
    assert heads.prepare(run["mixer"]).note == "This layer has no heads beside each other."
    assert len(run.frame("heads")) == 0


def test_saved_and_loaded_it_is_the_same(mixed: Analysis, tmp_path: Path) -> None:
    again = gradflow.load(mixed.save(tmp_path / "run.nc"))
    assert again.frame("heads").equals(mixed.frame("heads"))
    assert again["mixer"].sentence == mixed["mixer"].sentence
    assert again["mixer"].data.equals(mixed["mixer"].data)


def test_the_report_holds_the_table_the_picture_and_the_words(
    mixed: Analysis, tmp_path: Path
) -> None:
    paths = gradflow.report(mixed, tmp_path / "run")
    assert {"heads.csv", "figures/mixer-heads.png"} <= set(paths)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "How a linear recurrence differs" in page
    assert decay_words(mixed["mixer"]) in page


def test_other_layers_are_no_linear_recurrences(tmp_path: Path) -> None:
    run = gradflow.diagnose(torch.nn.GRU(2, 3), torch.randn(9, 2, 2))
    assert not is_linear(run["l0"])
    paths = gradflow.report(run, tmp_path / "run", formats=("html", "csv"))
    assert "heads.csv" not in paths
    assert "linear recurrence differs" not in (tmp_path / "run" / "report.html").read_text()


def found(layer: LayerAnalysis, name: str) -> str:
    return next((f.message for f in layer.findings if f.name == name), "")


def test_entries_that_forget_at_once() -> None:
    layer = analyzed(of_heads(1e-5, 0.7, 0.8))["mixer"]
    assert found(layer, "forgets-at-once").startswith("33 % of the 18 entries of the state forget")


def test_entries_that_never_forget_beside_one_that_grows() -> None:
    layer = analyzed(of_heads(1.0, 1.1, scatter=1e-6))["mixer"]
    assert layer.verdict == "exploding"
    assert found(layer, "never-forgets").startswith(
        "100 % of the entries of the state never forget"
    )
    advice = next(f.advice for f in layer.findings if f.name == "exploding")
    assert "a linear recurrence grows only where |a| > 1" in advice
    assert "chaos" not in advice


def test_a_decay_at_its_bound() -> None:
    decay = random(T, B, 8, low=0.4, high=0.9).clamp(min=0.5452)
    steps = LinearSteps(shape=(8,), decay=decay, write=(random(T, B, 8, seed=4),))
    layer = analyzed(steps)["mixer"]
    assert layer.verdict == "vanishing"
    assert "the smallest that was seen, 0.545 a step" in found(layer, "decay-at-bound")
    assert "as at a bound" in decay_words(layer)


def test_one_channel_below_the_others_is_no_bound() -> None:
    decay = random(T, B, 8, low=0.9, high=0.9001) - 0.03 * torch.arange(8)
    layer = analyzed(LinearSteps(shape=(8,), decay=decay, write=(random(T, B, 8, seed=4),)))[
        "mixer"
    ]
    assert layer.verdict == "vanishing"
    assert not found(layer, "decay-at-bound")


def test_decays_are_no_gates_that_a_gated_cell_would_mend() -> None:
    layer = analyzed(of_heads(1e-5, 1e-4, 0.01))["mixer"]
    assert layer.verdict == "vanishing" and found(layer, "forgets-at-once")
    assert not found(layer, "saturated-gates")


def test_heads_that_erase() -> None:
    steps = of_heads(0.9, 0.8, beta=1.0)
    layer = analyzed(steps)["mixer"]
    assert found(layer, "erasing-heads").startswith("heads 1, 2 of 2 erase a direction at 100 %")
    assert "erases most" in decay_words(layer)


def test_time_scales_are_those_of_the_decays() -> None:
    decay = torch.tensor([0.5, 0.9, 0.99], dtype=torch.float64).expand(T, B, 3)
    steps = LinearSteps(shape=(3,), decay=decay, write=(random(T, B, 3),))
    layer = analyzed(steps)["mixer"]
    np.testing.assert_allclose(layer.data["time_scale"], -1 / np.log([0.5, 0.9, 0.99]))
    chart = time_scales.prepare(layer)
    assert chart.note == ""
    assert "decay |a|" in chart.reading


@pytest.mark.parametrize("steps", [1, 2])
def test_hardly_any_step(steps: int, tmp_path: Path) -> None:
    made = LinearSteps(shape=(4,), decay=random(steps, B, 4), write=(random(steps, B, 4),))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gradflow.GradflowWarning)
        run = analyzed(made)
    assert steps > 1 or run["mixer"].verdict == "inconclusive"
    gradflow.report(run, tmp_path / "run")


def test_a_decay_that_is_not_finite_gives_no_gains() -> None:
    decay = random(T, B, 4, low=0.5)
    decay[3, 1, 2] = float("nan")
    h = torch.randn(T, B, 4, requires_grad=True)
    with gradflow.record(torch.nn.Identity()) as recording:
        gradflow.scan(h * 1, decay=decay, time=0).sum().backward()
    layer = gradflow.analyze(recording)["scan"]
    assert layer.verdict == "inconclusive"
    assert "its decay holds NaN or Inf" in layer.sentence


NOT_FOR_IT = {"triangle", "lag-gradient", "layers", "paths", "blocks", "gates"}  # say so instead


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "overview"])
def test_every_picture_can_be_drawn(kind: str, mixed: Analysis) -> None:
    axes = gradflow.plot(mixed, kind).axes
    assert any(ax.has_data() for ax in axes) == (kind not in NOT_FOR_IT)
    if kind in NOT_FOR_IT:
        assert any(text.get_text().endswith((".", ")")) for ax in axes for text in ax.texts)


def test_two_runs_are_compared(mixed: Analysis) -> None:
    other = analyzed(of_heads(0.5, 0.99, 0.9))
    figure = gradflow.plot([mixed.titled("one"), other.titled("other")])
    said = " ".join(text.get_text() for text in figure.texts)
    assert "one" in said and "other" in said
