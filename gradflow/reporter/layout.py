"""Blocks of panels, one below the other or side by side: each with its message, its axes, a caption."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from gradflow.errors import InputError, must_be
from gradflow.reporter import panels
from gradflow.reporter.charts.chart import Chart
from gradflow.reporter.fonts import inches, legible
from gradflow.reporter.kinds import Kind, Scale
from gradflow.reporter.overview import SMALLEST, UNWRITTEN, footer, footer_height
from gradflow.reporter.picture import INK, SOFT, Picture, ending


@dataclass(frozen=True)
class PanelBlock:
    """One chart with the name above it."""

    name: str
    chart: Chart
    unwritten: bool  # see `Entry`

    @property
    def caption(self) -> str:
        """How to read it, and why its steps have numbers where they were given labels."""
        over_steps = self.unwritten and not self.chart.note
        return f"{self.chart.reading} {UNWRITTEN}" if over_steps else self.chart.reading


def bare(block: PanelBlock) -> PanelBlock:
    """The same without a caption."""
    return replace(block, chart=replace(block.chart, reading=""), unwritten=False)


def title(block: PanelBlock) -> str:
    """The message as a headline; of a layer with its name."""
    return ": ".join(part for part in (block.name, block.chart.message) if part)


RIGHT, FOOT, BARE = 0.25, 0.86, 0.6  # inches around a block's panels; below them without a caption
LINE, BELOW = 0.19, 0.2  # a line of the title; what is drawn
EMPTY = (0.8,)  # the height of a panel that holds words only


def draw_blocks(kind: Kind, blocks: Sequence[PanelBlock]) -> Figure:
    """One block per chart: its message, what is drawn, the panels, a caption; blocks in columns."""
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
    specials, bar = (scale.specials(charts), scale.bar()) if scale else ({}, None)
    foot = 0 if bar is None else footer_height(specials, bar)
    figure.set_size_inches(columns * step, tops[-1] + foot)
    for number, block in enumerate(blocks):
        left, top = number % columns * step, tops[number // columns]
        _draw_head(figure, kind, block, titles[number], left, top)
        place = top + LINE * lines + BELOW + kind.above
        bottom = _draw_panels(figure, kind, block.chart, left + kind.left, place)
        if captions[number] and not block.chart.note:
            figure.words(
                left + 0.3, bottom + 0.4 + kind.below(block.chart), "\n".join(captions[number]),
                fontsize=8, color=SOFT, linespacing=1.3,
            )  # fmt: skip
    if bar is not None:
        wide = min(columns * step - kind.left - RIGHT, 5.6)
        footer(figure, specials, kind.left, tops[-1], wide, bar)
    return figure


def finish_axes(ax: Axes, scale: Scale | None, chart: Chart, block: tuple[str, str]) -> Figure:
    """Headline and colour bar for axes of a reader's own; ``block`` is the headline and the name in it."""
    figure = ax.get_figure(root=True)
    if figure is None:
        advice = "add it to a figure"
        raise InputError(must_be("ax", "part of a figure", "axes without one", advice))
    if scale and not chart.note and scale.used(chart):
        panels.stand_beside(ax, scale.bar(), scale.specials([chart]))
    if ax.get_legend() is not None:  # above the axes is the headline
        key = ax.legend(loc="best", fontsize=7, frameon=True, framealpha=0.85, borderpad=0.3)
        key.set_in_layout(False)  # inside the axes it asks for no room
        letters = max(12, int(ax.bbox.width / figure.dpi / 0.055) - 6)
        for text in key.get_texts():
            text.set_text(textwrap.fill(text.get_text(), letters))
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)  # the room that it leaves is the headline's
    _thin(ax, figure.dpi)
    headline, name = block
    said = ax.set_title("", loc="left", parse_math=False)
    room = figure.bbox.height - ax.bbox.y1 - 6  # pixels; a layout engine makes it
    size, most = float(said.get_fontsize()), 3
    while True:
        if engine is None:
            most = min(3, max(1, int(room / (1.25 * size * figure.dpi / 72))))
        lines = wrapped(said, (legible(headline), legible(name)), ax.bbox.width, most)
        if not lines[-1].endswith(" …") or size <= SMALLEST:
            break
        size = max(SMALLEST, size - 1)
        said.set_fontsize(size)
    said.set_text("\n".join(lines))
    return figure


def _thin(ax: Axes, dpi: float) -> None:
    """Of the numbers along the bottom every second, third, … one, until none meet."""
    low, high = sorted(ax.get_xlim())
    places = [float(place) for place in ax.get_xticks()]
    words = ax.xaxis.get_major_formatter().format_ticks(places)
    shown = [pair for pair in zip(places, words, strict=True) if low <= pair[0] <= high]
    labels = ax.get_xticklabels()
    if any(label.get_rotation() for label in labels):
        return
    at = [ax.transData.transform((place, 0))[0] / dpi for place, _ in shown]
    half = [inches(word, float(labels[0].get_fontsize())) / 2 + 0.03 for _, word in shown]
    for every in range(1, len(shown)):
        ends = sorted((x - h, x + h) for x, h in zip(at[::every], half[::every], strict=True))
        if all(left[1] <= right[0] for left, right in pairwise(ends)):
            break
    else:
        return
    if every > 1:
        ax.set_xticks(*zip(*shown[::every], strict=True))


def wrapped(text: Text, said: tuple[str, str], width: float, most: int) -> list[str]:
    """Words on as many lines as they need in a width in pixels; what does not fit ends in an ellipsis.

    The second of what is ``said`` is a name in them: too long for a line it loses its beginning, since
    names differ at the end.
    """
    words, name = said
    figure = text.get_figure(root=True)
    renderer = RendererAgg(1, 1, figure.dpi if figure else 100)

    def fits(line: str) -> bool:
        text.set_text(line)
        return bool(text.get_window_extent(renderer).width <= width)

    kept, letters = name, len(name)
    while not fits(kept) and letters > 3:
        letters -= 1
        kept = ending(name, letters)
    lines = [""]
    for word in (words.replace(name, kept, 1) if name else words).split(" "):
        longer = f"{lines[-1]} {word}".strip()
        lines[-1:] = [longer] if fits(longer) or not lines[-1] else [lines[-1], word]
    if len(lines) <= most:
        return lines
    last = lines[most - 1] + " …"
    while not fits(last) and " " in last[:-2]:
        last = last[:-2].rpartition(" ")[0] + " …"
    return [*lines[: most - 1], last]


def _height(kind: Kind, block: PanelBlock, lines: int) -> float:
    heights = EMPTY if block.chart.note else kind.heights(block.chart)
    gaps = sum(kind.gap(block.chart, panel) for panel in range(1, len(heights)))
    foot = FOOT if block.caption else BARE
    foot = 0.3 if block.chart.note else foot + kind.below(block.chart)
    return LINE * lines + BELOW + kind.above + sum(heights) + gaps + foot


def _fold(figure: Picture, block: PanelBlock, width: float) -> list[str]:
    """A headline on one line, or folded on two; a name that is too long loses its beginning."""
    style = {"fontsize": 10, "fontweight": "bold"}
    # a line may break early, so two lines hold less than twice the width
    words = figure.shortened(title(block), block.name, 1.6 * width, **style)
    return figure.folded(words, width, **style)


def _draw_head(
    figure: Picture, kind: Kind, block: PanelBlock, title: list[str], left: float, top: float
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
        panels.say(axes[0], chart.note)
    else:
        kind.draw(axes, chart)
    return place
