"""The page: what it says and in which order, escaped, offline, small, the same every time."""

from __future__ import annotations

import functools
import inspect
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import ClassVar

import numpy as np
import pytest
import synthetic
import torch
from seam import LABEL_WORDS, Drawn, decays_as_power, draw, embed, page, summary, top_findings
from torch import nn

import gradflow
from gradflow.analysis import Analysis
from gradflow.analyzer import agreement, assemble
from gradflow.limits import PAGE_BYTES

EVIL = "</script><b>x"


class Outline(HTMLParser):
    """Tags, their balance, their attributes, and the words between."""

    VOID: ClassVar = {"meta", "img", "source", "br", "wbr", "!doctype"}
    OPTIONAL: ClassVar = {"td", "th"}  # HTML lets their end tags go

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.urls: list[str] = []
        self.alts: list[str] = []
        self.words: list[str] = []
        self.scripts: list[str | None] = []  # their types
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID | self.OPTIONAL:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append(dict(attrs).get("type"))
        for name, value in attrs:
            if name in ("src", "href") and value:
                self.urls.append(value)
            if name == "alt":
                self.alts.append(value or "")
            assert not name.startswith("on"), f"{tag} has a script in {name}"

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.OPTIONAL:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)


def made(analysis: Analysis) -> str:
    return page(analysis, draw(analysis))


@functools.cache
def drawn(name: str) -> tuple[Analysis, dict[tuple[str, str], Drawn]]:
    """A case and its pictures, drawn once for all tests."""
    analysis = synthetic.CASES[name]()
    return analysis, draw(analysis)


@pytest.fixture(scope="module", params=["vanishing", "everything", "single_step", "bidirectional"])
def case(request: pytest.FixtureRequest) -> tuple[Analysis, str]:
    analysis, pictures = drawn(request.param)
    return analysis, page(analysis, pictures)


def test_page_is_well_formed_offline_and_small(case: tuple[Analysis, str]) -> None:
    _, text = case
    outline = Outline(text)
    assert outline.open == []
    assert outline.scripts.count(None) == 1  # that of the page; the others are data
    assert set(outline.scripts) <= {None, "application/json"} and "link" not in outline.tags
    assert all(url.startswith(("data:image/webp;base64,", "#")) for url in outline.urls)
    assert "url(" not in text and "@import" not in text
    assert len(text.encode()) <= PAGE_BYTES


def test_every_picture_has_words(case: tuple[Analysis, str]) -> None:
    outline = Outline(case[1])
    assert outline.tags.count("img") == len(outline.alts) >= 4
    assert all(len(alt) > 30 for alt in outline.alts)


def test_page_has_every_sentence_worst_first(case: tuple[Analysis, str]) -> None:
    analysis, _ = case
    words = " ".join(Outline(case[1]).words)
    places = [words.index(layer.sentence) for layer in analysis.worst_first]
    assert places == sorted(places)
    for warning in analysis.warnings:
        assert warning in words


def test_page_order(case: tuple[Analysis, str]) -> None:
    _, text = case
    marks = ['aria-label="verdicts"', 'aria-label="overview"', 'aria-label="findings"',
             "every pair of steps", "Everything else", "Provenance and parity"]  # fmt: skip
    places = [text.index(mark) for mark in marks]
    assert places == sorted(places)


def test_names_cannot_break_out() -> None:
    layer = synthetic.layer(
        EVIL, step_labels=(EVIL,) * 100,
        findings=(synthetic.finding(EVIL, message=f"<img src=x onerror=1>{EVIL}", code=EVIL),),
        sentence=f"{EVIL} has vanished.", title=EVIL, labels=(EVIL,), gradient_note=EVIL,
    )  # fmt: skip
    text = made(
        synthetic.analysis(
            layer, title=EVIL, warnings=(EVIL,), provenance={EVIL: EVIL, "snippet": EVIL}
        )
    )
    outline = Outline(text)
    assert outline.scripts.count(None) == 1 and "b" not in outline.tags
    assert "<b>" not in text and text.lower().count("</script") == len(outline.scripts)
    assert f"{EVIL} has vanished." in " ".join(outline.words)


def test_same_input_same_bytes() -> None:
    assert made(synthetic.vanishing()) == made(synthetic.vanishing())


def test_terminal_json_and_page_share_the_findings() -> None:
    analysis, pictures = drawn("everything")
    words = " ".join(Outline(page(analysis, pictures)).words)
    names = [finding["layer"] for finding in summary(analysis)["findings"]]
    assert names[:3] == [finding.layer for finding in top_findings(analysis)]
    for finding in top_findings(analysis):
        assert finding.message in words and finding.code in words


