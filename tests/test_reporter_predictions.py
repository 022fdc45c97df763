"""Predictions where a reader meets them: below their finding, beside the present numbers, escaped."""

from __future__ import annotations

import io
import json
import math
import re
from html import unescape
from typing import Any

import pytest
import synthetic
from rich.console import Console
from seam import page, summary
from synthetic import prediction as predicted

from gradflow.analysis import Analysis, Prediction, Rate
from gradflow.reporter import render

HEADING = "Prediction without training, for the present weights and this batch:"


def with_predictions(*made: Prediction, **changes: Any) -> Analysis:
    return synthetic.analysis(synthetic.layer(predictions=made, **changes))


def words(html: str) -> str:
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", html)).split())


def printed(analysis: Analysis) -> str:
    file = io.StringIO()
    render(analysis, Console(file=file, width=100))
    return file.getvalue()


def test_the_page_holds_new_numbers_beside_the_present_ones() -> None:
    analysis = with_predictions(predicted())
    text = words(page(analysis, {}))
    said = "rate half-life horizon channels at distance verdict "
    said += "now −0.980 ± 0.003 0.71 8 0 of 32 at 99 vanishing"
    after = "forget bias + 1 −0.31 ± 0.02 2.2 22 3 of 32 at 99 vanishing"
    assert f"{HEADING} {said} {after}" in text
    first = text.index("model.rnn.bias_ih_l0.data[32:64] += 1.0")
    assert first < text.index(HEADING) < text.index("Everything else")


def test_a_page_without_predictions_says_nothing_of_them() -> None:
    assert "without training" not in words(page(synthetic.vanishing(), {}))


def test_predictions_stand_below_the_verdict_alone() -> None:
    findings = (synthetic.finding("rnn.l0"), synthetic.finding("rnn.l0", name="saturated"))
    text = words(page(with_predictions(predicted(), findings=findings), {}))
    assert text.count(HEADING) == 1


def test_the_first_prediction_is_open_and_the_others_are_folded() -> None:
    spoiled = synthetic.finding("rnn.l0", name="not-finite")
    first = synthetic.layer(
        predictions=(predicted(),), findings=(spoiled, synthetic.finding("rnn.l0"))
    )
    second = synthetic.layer("rnn.l1", predictions=(predicted(),))
    text = page(synthetic.analysis(first, second), {})
    marks = re.findall(r'<details class="outlook"( open)?>', text)
    assert marks == [" open", ""]


def test_what_a_prediction_says_is_escaped() -> None:
    evil = "</table><script>x"
    text = page(with_predictions(predicted(words=evil, batch=evil)), {})
    assert evil not in text
    assert text.count("&lt;/table&gt;&lt;script&gt;x") == 2


def test_the_terminal_says_it_under_the_advice() -> None:
    first = predicted(message="forget bias + 1: still vanishing, rate −0.98 → −0.31 per step")
    text = printed(with_predictions(first, predicted(message="forget bias + 2: stable")))
    lines = [line.strip() for line in text.splitlines()]
    at = lines.index(HEADING)
    assert lines[at - 1].startswith("model.rnn.bias_ih_l0.data[32:64] += 1.0")
    assert lines[at + 1 : at + 3] == [
        "- forget bias + 1: still vanishing, rate −0.98 → −0.31 per step",
        "- forget bias + 2: stable",
    ]


@pytest.mark.parametrize("rate", [Rate(-0.31, -0.33, -0.29), Rate(-math.inf, -math.inf, -math.inf)])
def test_the_summary_is_strict_json(rate: Rate) -> None:
    made = predicted(rate=rate, half_life=math.inf, horizon=None, helps=math.nan, verdict="stable")
    text = json.dumps(summary(with_predictions(made)), allow_nan=False)
    (layer,) = json.loads(text)["layers"]
    (found,) = layer["predictions"]
    assert found["horizon"] == {"value": None, "never": True, "searched": 99}
    assert found["half_life"] == {"value": None, "never": True}
    assert found["rate"]["zero"] is (rate.value == -math.inf)
    assert (found["remedy"], found["value"], found["decades_won"]) == ("forget_bias", 1.0, None)
    assert found["batch"] == "this batch"


def test_a_layer_that_was_seen_to_vanish_is_not_said_to_last_for_ever() -> None:
    text = words(page(with_predictions(predicted(horizon=None, verdict="vanishing")), {}))
    assert "forget bias + 1 −0.31 ± 0.02 2.2 > 99 3 of 32 at 99 vanishing" in text
