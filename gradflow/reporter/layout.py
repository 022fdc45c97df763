"""Blocks of panels, one below the other or side by side: each with its message, its axes, a caption."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace

from matplotlib.figure import Figure

from gradflow.reporter import panels
from gradflow.reporter.charts.chart import Chart
from gradflow.reporter.kinds import Kind
from gradflow.reporter.overview import UNWRITTEN, footer, footer_height
from gradflow.reporter.picture import INK, SOFT, Picture


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
    specials = scale.specials(charts) if scale else {}
    figure.set_size_inches(columns * step, tops[-1] + (footer_height(specials) if scale else 0))
    for number, block in enumerate(blocks):
        left, top = number % columns * step, tops[number // columns]
        _draw_head(figure, kind, block, titles[number], left, top)
        place = top + LINE * lines + BELOW + kind.above
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
        panels.say(axes[0], chart.note, width=int(kind.width / 0.075))
    else:
        kind.draw(axes, chart)
    return place
