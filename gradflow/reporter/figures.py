"""Every picture: `plot` looks its kind up in `gradflow.reporter.kinds.KINDS` and draws it."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gradflow.analysis import Analysis, LayerAnalysis
from gradflow.errors import InputError, must_be
from gradflow.reporter import panels, prepare
from gradflow.reporter.charts.chart import Chart
from gradflow.reporter.charts.step_labels import writable
from gradflow.reporter.fonts import legible
from gradflow.reporter.kinds import KINDS, Kind
from gradflow.reporter.overview import (
    NARROW,
    UNWRITTEN,
    Entry,
    draw_overview,
    footer,
    footer_height,
)
from gradflow.reporter.picture import INK, SOFT, Picture, look


def plot(
    x: Analysis | Sequence[Analysis],
    kind: str = "overview",
    *,
    layer: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Draw an analysis, or several on one scale; the figure is unknown to pyplot.

    Colours are log10 ratios, ± six powers of ten, fixed.

    Args:
        x: one analysis, or a list of them.
        kind: one of `KINDS`.
        layer: one layer by name; all by default.
        ax: axes of your own for the kind's main panel of one layer.

    Returns:
        The figure; with ``ax`` the one that they are part of.

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


def plot_narrow(analysis: Analysis) -> Figure:
    """The overview for a narrow screen: every curve below its heat map."""
    with look():
        return draw_overview(_entries(analysis, None), NARROW)


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
        _entry(one.title if named else "", picked)
        for one in many
        for picked in ([one[layer]] if layer is not None else one)
    ]
    if not entries:
        advice = "record a model that has a recurrent layer"
        raise InputError(must_be("what is plotted", "an analysis with layers", "none", advice))
    return entries


def _entry(group: str, layer: LayerAnalysis) -> Entry:
    """A layer to draw; without its labels where they would be a row of boxes."""
    if writable(layer.step_labels):
        return Entry(group, layer)
    return Entry(group, replace(layer, step_labels=()), unwritten=True)


@dataclass(frozen=True)
class Block:
    """One chart with the name above it."""

    name: str
    chart: Chart
    unwritten: bool  # see `Entry`

    @property
    def caption(self) -> str:
        """How to read it, and why its steps have numbers where they were given labels."""
        over_steps = self.unwritten and not self.chart.note
        return f"{self.chart.reading} {UNWRITTEN}" if over_steps else self.chart.reading


def _blocks(kind: Kind, entries: Sequence[Entry]) -> list[Block]:
    """A block per layer, or one for all layers of an analysis."""
    if not kind.together:
        return [
            Block(entry.name, kind.prepare(entry.layer), entry.unwritten and kind.stepped)
            for entry in entries
        ]
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.group, []).append(entry)
    return [
        Block(
            group,
            kind.prepare([entry.layer for entry in some]),
            any(entry.unwritten for entry in some),
        )
        for group, some in groups.items()
    ]


def _draw_into(ax: Axes, kind: str, entries: list[Entry]) -> Figure:
    drawn = KINDS[kind]
    if len(entries) > 1 and not (drawn and drawn.together):
        names = ", ".join(entry.layer.name for entry in entries)
        advice = "give layer= as well, or leave ax out"
        raise InputError(must_be("ax", "given for one layer", f"{len(entries)} ({names})", advice))
    if drawn is None:
        panels.draw_heat(ax, prepare.heat(entries[0].layer))
        title = entries[0].title
    else:
        block = _blocks(drawn, entries)[0]
        if block.chart.note:
            panels.say(ax, block.chart.note)
        else:
            drawn.draw([ax], block.chart)
        title = _title(block) or drawn.what
    ax.set_title(legible(title), loc="left", parse_math=False)
    figure = ax.get_figure(root=True)
    if figure is None:
        raise InputError(
            must_be("ax", "part of a figure", "axes without one", "add it to a figure")
        )
    return figure


def _title(block: Block) -> str:
    """The message as a headline; of a layer with its name."""
    return ": ".join(part for part in (block.name, block.chart.message) if part)


RIGHT, FOOT = 0.25, 0.86  # inches around a block's panels
LINE, BELOW, ABOVE = 0.19, 0.2, 0.22  # a line of the title; what is drawn; room for a key
EMPTY = (0.8,)  # the height of a panel that holds words only


def _draw_blocks(kind: Kind, entries: list[Entry]) -> Figure:
    """One block per chart: its message, what is drawn, the panels, a caption; blocks in columns."""
    blocks = _blocks(kind, entries)
    columns = min(kind.columns, len(blocks))
    kind = replace(kind, left=kind.left + max(kind.beside(block.chart) for block in blocks))
    step = kind.left + kind.width + RIGHT
    figure = Picture(columns * step, 1)
    titles = [_fold(figure, block, step - 0.5) for block in blocks]
    lines = max(len(title) for title in titles)
    captions = [textwrap.wrap(block.caption, int(kind.width / 0.062)) for block in blocks]
    tall = [_height(kind, block, lines) for block in blocks]
    tall = [
        high + (0 if block.chart.note else 0.145 * max(0, len(caption) - 2))
        for high, block, caption in zip(tall, blocks, captions, strict=True)
    ]
    tops = [0.12]
    for start in range(0, len(blocks), columns):
        tops.append(tops[-1] + max(tall[start : start + columns]))
    charts = [block.chart for block in blocks if not block.chart.note]
    scale = kind.scale if kind.scale and any(map(kind.scale.used, charts)) else None
    specials = scale.specials(charts) if scale else {}
    figure.set_size_inches(columns * step, tops[-1] + (footer_height(specials) if scale else 0))
    for number, block in enumerate(blocks):
        left, top = number % columns * step, tops[number // columns]
        _draw_head(figure, kind, block, titles[number], left, top)
        place = top + LINE * lines + BELOW + ABOVE
        bottom = _draw_panels(figure, kind, block.chart, left + kind.left, place)
        if not block.chart.note:
            figure.words(
                left + 0.3, bottom + 0.4 + kind.below(block.chart), "\n".join(captions[number]),
                fontsize=8, color=SOFT, linespacing=1.3,
            )  # fmt: skip
    if scale:
        wide = min(columns * step - kind.left - RIGHT, 5.6)
        footer(figure, specials, kind.left, tops[-1], wide, scale.draw)
    return figure


def _height(kind: Kind, block: Block, lines: int) -> float:
    heights = EMPTY if block.chart.note else kind.heights(block.chart)
    gaps = sum(kind.gap(block.chart, panel) for panel in range(1, len(heights)))
    foot = 0.3 if block.chart.note else FOOT + kind.below(block.chart)
    return LINE * lines + BELOW + ABOVE + sum(heights) + gaps + foot


def _fold(figure: Picture, block: Block, width: float) -> list[str]:
    """A headline on one line, or folded on two; a name that is too long loses its beginning."""
    style = {"fontsize": 10, "fontweight": "bold"}
    # a line may break early, so two lines hold less than twice the width
    title = figure.shortened(_title(block), block.name, 1.6 * width, **style)
    return figure.folded(title, width, **style)


def _draw_head(
    figure: Picture, kind: Kind, block: Block, title: list[str], left: float, top: float
) -> None:
    width = kind.left + kind.width + RIGHT - 0.5
    for number, line in enumerate(title):
        said = figure.words(
            left + 0.3, top + LINE * number, line, fontsize=10, fontweight="bold", color=INK
        )
        figure.fit(said, width)
    what = figure.words(
        left + 0.3, top + LINE * len(title) + 0.02, kind.what, fontsize=8, color=SOFT
    )
    figure.fit(what, width)


def _draw_panels(figure: Picture, kind: Kind, chart: Chart, left: float, top: float) -> float:
    """The panels of a block, one below the other; where they end."""
    heights = EMPTY if chart.note else kind.heights(chart)
    axes, place = [], top
    for panel, height in enumerate(heights):
        place += kind.gap(chart, panel) if panel else 0
        axes.append(figure.inches(left, place, kind.width, height))
        place += height
    if chart.note:
        panels.say(axes[0], chart.note, width=int(kind.width / 0.075))
    else:
        kind.draw(axes, chart)
    return place
