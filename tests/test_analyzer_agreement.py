"""One verdict from several probes of the same weights."""

from __future__ import annotations

import pytest
import torch
from seam import agreed, agreed_by_votes, votes
from torch import nn

import gradflow

pytestmark = pytest.mark.usefixtures("one_thread")
PROBES = ["inputs 0", "inputs N(0, 1)"]


def runs(gain: float) -> list[gradflow.Analysis]:
    """An orthogonal tanh RNN under no input, which keeps everything, and under a strong one."""
    rnn = nn.RNN(3, 8, bias=False)
    nn.init.orthogonal_(rnn.weight_hh_l0)
    found = []
    for scale in (0.0, gain):
        with gradflow.record(rnn) as recording:
            rnn(scale * torch.randn(40, 8, 3))[0][-1].sum().backward()
        found.append(gradflow.analyze(recording))
    return found


def test_probes_that_disagree_give_no_verdict_and_all_rates() -> None:
    first, second = runs(5.0)
    layer = agreed([first, second], PROBES)["l0"]
    assert (first["l0"].verdict, second["l0"].verdict) == ("stable", "vanishing")
    assert layer.verdict == "inconclusive"
    assert layer.labels[0] == "depends on the input"
    assert "stable (0.0 decades over the span, 0.000 per step) under inputs 0" in (
        layer.sentence.replace("−0.0", "0.0")
    )
    assert "vanishing (−" in layer.sentence
    assert "--input" in layer.sentence
    assert layer.findings[0].name == "depends-on-input"
    assert "under inputs N(0, 1)" in layer.findings[0].message
    assert layer.rate.low <= second["l0"].rate.low < first["l0"].rate.value <= layer.rate.high


def test_probes_that_agree_widen_the_interval_over_all_of_them() -> None:
    first, second = runs(5.0)
    layer = agreed([second, second], PROBES)["l0"]
    assert layer.verdict == "vanishing"
    assert layer.rate == second["l0"].rate
    assert all("under inputs N(0, 1)" in finding.where for finding in layer.findings)
    assert agreed([first], PROBES[:1]) == first or agreed([first], PROBES[:1])["l0"] is first["l0"]


def test_votes_are_those_of_whole_analyses_and_widen_the_same_interval() -> None:
    gru = nn.GRU(3, 4, 2)
    recordings = []
    for scale in (0.0, 1.0):
        with gradflow.record(gru) as recording:
            gru(scale * torch.randn(40, 4, 3))[0][-1].sum().backward()
        recordings.append(recording)
    whole = [gradflow.analyze(recording, stride=40) for recording in recordings]
    cast = [votes(recording, span=None, seed=0) for recording in recordings]
    for one, analysis in zip(cast, whole, strict=True):
        assert one is not None
        known = {layer.name: (layer.verdict, layer.gain, layer.rate) for layer in analysis.values()}
        assert {name: (v.verdict, v.gain, v.rate) for name, v in one.items()} == known
    assert cast[0] is not None
    found, same = agreed_by_votes(whole[1], cast[:1], PROBES), agreed(whole, PROBES)
    assert found is not None
    for layer in found.values():
        other = same[layer.name]
        assert (layer.verdict, layer.gain, layer.rate, layer.findings, layer.sentence) == (
            other.verdict, other.gain, other.rate, other.findings, other.sentence
        )  # fmt: skip


def test_votes_that_differ_leave_it_to_whole_analyses() -> None:
    first, second = runs(5.0)
    rnn = nn.RNN(3, 8, bias=False)
    nn.init.orthogonal_(rnn.weight_hh_l0)
    with gradflow.record(rnn) as recording:
        rnn(torch.zeros(40, 8, 3))[0][-1].sum().backward()
    cast = votes(recording, span=None, seed=0)
    assert cast is not None
    assert cast["l0"].verdict == first["l0"].verdict != second["l0"].verdict
    assert agreed_by_votes(second, [cast], PROBES) is None
