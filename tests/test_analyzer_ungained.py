"""A layer whose step Jacobians are not known: no verdict on gains, but all that needs none."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import gradflow
from gradflow.analysis import LayerAnalysis
from gradflow.reporter import KINDS

STEPS, BATCH, WIDTH = 12, 3, 6


class Attending(nn.Module):
    """A cell whose next step reads all its earlier states: more goes around than one state."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.inner(torch.cat([x, h], 1)))


def attended(reads: str = "last") -> gradflow.Recording:
    torch.manual_seed(0)
    model = Attending().double()
    with gradflow.record(model) as recording:
        past = [torch.zeros(BATCH, WIDTH, dtype=torch.float64)]
        for _ in range(STEPS):
            read = torch.stack(past).mean(0)
            past.append(model(read, past[-1]))
        (past[-1] if reads == "last" else torch.stack(past)).pow(2).sum().backward()
    return recording


@pytest.fixture(scope="module")
def layer() -> LayerAnalysis:
    (found,) = gradflow.analyze(attended()).values()
    return found


def test_no_verdict_is_given_and_one_sentence_says_what_goes_around(layer: LayerAnalysis) -> None:
    assert layer.verdict == "inconclusive" and layer.labels[0] == "no gains"
    assert "more goes around it than its states" in layer.sentence
    assert layer.sentence.startswith("cell gets no verdict, since its gains are not known: ")
    assert layer.title.endswith(": no verdict, its gains are not known")
    assert math.isnan(layer.rate.value) and layer.lyapunov is None and not layer.findings
    assert layer.data["log_gain"].sizes["source"] == 0


def test_totals_are_there_and_the_profile_is_that_of_the_whole_loss(layer: LayerAnalysis) -> None:
    track = attended()["cell"]
    norms = layer.data["grad_norm"].sel(state="h")
    total = track.grad_h.norm(dim=2).median(dim=1).values.numpy()
    np.testing.assert_allclose(norms.sel(kind="total").values, total, rtol=1e-12)
    assert np.isnan(norms.sel(kind="last").values).all()
    size = track.grad_h.pow(2).mean(dim=(1, 2)).sqrt().numpy()[::-1]
    profile = 10 ** layer.data["log10_grad"].sel(state="h").values
    np.testing.assert_allclose(np.sqrt((profile**2).mean(0)), size / size[0], rtol=1e-12)
    assert np.isnan(layer.data["memory_steps"].values).all()


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_picture_can_be_drawn(kind: str) -> None:
    figure = gradflow.plot(attended("every"), kind=kind)
    assert len(figure.axes) > 0


@pytest.mark.parametrize("kind", ["overview", "states", "total-vs-direct"])
def test_pictures_that_need_no_gain_show_numbers(kind: str) -> None:
    figure = gradflow.plot(attended("every"), kind=kind)
    words = [text.get_text() for text in figure.findobj(lambda a: hasattr(a, "get_text"))]
    drawn = [ax for ax in figure.axes if ax.images or ax.lines]
    assert drawn
    if kind != "total-vs-direct":
        assert any("whole loss" in text for text in words)


def test_a_report_is_written_and_read_back(tmp_path: Path) -> None:
    recording = attended()
    run = gradflow.analyze(recording)
    gradflow.report(recording, tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "gets no verdict, since its gains are not known" in page
    again = gradflow.load(tmp_path / "out")
    assert again["cell"].labels == run["cell"].labels


def test_the_page_of_a_layer_without_gains_folds_no_empty_picture(tmp_path: Path) -> None:
    paths = gradflow.report(gradflow.analyze(attended()), tmp_path / "run")
    page = paths["report.html"].read_text(encoding="utf-8")
    summaries = [fold.split("</summary>")[0] for fold in page.split("<summary>")[1:]]
    assert not any("lag curve" in summary for summary in summaries)
    assert any("gradient at every unit" in summary for summary in summaries)
    assert paths["figures/cell-lag-curve.png"].exists()
