"""Words for the steps: read from a file, checked, kept in a run, and written where they fit."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import synthetic
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from seam import MOST_INCHES, borders, drawn, gain_map, layers, png, texts, width
from seam import charts_triangle as triangle
from test_reporter_figures import overlapping
from torch import nn

import gradflow
from gradflow import cli, loading
from gradflow.analysis import Analysis
from gradflow.errors import FileError, InputError
from gradflow.reporter import files, plot, prepare

pytestmark = pytest.mark.usefixtures("one_thread")

SENTENCE = "I grew up in France with my mother and two brothers so I speak fluent"
WORDS = SENTENCE.split()
STEPPED = (
    "overview", "gain-map", "total-vs-direct", "triangle", "states", "layers", "paths", "gates",
    "saturation",
)  # fmt: skip
ODD = [
    "$x_1$",
    "$\\frac$",
    "</script><b>x",
    "",
    " ",
    "\n",
    "a\tb",
    "x" * 300,
    "{% x %}",
    "天",
    "\x00",
]


def labelled(words: list[str], cell: str = "LSTM", layers: int = 2) -> Analysis:
    """A stack whose steps have these words, and one sequence."""
    made = [
        synthetic.layer(f"rnn.l{number}", cell, -0.3, steps=len(words), hidden=8, sequences=1)
        for number in range(layers)
    ]
    return synthetic.analysis(*made).labelled(words)


def written(ax: Axes, axis: str = "x") -> list[str]:
    """The words along an axis, in the order of the picture."""
    figure = ax.get_figure()
    assert isinstance(figure, Figure)
    figure.draw(FigureCanvasAgg(figure).get_renderer())
    texts = ax.get_xticklabels() if axis == "x" else ax.get_yticklabels()
    return [text.get_text() for text in texts]


@pytest.mark.parametrize("kind", STEPPED)
def test_every_picture_over_steps_writes_the_words(kind: str) -> None:
    figure = plot(labelled(WORDS), kind)
    assert overlapping(figure) == []
    found = [words for ax in figure.axes if "France" in (words := written(ax))]
    assert found, "no axis has the words"
    for words in found:
        ordered = words if words[0] in WORDS[:2] else words[::-1]
        assert ordered == WORDS


def test_a_map_has_words_on_both_axes() -> None:
    ax = plot(labelled(WORDS), "gain-map").axes[0]
    assert written(ax)[::-1] == WORDS and written(ax, "y")[::-1] == WORDS


@pytest.mark.parametrize("kind", STEPPED)
@pytest.mark.parametrize("words", [ODD, ["one"], [f"token {n}" for n in range(1000)]], ids=len)
def test_odd_and_many_labels_neither_overlap_nor_become_mathematics(
    words: list[str], kind: str
) -> None:
    figure = plot(labelled(words, layers=1 if len(words) > 100 else 2), kind)
    assert overlapping(figure) == []


def test_names_in_a_script_without_a_font_are_drawn_without_a_warning() -> None:
    run = synthetic.analysis(synthetic.layer("循环.l0", title="循环\ue000: $x$"))
    for kind in ("overview", "gain-map"):
        assert len(png(plot(run, kind))) > 1000


def test_odd_labels_are_saved_as_a_picture_without_a_warning() -> None:
    assert len(png(plot(labelled(ODD), "gain-map"))) > 1000


def test_labels_that_say_nothing_get_a_sign_and_long_ones_an_ellipsis() -> None:
    assert [texts((word,))[0] for word in (" ", "\n", "\t", "")] == ["␣", "↵", "⇥", ""]
    assert texts(("two\nlines\x00here",))[0] == "two lines here"
    for long in ("天" * 40, "W" * 40, "<" * 40, "i" * 80):
        assert 0.6 < width([long]) <= MOST_INCHES and texts((long,))[0].endswith("…")


def test_times_are_written_without_the_beginning_that_they_share() -> None:
    times = [f"2024-03-{1 + n // 24:02d} {n % 24:02d}:00 UTC" for n in range(72)]
    shown = written(plot(labelled(times, layers=1), "total-vs-direct").axes[0])
    assert "…03 23:00 UTC" in shown and len(set(shown)) == len(shown) > 10
    words = ["internationalization", "internationalism", "a"]  # nothing that all share
    assert texts(tuple(words))[2] == "a"
    assert texts(("token one", "token two")) == ("token one", "token two")  # short enough


@pytest.mark.parametrize("kind", STEPPED)
def test_labels_that_no_font_can_draw_leave_the_numbers_and_a_sentence(kind: str) -> None:
    odd = [chr(0xE000 + number) for number in range(15)]
    run = labelled(odd)
    figure = plot(run, kind)
    seen = [text.get_text() for text in figure.texts]
    assert any("No font on this machine" in words.replace("\n", " ") for words in seen)
    assert not any("□" in word for ax in figure.axes for word in written(ax))
    assert run["rnn.l0"].step_labels == tuple(odd)  # tables keep them
    assert overlapping(figure) == []


def test_of_a_thousand_labels_the_last_is_shown_and_every_nth_before_it() -> None:
    words = [f"w{n}" for n in range(1000)]
    shown = written(plot(labelled(words, layers=1), "total-vs-direct").axes[0])
    places = sorted(int(word[1:]) for word in shown)
    assert places[-1] == 999 and 10 < len(places) < 100 and len(set(np.diff(places))) == 1


def test_labels_are_as_many_as_the_longest_layers_steps() -> None:
    short, long = synthetic.layer("short", steps=10), synthetic.layer("long", steps=15)
    run = synthetic.analysis(short, long)
    made = run.labelled(WORDS)
    assert made["long"].step_labels == tuple(WORDS) and made["short"].step_labels == ()
    assert run["long"].step_labels == ()
    with pytest.raises(InputError, match="labels must be 15, one per step, got 10; give one for"):
        run.labelled(WORDS[:10])


def test_a_layer_that_reads_fewer_steps_keeps_its_numbers() -> None:
    mixed = synthetic.analysis(
        synthetic.layer("short", steps=10), synthetic.layer("long", steps=15)
    ).labelled(WORDS)
    first, second = plot(mixed, "gain-map").axes[:2]
    assert "France" not in written(first) and "France" in written(second)
    assert layers.prepare(list(mixed.values())).labels == tuple(WORDS)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("the sky", r"labels must be a list of strings, got str; split a text into words"),
        (3, r"labels must be a list of strings, got int"),
        ([1.0] * 15, r"labels must be strings, got float; turn numbers into text first"),
    ],
)
def test_labels_are_strings(labels: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        synthetic.vanishing(15).labelled(labels)  # type: ignore[arg-type]


def test_a_reverse_layers_map_runs_the_other_way() -> None:
    layer = synthetic.layer("l0_reverse", steps=15, sequences=1)
    layer.data["length"].values[3] = 12  # of the mapped sequence
    made = synthetic.analysis(layer).labelled(WORDS)["l0_reverse"]
    assert gain_map.prepare(made).labels == tuple(WORDS[:12][::-1])
    assert triangle.prepare(made).labels == tuple(WORDS)  # in input time


def test_words_stand_at_the_steps_back_from_the_loss_of_one_sequence_only() -> None:
    one = labelled(WORDS)["rnn.l0"]
    assert prepare.heat(one).labels == tuple(WORDS[::-1])
    assert prepare.heat(replace(one, sequences=8)).labels == ()
    early = one.data.copy(deep=True)
    early["grad_norm"].loc[{"kind": "last"}][:, 6:] = 0.0  # the loss reads step 6
    assert prepare.heat(replace(one, data=early)).labels == tuple(WORDS[5::-1])


@pytest.mark.parametrize("bidirectional", [False, True])
def test_the_words_of_a_recorded_sentence_stand_where_they_were_read(bidirectional: bool) -> None:
    torch.manual_seed(0)
    rnn = nn.RNN(3, 6, bidirectional=bidirectional)
    with gradflow.record(rnn) as recording:
        rnn(torch.randn(15, 1, 3))[0][9].sum().backward()
    run = gradflow.analyze(recording).labelled(WORDS)
    assert prepare.heat(run["l0"]).labels == tuple(WORDS[9::-1])
    if bidirectional:
        assert prepare.heat(run["l0_reverse"]).labels == tuple(WORDS[9:])


def test_a_saved_run_keeps_its_labels(tmp_path: Path) -> None:
    run = labelled([*ODD, "\ud800"])
    whole = {name: replace(layer, sequences=8) for name, layer in run.items()}
    run = replace(run, layers=whole)
    run.save(tmp_path / "run.nc")
    again = gradflow.load(tmp_path / "run.nc")
    assert [layer.step_labels for layer in again.values()] == [
        layer.step_labels for layer in run.values()
    ]
    assert list(again.frame("steps")["label"][: len(ODD)]) == ODD
    assert "label" not in synthetic.vanishing().frame("steps")


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("w.txt", "the\nclouds\n", ("the", "clouds")),
        ("w.txt", "\ufeffthe\r\n\r\nsky", ("the", "", "sky")),
        ("w.txt", "a\x0bb\u2028c\n", ("a\x0bb\u2028c",)),
        ("w.json", '["a\\n", "", "天"]', ("a\n", "", "天")),
    ],
)
def test_labels_are_read(name: str, text: str, found: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(text.encode())
    assert loading.read_labels(tmp_path / name) == found


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("w.txt", b"\xff\xfe\x00", FileError, r"cannot read labels from .*w\.txt \(.*utf-8.*one label"),
        ("w.json", b'["a"', FileError, r"cannot read labels from .*w\.json \(.*; write one label"),
        ("w.json", b'{"a": 1}', InputError, r"w\.json must be a list of strings, got dict; write one"),
        ("w.json", b"[1, null]", InputError, r"list of strings, got a list with NoneType, int; "),
        ("gone.txt", None, FileError, r"cannot read labels from .*gone\.txt \(.*No such file"),
    ],
)  # fmt: skip
def test_what_is_no_list_of_labels_is_refused(
    name: str, content: bytes | None, error: type[Exception], message: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=message):
        loading.read_labels(tmp_path / name)


def run(*arguments: str) -> int | str | None:
    with pytest.raises(SystemExit) as stop:
        cli.main(list(arguments))
    return stop.value.code


def test_analyze_and_report_keep_the_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = drawn(plot(labelled(["one"])))
    monkeypatch.setattr(files, "draw", lambda *_: {("overview", "top"): picture})
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    torch.save(nn.RNN(2, 4).state_dict(), "net.pt")
    Path("words.json").write_text(json.dumps(WORDS))
    asked = ("analyze", "net.pt", "--labels", "words.json", "--batch", "2")
    assert run(*asked, "--seq-len", "15", "-o", "out", "-q") == 0
    assert "fluent" in Path("out/steps.csv").read_text()
    assert gradflow.load("out")["l0"].step_labels == tuple(WORDS)
    assert run("report", "out", "-o", "again", "-q") == 0
    assert gradflow.load("again")["l0"].step_labels == tuple(WORDS)
    capsys.readouterr()
    assert run(*asked, "--seq-len", "9", "-o", "other") == 2
    assert "labels must be 9, one per step, got 15; give one" in capsys.readouterr().err
    assert not Path("other").exists()


def test_the_contour_follows_the_borders_of_the_cells() -> None:
    values = np.array([[0.0, math.nan, math.nan], [-4.0, 0.0, math.nan], [-math.inf, -4.0, 0.0]])
    lines = borders(values, np.arange(4) + 0.5, np.arange(4) + 0.5, -3.0)
    assert {tuple(map(tuple, line)) for line in lines.tolist()} == {
        ((1.5, 1.5), (1.5, 2.5)),
        ((2.5, 2.5), (2.5, 3.5)),
        ((0.5, 1.5), (1.5, 1.5)),
        ((1.5, 2.5), (2.5, 2.5)),
    }
