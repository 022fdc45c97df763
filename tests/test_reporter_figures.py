"""Figures: every kind of every case, on one scale, leaving matplotlib as found."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import seaborn
import synthetic
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from seam import Picture, draw, look, narrowed, paint, png

from gradflow.errors import InputError
from gradflow.reporter import KINDS, plot, plot_narrow


def overlapping(figure: Figure) -> list[tuple[str, str]]:
    """Pairs of words in a figure whose boxes overlap, and words that leave the figure."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    texts = list(figure.texts)
    for ax in figure.axes:
        if not ax.get_visible():
            continue
        texts += [*ax.texts, ax.xaxis.label, ax.yaxis.label]
        for axis in (ax.xaxis, ax.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = axis.get_major_ticks()
            inside = [tick for tick in ticks if low - 1e-9 <= tick.get_loc() <= high + 1e-9]
            texts += [label for tick in inside for label in (tick.label1, tick.label2)]
    shown = [
        (text.get_text(), text.get_window_extent(renderer))
        for text in texts
        if text.get_text() and text.get_visible()
    ]
    shown = [(words, box) for words, box in shown if box.width > 1]
    outside = [
        (words, "the edge")
        for words, box in shown
        if box.x0 < -1 or box.y0 < -1 or box.x1 > figure.bbox.x1 + 1 or box.y1 > figure.bbox.y1 + 1
    ]
    return outside + [
        (one, other)
        for i, (one, a) in enumerate(shown)
        for other, b in shown[i + 1 :]
        if min(a.x1, b.x1) - max(a.x0, b.x0) > 1.5 and min(a.y1, b.y1) - max(a.y0, b.y0) > 1.5
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [name for name in synthetic.CASES if name != "twelve"])
def test_no_words_overlap_or_leave_the_figure(name: str, kind: str) -> None:
    assert overlapping(plot(synthetic.CASES[name](), kind)) == []


def test_twelve_layers_do_not_overlap() -> None:
    assert overlapping(plot(synthetic.twelve())) == []


def test_the_overlap_check_can_fail() -> None:
    figure = Picture(2, 1)
    figure.words(0.1, 0.1, "one on")
    figure.words(0.2, 0.15, "the other")
    assert overlapping(figure) == [("one on", "the other")]


def test_long_titles_are_made_to_fit() -> None:
    name = "encoder.blocks.3.temporal." * 6 + "lstm.l0_reverse"
    layer = synthetic.layer(name, "LSTM", title="LSTM: " + "a very long finding " * 12)
    figure = plot(
        [synthetic.analysis(layer, title="A model with a long name"), synthetic.carrying()]
    )
    assert overlapping(figure) == []


def test_names_with_dollars_are_words_and_not_mathematics() -> None:
    odd = synthetic.analysis(synthetic.layer("a$x_1$</script><b>", title="$\\frac$ {% x %}"))
    for kind in KINDS:
        assert len(png(plot(odd, kind))) > 1000


def test_a_long_name_loses_its_beginning_and_what_is_said_of_it_stays_whole() -> None:
    name = "encoder." * 12 + "reader.l0_reverse"
    layer = synthetic.layer(
        name, title=f"{name} (RNN): this loss's gradient is gone 8 steps before it"
    )
    for kind in ("overview", "gain-map", "triangle", "lag-curve"):
        figure = plot(synthetic.analysis(layer), kind)
        drawn = KINDS[kind]
        said = layer.title.partition(": ")[2] if drawn is None else drawn.prepare(layer).message
        words = " ".join(text.get_text() for text in figure.texts)
        assert "l0_reverse" in words and said in words and name not in words


def test_a_folded_headline_leaves_no_lone_word() -> None:
    figure = Picture(4, 1)
    words = "l0: 40 % of the pairs of steps keep a gain above 10⁻³"
    first, second = figure.folded(words, 3.3, fontsize=10, fontweight="bold")
    assert f"{first} {second}" == words and len(second) > 0.6 * len(first)


def test_a_row_says_its_name_once() -> None:
    words = [text.get_text() for text in plot(synthetic.bidirectional()).texts]
    assert sum("rnn.l1_reverse" in one for one in words) == 1


def test_how_to_read_the_overview_is_said_and_stacks_are_explained() -> None:
    single, stack = (
        " ".join(text.get_text() for text in plot(one()).texts)
        for one in (synthetic.vanishing, synthetic.twelve)
    )
    for words in (single, stack):
        assert "the last loss step's gradient reaches each unit" in words
    assert "also gets gradient from above" in stack and "from above" not in single


def test_what_lies_before_the_first_step_is_said_in_its_place() -> None:
    layer = synthetic.layer("rnn.l0_reverse", steps=40)
    data = layer.data.copy(deep=True)
    data["log10_grad"][..., 1:] = np.nan
    data["log10_grad"][..., :12] = 0.0
    run = synthetic.analysis(replace(layer, data=data))
    for figure in (plot(run), plot_narrow(run)):
        panel = figure.axes[0]
        (said,) = (text for text in panel.texts if "no earlier step" in text.get_text())
        box = said.get_window_extent(RendererAgg(1, 1, figure.dpi))
        coloured = panel.transData.transform((11.5, 0))[
            0
        ]  # where the first cell with a colour begins
        assert panel.bbox.x0 <= box.x0 and box.x1 <= coloured
        assert panel.bbox.y0 <= box.y0 and box.y1 <= panel.bbox.y1
        assert overlapping(figure) == []


def test_several_analyses_share_one_scale() -> None:
    figure = plot([synthetic.vanishing(), synthetic.carrying()])
    _, first, _, second, _ = figure.axes
    assert first.get_xlim() == second.get_xlim() and first.get_ylim() == second.get_ylim()
    words = [text.get_text() for text in figure.texts]
    assert "RNN net — RNN: this loss's gradient is gone 8 steps before it" in words
    assert "no direction left after 8 steps" in words and "never below 10⁻³" in words


def test_the_left_panel_is_three_times_as_wide() -> None:
    left, right, *_ = plot(synthetic.vanishing()).axes
    assert left.get_position().width / right.get_position().width == pytest.approx(3, rel=1e-6)


def test_a_layer_is_picked_by_name() -> None:
    figure = plot(synthetic.bidirectional(), layer="rnn.l1_reverse")
    assert any("rnn.l1_reverse" in text.get_text() for text in figure.texts)
    assert len(figure.axes) == 3
    with pytest.raises(InputError, match=r"there is no layer 'nope'; this analysis has rnn\.l0, "):
        plot(synthetic.bidirectional(), layer="nope")


def test_a_wrong_kind_gets_the_list() -> None:
    with pytest.raises(InputError, match=r"kind must be one of overview, gain-map, .* got 'heat'"):
        plot(synthetic.vanishing(), "heat")


@pytest.mark.parametrize("wrong", [None, 3, "run", [1]])
def test_only_analyses_are_plotted(wrong: object) -> None:
    with pytest.raises(InputError, match="must be an Analysis or a list of Analyses, got"):
        plot(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("empty", [[], synthetic.analysis()])
def test_nothing_to_plot_is_said(empty: object) -> None:
    with pytest.raises(InputError, match="must be an analysis with layers, got none"):
        plot(empty)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_axes_of_the_users_own_are_drawn_into(kind: str) -> None:
    figure = Figure()
    ax = figure.add_subplot()
    assert plot(synthetic.carrying(), kind, ax=ax) is figure
    assert ax.get_title(loc="left")
    coloured = kind == "overview" or (KINDS[kind].scale is not None and bool(ax.images))
    assert len(figure.axes) == 1 + coloured  # its colour bar stands beside it
    if coloured:
        words = [text.get_text() for text in figure.axes[1].get_yticklabels()]
        assert words[0] in ("≤ 10⁻⁶ gone", "0 closed") and words[-1] in ("≥ 10⁶", "open 1")


@pytest.mark.parametrize("layout", ["constrained", None])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "layers"])
def test_a_title_fits_the_axes_it_is_given(kind: str, layout: str | None) -> None:
    figure = Figure(figsize=(7, 5), layout=layout)
    long = "encoder.temporal_backbone.recurrent.lstm.l0"
    run = synthetic.analysis(synthetic.layer(long, "LSTM", title=f"{long}: the gradient is gone"))
    ax, beside = figure.subplots(2, 2)[0]
    plot(run, kind, ax=ax)
    FigureCanvasAgg(figure).draw()
    title = ax._left_title  # type: ignore[attr-defined]
    box = title.get_window_extent()
    assert box.x1 <= beside.bbox.x0 and box.y1 <= figure.bbox.y1
    assert ax.bbox.height > 60  # a layout engine finds room for the panel
    assert "l0" in title.get_text().replace("\n", " ")


