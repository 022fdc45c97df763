"""The terminal report: readable at 80 columns, in a pipe, in ASCII, without colours."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import pytest
import synthetic
import torch
from rich.cells import cell_len
from rich.console import Console
from seam import page
from torch import nn

import gradflow
from gradflow.analysis import Analysis
from gradflow.limits import GLOSSARY, VERDICTS
from gradflow.reporter import of_groups, of_histories, of_runs, render


def rendered(
    analysis: Analysis, width: int = 80, *, verbose: bool = False, **options: object
) -> str:
    file = io.StringIO()
    console = Console(file=file, width=width, **options)  # type: ignore[arg-type]
    render(analysis, console, verbose=verbose)
    return file.getvalue()


@pytest.mark.parametrize("width", [48, 60, 80, 100, 160])
@pytest.mark.parametrize("name", synthetic.CASES)
def test_nothing_is_wider_than_the_console(name: str, width: int) -> None:
    analysis = synthetic.CASES[name]()
    code = {line for finding in analysis.findings for line in finding.code.splitlines()}  # to paste
    lines = [line.rstrip() for line in rendered(analysis, width).splitlines()]
    assert max(cell_len(line) for line in lines if line.strip() not in code) <= width


def test_at_80_columns_every_layer_is_one_line() -> None:
    text = rendered(synthetic.everything())
    for layer in synthetic.everything().values():
        (row,) = re.findall(rf"^{re.escape(layer.name)}  .*{layer.verdict} .*$", text, re.MULTILINE)
        assert layer.verdict in row
    assert "−0.980 ± 0.003        8  0 of 32 at 99" in text
    assert "1 of 64" in text


def test_it_says_sentences_findings_and_warnings() -> None:
    analysis = synthetic.everything()
    raw = rendered(analysis)
    text = " ".join(raw.split())
    for layer in analysis.values():
        assert layer.sentence in text
    assert "1. relu.l0: the gradient loses 38.3 decades" in text
    assert "model.rnn.bias_ih_l0.data[32:64] += 1.0  # the forget gate's block" in raw
    assert "1 more finding on the page, or with -v." in text
    assert "note: Gradients are perhaps still scaled: a GradScaler was seen." in text


def test_a_line_of_code_is_never_wrapped() -> None:
    code = "model.rnn.weight_hh_l0.data.copy_(torch.linalg.qr(model.rnn.weight_hh_l0.data).Q)" * 2
    layer = synthetic.layer(findings=(synthetic.finding("rnn.l0", code=code),))
    assert code in rendered(synthetic.analysis(layer))


def test_a_pipe_that_knows_only_ascii_gets_ascii() -> None:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii", newline="\n")
    render(synthetic.everything(), Console(file=file, width=80))
    file.flush()
    text = raw.getvalue().decode("ascii")
    assert "-0.980 +- 0.003" in text and "?" not in text


@pytest.mark.parametrize(
    ("words", "plain"),
    [
        ("below 10⁻³ of it, 6·10⁻⁴⁰¹, up to 10⁶", "below 10^-3 of it, 6.10^-401, up to 10^6"),
        ("½‖output‖² and ⟨r, h_T⟩", "1/2|output|^2 and <r, h_T>"),
    ],
)
def test_a_power_stays_a_power_in_ascii(words: str, plain: str) -> None:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii", newline="\n")
    render(replace(synthetic.vanishing(), warnings=(words,)), Console(file=file, width=80))
    file.flush()
    assert f"note: {plain}\n" in raw.getvalue().decode("ascii")


def test_colours_only_where_they_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\x1b[" in rendered(synthetic.vanishing(), force_terminal=True, color_system="standard")
    monkeypatch.setenv("NO_COLOR", "1")
    text = rendered(synthetic.vanishing(), force_terminal=True, color_system="standard")
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", text)
    assert "\x1b" not in rendered(synthetic.vanishing())


def test_names_with_markup_or_escapes_are_printed_as_they_are() -> None:
    layer = synthetic.layer("[bold]a[/x]", sentence="\x1b[31mred [red]x", findings=())
    text = rendered(synthetic.analysis(layer, title="[b]t[/nope]"))
    assert "[b]t[/nope]" in text and "[bold]a[/x]" in text
    assert "\x1b" not in text


def test_many_layers_are_said_by_the_table() -> None:
    text = rendered(synthetic.twelve())
    assert "7 more in the table above." in text
    assert text.count("stack.l11 ") >= 1


def test_verbose_says_what_the_numbers_rest_on() -> None:
    file = io.StringIO()
    analysis = synthetic.everything()
    render(analysis, Console(file=file, width=80), verbose=True)
    text = " ".join(file.getvalue().split())
    assert "what the numbers rest on" in text
    for layer in analysis.values():
        assert f"parity of {layer.name} with the backward: {layer.parity.status}" in text
    for name in analysis.provenance:
        assert f"{name.replace('_', ' ')}: " in text or name in ("snippet", "next_command")
    assert "what the numbers rest on" not in rendered(analysis)


def test_every_word_of_the_terminal_is_in_the_glossary() -> None:
    names = [name for entry in GLOSSARY for name in re.split(r", (?:and )?| and ", entry)]
    tables = [of_runs({}), of_histories({}), of_groups([])]
    for heading in {column.heading for table in tables for column in table.columns}:
        words = heading.replace("half-\nlife", "half-life").replace("\n", " ")
        assert any(re.match(rf"{name}\b", words) for name in [*names, "verdict"]), words
    assert set(VERDICTS) <= set(names)  # what a verdict is
    said = " ".join(rendered(case(), 120, verbose=True) for case in synthetic.CASES.values())
    for word in ("decade", "direction", "parity", "prediction", "span", "window"):
        assert word in said.lower() and word in names


def test_updates_of_one_layer_are_said_once_and_are_no_layers() -> None:
    torch.manual_seed(0)
    model = nn.LSTM(3, 8)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with gradflow.record(model) as recording:
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(30, 4, 3))[0][-1].pow(2).sum().backward()
            optimizer.step()
    run = gradflow.analyze(recording)
    (told,) = run.told
    others = sorted({"l0", "l0@2", "l0@3"} - {told.name})
    assert told.sentence.endswith(f"; the same verdict for its other runs {', '.join(others)}")
    assert run[told.name].sentence in told.sentence and repr(run).count("a window of") == 1
    text = page(run, {})
    assert "3 layers" not in text and text.count("a window of") == 1
