"""Runs and recordings behave like mappings, and notebooks show what they say instead of numbers."""

from __future__ import annotations

import re
from dataclasses import replace

import histories
import pytest
import torch
from seam import SHOWN
from torch import nn

import gradflow

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run() -> gradflow.Analysis:
    """A stack of two layers whose gradient vanishes."""
    torch.manual_seed(0)
    return gradflow.diagnose(nn.LSTM(3, 8, 2), torch.randn(40, 4, 3))


def test_an_analysis_is_asked_like_a_dict(run: gradflow.Analysis) -> None:
    assert list(run.keys()) == ["l0", "l1"]
    assert dict(run) == dict(run.items()) == run.layers
    assert list(run.values()) == list(run.layers.values())
    assert list(run) == list(run.keys()) == sorted(run)
    assert "l0" in run and run["l0"] not in run
    # as with run[name], the start of a name does if it fits one only
    assert "l" not in run and "l2" not in run and 3 not in run and None not in run
    assert run._ipython_key_completions_() == ["l0", "l1"]


def test_a_recording_is_asked_like_a_dict_and_gone_through_by_track() -> None:
    rnn = nn.GRU(3, 5)
    with gradflow.record(rnn) as recording:
        assert "l0" not in recording
        rnn(torch.ones(7, 2, 3))[0].sum().backward()
    assert dict(recording) == dict(recording.items()) == recording.tracks
    assert list(recording) == list(recording.values()) == [recording["l0"]]
    assert list(recording.keys()) == ["l0"]
    assert "l0" in recording and recording["l0"] not in recording and "l1" not in recording
    assert recording._ipython_key_completions_() == ["l0"]


def test_a_notebook_shows_verdict_sentence_picture_and_advice(run: gradflow.Analysis) -> None:
    html = run._repr_html_()
    for layer in run.values():
        assert layer.sentence in html
    assert html.count("data:image/png;base64,") == 1
    top = run.findings[0]
    assert top.message in html and f"Try: {top.advice.split('(')[0][:20]}" in html
    assert len(re.findall("<details>", html)) == 1  # the table of all numbers is folded
    for warning in run.warnings:
        assert warning in html


def test_a_layer_and_a_finding_show_themselves(run: gradflow.Analysis) -> None:
    html = run["l1"]._repr_html_()
    assert run["l1"].sentence in html and run["l0"].sentence not in html
    assert all(finding.code.splitlines()[0] in html for finding in run["l1"].findings)
    finding = run.findings[0]
    html = finding._repr_html_()
    assert finding.message in html and finding.code in html.replace("<wbr>", "")
    assert "<img" not in html


def test_names_stay_names_and_many_layers_are_folded(run: gradflow.Analysis) -> None:
    name = "<script>alert(1)</script>"
    layer = run["l0"]
    evil = replace(layer, name=name, sentence=f"{name} vanishes", findings=())
    layers = {name: evil} | {f"n{i}": replace(layer, name=f"n{i}") for i in range(SHOWN)}
    html = gradflow.Analysis(name, layers, (), {})._repr_html_()
    assert "<script>" not in html and "1 more layer</summary>" in html


def test_an_analysis_without_layers_has_a_form_too() -> None:
    html = gradflow.Analysis("nothing", {}, ("no layer ran",), {})._repr_html_()
    assert "nothing" in html and "no layer ran" in html and "<img" not in html


def test_a_history_shows_what_happened_and_its_waterfall() -> None:
    history = histories.history(12)
    html = history._repr_html_()
    assert html.count("data:image/png;base64,") == 1 and html.count("<details>") == 1
    for layer in history.layers:
        assert f"{layer} " in html
    assert "half-life" in html
    assert "<img" not in gradflow.History.of("Net", [], {}, **histories.HEADER)._repr_html_()