@pytest.mark.parametrize("kind", ["overview", "states", "gain-map", "layers", "lag-curve"])
def test_numbers_below_axes_of_two_inches_do_not_meet(kind: str) -> None:
    figure = Figure(figsize=(2.9, 2.4))
    run = synthetic.analysis(*(synthetic.layer(f"rnn.l{n}", steps=90) for n in range(2)))
    ax = figure.add_axes((0.25, 0.22, 0.7, 0.6))
    plot(run, kind, layer=None if kind == "layers" else "rnn.l0", ax=ax)
    FigureCanvasAgg(figure).draw()
    boxes = sorted(t.get_window_extent().extents.tolist() for t in ax.get_xticklabels())
    inside = [box for box in boxes if ax.bbox.x0 - 20 < box[0] < ax.bbox.x1]
    assert len(inside) > 1
    assert all(left[2] <= right[0] for left, right in pairwise(inside))


@pytest.mark.parametrize("kind", ["overview", "gain-map", "states"])
def test_colours_are_narrowed_on_request_and_the_picture_says_so(kind: str) -> None:
    run = synthetic.analysis(synthetic.layer("rnn.l0", "LSTM", -0.02))
    said = "colours narrowed to 10⁻² … 10² on request"
    figures = [plot(run, kind), plot(run, kind, limits=(-2, 2)), plot(run, kind)]
    words = [" ".join(text.get_text() for text in figure.texts) for figure in figures]
    assert said in words[1] and said not in words[0] + words[2]
    images = [figure.axes[0].images[0].get_array() for figure in figures]
    assert (images[0] == images[2]).all() and (images[0] != images[1]).any()
    bar = next(ax for ax in figures[1].axes if "≤ 10⁻²" in map(str, _tick_words(ax)))
    assert _tick_words(bar)[-1] == "≥ 10²"