def test_one_finding_of_each_name_comes_before_a_second_of_any() -> None:
    first = synthetic.layer("a", findings=(synthetic.finding("a"), synthetic.finding("a")))
    second = synthetic.layer("b", rate=-0.5, findings=(synthetic.finding("b", "saturated"),))
    shown = top_findings(synthetic.analysis(first, second))
    assert [(one.layer, one.name) for one in shown] == [
        ("a", "vanishing"), ("b", "saturated"), ("a", "vanishing")
    ]  # fmt: skip


def test_a_stack_gets_one_remedy_and_its_code_mends_every_layer() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LSTM(3, 8, 3))
    run = gradflow.diagnose(model, torch.randn(60, 4, 3))
    assert [layer.verdict for layer in run.values()] == ["vanishing"] * 3
    shown = top_findings(run, 99)
    assert len({finding.name for finding in shown}) == len(shown)
    vanishing = next(finding for finding in shown if finding.name == "vanishing")
    others = sorted(set(run) - {vanishing.layer})
    same = [finding for finding in shown if finding.advice == "the same as above"]
    assert not any(finding.code for finding in same) and "forget-gates-leak" in {
        f.name for f in same
    }
    assert vanishing.message.endswith(f"; likewise {', '.join(others)}")
    exec(vanishing.code, {"model": model, "torch": torch})  # noqa: S102 - a line to paste
    for layer in range(3):
        weights = dict(model[0].named_parameters())
        drawn = weights[f"bias_ih_l{layer}"].detach()
        assert (drawn[8:16] >= 0).all() and (drawn[8:16] <= math.log(59)).all()  # chrono
        assert drawn[8:16].std() > 0 and torch.equal(drawn[:8], -drawn[8:16])
        assert not weights[f"bias_hh_l{layer}"][:16].any()
    said = [finding["name"] for finding in summary(run)["findings"]]
    assert said.count("vanishing") == 3  # a script reads of every layer


def test_a_list_of_layers_gets_one_remedy_and_its_code_mends_every_layer() -> None:
    torch.manual_seed(0)
    model = nn.Module()
    model.parts = nn.ModuleList(nn.ModuleDict({"rnn": nn.GRU(6, 6)}) for _ in range(3))
    model.forward = lambda x: functools.reduce(lambda h, part: part["rnn"](h)[0], model.parts, x)
    run = gradflow.diagnose(model, torch.randn(60, 4, 6))
    assert [layer.verdict for layer in run.values()] == ["vanishing"] * 3
    (vanishing,) = (one for one in top_findings(run, 99) if one.name == "vanishing")
    others = sorted(set(run) - {vanishing.layer})
    assert vanishing.message.endswith(f"; likewise {', '.join(others)}")
    exec(vanishing.code, {"model": model, "torch": torch})  # noqa: S102 - a line to paste
    for part in model.parts:
        drawn = part["rnn"].bias_ih_l0.detach()[6:12]
        assert (drawn >= 0).all() and drawn.std() > 0  # chrono
        assert not part["rnn"].bias_hh_l0[:12].any()


def test_a_healthy_model_has_no_findings() -> None:
    words = " ".join(Outline(made(synthetic.carrying())).words)
    assert "No findings" in words and "Nothing here needs a remedy." in words


def test_an_open_verdict_is_not_called_healthy() -> None:
    open_still = replace(synthetic.layer(findings=()), verdict="inconclusive")
    words = " ".join(Outline(made(synthetic.analysis(open_still))).words)
    assert "No cause was found; the verdict says what would decide." in words
    assert "Nothing here needs a remedy." not in words


def test_every_label_is_explained_where_it_is_shown() -> None:
    labels = ("range-limited", "transient growth")
    words = " ".join(Outline(made(synthetic.analysis(synthetic.layer(labels=labels)))).words)
    for label in LABEL_WORDS:
        assert (label in labels) == (LABEL_WORDS[label] in words)


def test_labels_that_an_analysis_gives_are_all_known() -> None:
    source = inspect.getsource(assemble._labels)
    given = set(re.findall(r'"([a-z][a-z -]+)": ', source)) | {"no recurrence", agreement.DEPENDS}
    assert given == set(LABEL_WORDS)


def test_a_power_law_that_grows_is_not_said_to_fall() -> None:
    assert decays_as_power(np.log1p(np.arange(1.0, 200.0)) * np.ones((2, 1)))
    assert "falls or grows" in LABEL_WORDS["not exponential"]


def test_the_bar_says_how_far_the_gradient_reaches() -> None:
    whole, gone = synthetic.carrying(), synthetic.vanishing()
    part = replace(synthetic.layer(rate=-0.05), searched=60)
    assert "some direction reaches all 100 steps" in made(
        whole
    ) and "reaches beyond 8 of 100 steps" in made(gone)
    assert "reaches ≥ 60 of 100 steps" in made(synthetic.analysis(part))


