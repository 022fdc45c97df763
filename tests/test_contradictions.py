"""Random layers, and whatever is said of them: nothing contradicts the gain map or something else."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import contradictions
import numpy as np
import pytest

import gradflow
from gradflow.analysis import Gain, LayerAnalysis, Rate

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("kind", range(4), ids=contradictions.KINDS)
def test_nothing_said_of_a_random_layer_contradicts_its_map(kind: int) -> None:
    assert [said for n in range(8) for said in contradictions.disagreements(4 * n + kind)] == []


def shifted(layer: LayerAnalysis, name: str, by: float) -> LayerAnalysis:
    """The same with one array moved."""
    return replace(layer, data=layer.data.assign({name: layer.data[name] + by}))


WRONG: dict[str, tuple[str, Callable[[LayerAnalysis], LayerAnalysis]]] = {
    "gain": ("gain", lambda layer: replace(layer, gain=Gain(-3.0, -3.1, -2.9, layer.gain.steps))),
    "verdict": ("verdict", lambda layer: replace(layer, verdict="stable")),
    "curve": ("curve", lambda layer: shifted(layer, "lag_median", 0.1)),
    "horizon": ("curve", lambda layer: replace(layer, horizon=layer.horizon + 1)),
    "half-life": ("half_life", lambda layer: replace(layer, half_life=4 * layer.half_life)),
    "a half-life that is not known": (
        "half_life",
        lambda layer: replace(layer, labels=("not settled",)),
    ),
    "sentence": ("sentence", lambda layer: replace(layer, sentence="l0 is stable: all is well")),
    "a number in it": (
        "sentence",
        lambda layer: replace(
            layer, sentence="l0 vanishes and is gone in every direction after 99 steps"
        ),
    ),
    "title": (
        "sentence",
        lambda layer: replace(layer, title="1 of 8 directions survives 39 steps"),
    ),
    "dotted line": ("rate", lambda layer: shifted(layer, "lag_fit", np.arange(40.0))),
    "rate": ("rate", lambda layer: replace(layer, rate=Rate(-0.01, -0.011, -0.009))),
    "bar": ("curve", lambda layer: replace(layer, searched=3)),
}


WRONG_SPECTRUM = {
    "fades": ("stable", (), "every direction fades in the long run"),
    "keeps": ("vanishing", (), "in the long run 2 of 8 keep a tenth or more over 39 steps"),
    "not settled": ("vanishing", ("not settled",), "the largest exponent is −0.2 per step"),
}


@pytest.fixture(scope="module")
def fading() -> tuple[LayerAnalysis, contradictions.Map]:
    """A GRU of eight units over 40 steps, and its map."""
    import torch

    torch.manual_seed(0)
    gru = torch.nn.GRU(3, 8).double()
    with gradflow.record(gru) as recording:
        gru(torch.randn(40, 4, 3, dtype=torch.float64))[0][-1].sum().backward()
    return gradflow.analyze(recording)["l0"], contradictions.slow_map(recording["l0"])


@pytest.mark.parametrize(("part", "spoil"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_noticed(
    fading: tuple[LayerAnalysis, contradictions.Map],
    part: str,
    spoil: Callable[[LayerAnalysis], LayerAnalysis],
) -> None:
    layer, seen = fading
    assert layer.verdict == "vanishing" and math.isfinite(layer.half_life)
    assert contradictions.contradictions(layer, seen) == []
    found = contradictions.contradictions(spoil(layer), seen)
    assert any(said.startswith(f"{part}:") for said in found), found


@pytest.mark.parametrize(("verdict", "labels", "said"), WRONG_SPECTRUM.values(), ids=WRONG_SPECTRUM)
def test_a_wrong_sentence_of_the_lyapunov_figure_is_noticed(
    fading: tuple[LayerAnalysis, contradictions.Map],
    verdict: str,
    labels: tuple[str, ...],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer, seen = replace(fading[0], verdict=verdict, labels=labels), fading[1]
    assert not [f for f in contradictions.contradictions(layer, seen) if f"'{said}" in f]
    chart = replace(contradictions.lyapunov.prepare(layer), message=said)
    monkeypatch.setattr(contradictions.lyapunov, "prepare", lambda _: chart)
    found = contradictions.contradictions(layer, seen)
    assert any(one.startswith(f"figures: '{said}") for one in found), found