def test_narrowed_colours_keep_what_1_looks_like() -> None:
    values = np.array([[0.0, -3.0, 1.0, -1.5]])
    with narrowed((-3, 1)):
        zero, low, high, half = paint(values)[0].tolist()
    fixed = paint(np.array([[0.0, -6.0, 6.0, -3.0]]))[0].tolist()
    assert [zero, low, high, half] == fixed


@pytest.mark.parametrize("limits", [(0, 2), (-7, 2), (2, -2), (1,), "ab", (-1, float("nan"))])
def test_limits_that_are_none_are_refused(limits: Any) -> None:
    with pytest.raises(InputError, match=r"limits must be two powers of ten, from -6 to below 0"):
        plot(synthetic.vanishing(), limits=limits)


def _tick_words(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.get_xticklabels()]


@pytest.mark.parametrize("kind", KINDS)
def test_captions_are_left_out_on_request(kind: str) -> None:
    run = synthetic.analysis(synthetic.layer("rnn.l0", "LSTM", -0.3), synthetic.layer("rnn.l1"))
    figures = [plot(run, kind, captions=captions) for captions in (True, False)]
    told, bare = ({text.get_text() for text in figure.texts} for figure in figures)
    high, low = (figure.get_size_inches()[1] for figure in figures)
    assert (bare < told and low < high) or kind == "heads"  # which these have none of


