"""Every picture: `plot` looks its kind up in `gradflow.reporter.kinds.KINDS` and draws it."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gradflow.analysis import Analysis, LayerAnalysis
from gradflow.errors import InputError, must_be
from gradflow.reporter import panels, prepare
from gradflow.reporter.kinds import KINDS, Kind
from gradflow.reporter.overview import Entry, draw_overview, footer, footer_height
from gradflow.reporter.picture import INK, SOFT, Picture, look


def plot(
    x: Analysis | Sequence[Analysis],
    kind: str = "overview",
    *,
    layer: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Draw an analysis, or several on one scale; the figure is unknown to pyplot.

    ``kind`` is one of `KINDS`; ``layer`` picks one layer by name; ``ax`` draws the kind's main panel
    of one layer into axes of your own. Colours are log10 ratios, ± six powers of ten, fixed.

    Raises:
        InputError: the kind or the layer is unknown, or ``ax`` is given for more than one layer.

    >>> import torch, gradflow
    >>> run = gradflow.diagnose(torch.nn.GRU(3, 8), torch.randn(20, 4, 3))
    >>> len(plot(run, "gain-map").axes) >= 1
    True
    """
    if not isinstance(kind, str) or kind not in KINDS:
        advice = "the overview is the one to look at first"
        raise InputError(must_be("kind", f"one of {', '.join(KINDS)}", repr(kind), advice))
    entries = _entries(x, layer)
    with look():
        if ax is not None:
            return _draw_into(ax, kind, entries)
        drawn = KINDS[kind]
        return draw_overview(entries) if drawn is None else _draw_blocks(drawn, entries)


def _entries(x: Analysis | Sequence[Analysis], layer: str | None) -> list[Entry]:
    """The layers to draw, with a prefix where they come from several analyses."""
    many = [x] if isinstance(x, Analysis) else list(x) if isinstance(x, Sequence) else [x]
    for one in many:
        if not isinstance(one, Analysis):
            advice = "analyze the recording first"
            what = "an Analysis or a list of Analyses"
            raise InputError(must_be("what is plotted", what, type(one).__name__, advice))
    named = len(many) > 1
    entries = [
        Entry(one.title if named else "", picked)
        for one in many
        for picked in ([one[layer]] if layer is not None else one)
    ]
    if not entries:
        advice = "record a model that has a recurrent layer"
        raise InputError(must_be("what is plotted", "an analysis with layers", "none", advice))
    return entries


def _draw_into(ax: Axes, kind: str, entries: list[Entry]) -> Figure:
    if len(entries) > 1:
        names = ", ".join(entry.layer.name for entry in entries)
        advice = "give layer= as well, or leave ax out"
        raise InputError(must_be("ax", "given for one layer", f"{len(entries)} ({names})", advice))
    layer = entries[0].layer
    drawn = KINDS[kind]
    if drawn is None:
        panels.draw_heat(ax, prepare.heat(layer))
        ax.set_title(entries[0].title, loc="left", parse_math=False)
    else:
        drawn.draw([ax], layer)
        ax.set_title(f"{layer.name}: {drawn.heading(layer)}", loc="left", parse_math=False)
    figure = ax.get_figure(root=True)
    if figure is None:
        raise InputError(
            must_be("ax", "part of a figure", "axes without one", "add it to a figure")
        )
    return figure


LEFT, RIGHT, HEAD, GAP, FOOT = 0.75, 0.25, 0.58, 0.16, 0.86  # inches around a block's panels


def _draw_blocks(kind: Kind, entries: list[Entry]) -> Figure:
    """One block per layer: its name, what is drawn, the panels, a caption; blocks in columns."""
    columns = min(kind.columns, len(entries))
    rows = [entries[start : start + columns] for start in range(0, len(entries), columns)]
    tops = [0.12]
    for row in rows:
        tops.append(tops[-1] + max(_height(kind, entry.layer) for entry in row))
    step = LEFT + kind.width + RIGHT
    layers = [entry.layer for entry in entries]
    specials = kind.scale.specials(layers) if kind.scale else {}
    figure = Picture(columns * step, tops[-1] + (footer_height(specials) if kind.scale else 0))
    for row, top in zip(rows, tops[:-1], strict=True):
        for column, entry in enumerate(row):
            _draw_block(figure, kind, entry, column * step, top)
    if kind.scale:
        wide = min(columns * step - LEFT - RIGHT, 5.6)
        footer(figure, specials, LEFT, tops[-1], wide, kind.scale.middle)
    return figure


def _height(kind: Kind, layer: LayerAnalysis) -> float:
    heights = kind.heights(layer)
    return HEAD + sum(heights) + GAP * (len(heights) - 1) + FOOT


def _draw_block(figure: Picture, kind: Kind, entry: Entry, left: float, top: float) -> None:
    name = figure.words(left + 0.3, top, entry.name, fontsize=10, fontweight="bold", color=INK)
    figure.fit(name, kind.width + 0.4)
    heading = kind.heading(entry.layer)
    line = figure.words(left + 0.3, top + 0.2, heading, fontsize=8, color=SOFT)
    figure.fit(line, kind.width + 0.4, 6.5)
    axes, place = [], top + HEAD
    for height in kind.heights(entry.layer):
        axes.append(figure.inches(left + LEFT, place, kind.width, height))
        place += height + GAP
    caption = textwrap.fill(kind.draw(axes, entry.layer), int(kind.width / 0.062))
    figure.words(left + 0.3, place - GAP + 0.4, caption, fontsize=8, color=SOFT, linespacing=1.3)