def test_snippet_and_next_command_get_a_box() -> None:
    provenance = {
        "snippet": "torch.save(\n  batch)",
        "next_command": "gradflow analyze m.pt",
        "x": 1,
    }
    text = made(synthetic.analysis(synthetic.layer(), provenance=provenance))
    assert "<pre><code>torch.save(\n  batch)</code></pre>" in text
    assert "<pre><code>gradflow analyze m.pt</code></pre>" in text
    assert "<dt>snippet" not in text


def test_a_page_with_too_many_pictures_leaves_the_least_important_out() -> None:
    analysis, pictures = drawn("bidirectional")
    heavy = {key: replace(one, web=one.web + bytes(60_000)) for key, one in pictures.items()}
    text = page(analysis, heavy)
    assert len(text.encode()) <= PAGE_BYTES
    left_out = re.search(r"Left out to keep this page below a megabyte, .*: ([^.]*)", text)
    assert left_out and "overview" not in left_out[1]


def test_the_maps_of_the_worst_layers_come_before_anything_folded() -> None:
    analysis, pictures = drawn("bidirectional")
    room = PAGE_BYTES // 11  # as bytes a picture needs a third less: 3 overviews and six more fit
    heavy = {
        key: replace(one, web=bytes(room * 3 // 4), told={"panels": [], "places": []})
        for key, one in pictures.items()
    }
    shown, _ = embed(analysis, heavy, words=60_000)
    worst = [layer.name for layer in analysis.worst_first][:3]
    maps = {(kind, name) for kind in ("gain-map", "total-vs-direct") for name in worst}
    assert set(shown) == maps | {("overview", name) for name in ("top", "narrow", "")}


def test_a_picture_that_is_left_out_is_not_announced() -> None:
    analysis = synthetic.vanishing()
    pictures = {key: png for key, png in draw(analysis).items() if key[0] != "total-vs-direct"}
    said = "directly, beside the whole gradient."
    assert said in page(analysis, draw(analysis)) and said not in page(analysis, pictures)


def test_a_folded_picture_says_what_it_shows() -> None:
    analysis, pictures = drawn("bidirectional")
    assert ("layers", "") in pictures and ("paths", "rnn.l0") not in pictures  # a GRU has none
    words = " ".join(" ".join(Outline(page(analysis, pictures)).words).split())
    assert "half of ∂L/∂W_hh comes from the last 8 steps; a window of" in words
    kept = {name for kind, name in pictures if kind == "triangle"}
    assert kept == {layer.name for layer in analysis.worst_first[:3]}


def test_dark_and_print_are_thought_of() -> None:
    text = made(synthetic.vanishing())
    assert "@media screen and (prefers-color-scheme: dark)" in text  # paper stays white
    assert "@media print" in text
    assert "figure { margin: 0 0 8px; padding: 6px; background: #ffffff" in text


def test_summary_is_strict_json() -> None:
    for name, build in synthetic.CASES.items():
        text = json.dumps(summary(build()), allow_nan=False)
        assert json.loads(text)["schema"] == 1, name


def test_summary_says_never_instead_of_infinity() -> None:
    (layer,) = summary(synthetic.carrying())["layers"]
    assert layer["half_life"] == {"value": None, "never": True}
    assert layer["horizon"] == {"value": None, "never": True, "searched": 99}
    by_name = {layer["name"]: layer for layer in summary(synthetic.everything())["layers"]}
    zero = {"value": None, "low": None, "high": None, "zero": True}
    assert by_name["relu.l0"]["rate"] == zero
    assert by_name["bad.l0"]["rate"] == zero | {"zero": False}
    assert by_name["rnn.l0"]["rate"]["value"] == -0.98


def test_a_layer_that_was_not_measured_is_not_said_to_last() -> None:
    broken = replace(synthetic.broken(synthetic.layer()), horizon=None)
    words = " ".join(Outline(made(synthetic.analysis(broken))).words)
    assert "not measured" in words


def test_several_runs_of_one_layer_are_not_called_layers() -> None:
    names = (("l0", "l0@2", "l0@3", "l0@4"), ("l0", "l1", "l2", "l3"))
    runs, four = (synthetic.analysis(*map(synthetic.layer, some)) for some in names)
    text, stack = (page(one, draw(one)) for one in (runs, four))
    for said in ("Not every run is shown here", "Overview of more runs", "<tr><th>run<th>cell"):
        assert said in text and said not in stack
        assert said.replace("run", "layer") in stack and said.replace("run", "layer") not in text
    assert "side by side" in stack and "side by side" not in text  # nothing is handed down