def test_the_readers_font_is_used() -> None:
    def fonts(figure: Figure) -> set[str]:
        return {text.get_fontname() for text in figure.findobj(Text) if text.get_text()}

    run = synthetic.vanishing()
    with matplotlib.rc_context({"font.family": "serif", "font.serif": ["STIXGeneral"]}):
        mine = plot(run)
    with matplotlib.rc_context({"font.sans-serif": ["no such font", "DejaVu Sans Mono"]}):
        mono = plot(run, "gain-map")
    assert (fonts(mine), fonts(mono)) == ({"STIXGeneral"}, {"DejaVu Sans Mono"})
    assert fonts(plot(run)) == {"DejaVu Sans"}


def test_axes_take_one_layer_only() -> None:
    ax = Figure().add_subplot()
    with pytest.raises(InputError, match=r"ax must be given for one layer, got 4 .*; give layer="):
        plot(synthetic.bidirectional(), ax=ax)


def test_matplotlib_is_left_as_found() -> None:
    before = dict(matplotlib.rcParams)
    with matplotlib.rc_context({"font.size": 40.0, "axes.facecolor": "red"}):
        mine = dict(matplotlib.rcParams)
        picture = png(plot(synthetic.vanishing()))
        assert dict(matplotlib.rcParams) == mine
    assert dict(matplotlib.rcParams) == before
    assert plt.get_fignums() == []
    assert picture == png(plot(synthetic.vanishing()))  # and no style of the user's leaks in


def test_the_same_input_gives_the_same_bytes() -> None:
    for kind in KINDS:
        assert png(plot(synthetic.carrying(), kind)) == png(plot(synthetic.carrying(), kind))


def test_a_notebook_shows_a_figure() -> None:
    figure = plot(synthetic.vanishing())
    assert isinstance(figure, Picture)
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_undefined_gains_draw_without_a_warning() -> None:
    layer = synthetic.layer()
    data = layer.data.copy(deep=True)
    for name in (
        "log_gain",
        "lag_median",
        "lag_low",
        "lag_high",
        "lag_fit",
        "log10_grad",
        "grad_norm",
    ):
        data[name] = data[name] * np.nan
    nothing = synthetic.layer(data=data, horizon=None)
    for kind in KINDS:
        assert overlapping(plot(synthetic.analysis(nothing), kind)) == []


def test_the_look_is_seaborns_style_with_ticks_whose_import_takes_a_second() -> None:
    style = seaborn.axes_style("ticks")
    own = {"image.cmap", "font.family", "font.sans-serif", "text.color"}  # and all that has ink
    inks = {name for name in style if name.endswith((".color", ".labelcolor", ".edgecolor"))}
    with look():
        shown = {name: matplotlib.rcParams[name] for name in style}
    differing = {name for name in style if shown[name] != style[name]}
    assert differing <= own | (inks - {"grid.color", "patch.edgecolor"})
    assert {"axes.axisbelow", "lines.solid_capstyle", "patch.force_edgecolor"} <= set(style)


def test_drawing_loads_neither_seaborn_nor_scipy_stats() -> None:
    code = "import sys, gradflow.reporter; print([m for m in ('seaborn', 'scipy.stats') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize("captions", [True, False])
def test_an_overview_of_many_layers_has_the_worst_and_says_so(captions: bool) -> None:
    rates = np.linspace(-0.9, 0.0, 20)
    many = [synthetic.layer(f"l{n}", "GRU", float(rate)) for n, rate in enumerate(rates)]
    figure = plot(synthetic.analysis(*many), captions=captions)
    (most,) = [words for text in figure.texts if "worst" in (words := text.get_text())]
    assert most.startswith("Of 20 layers the 12 with the worst verdicts; ")
    shown = " ".join(text.get_text() for text in figure.texts)
    assert "l11  ·" in shown and "l12  ·" not in shown
    assert figure.get_size_inches()[1] < 21
    twelve = plot(synthetic.analysis(*many[:12]), captions=captions)
    assert not any("worst" in text.get_text() for text in twelve.texts)


def test_a_report_of_many_layers_draws_the_worst_of_them() -> None:
    many = [synthetic.layer(f"l{n}", "GRU", -0.05 * (n + 1), steps=20) for n in range(40)]
    pictures = draw(synthetic.analysis(*many))
    drawn = {name for kind, name in pictures if kind == "gain-map"}
    assert drawn == {f"l{n}" for n in range(28, 40)}
