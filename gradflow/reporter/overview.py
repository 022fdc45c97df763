"""The overview: one row per layer and direction, how far back the gradient reaches.

Left, three times as wide: units × steps of the gradient of the last loss step. Right: the largest
gain against the distance. Colours and axes are shared by all rows, so rows can be compared.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from gradflow.analysis import LayerAnalysis
from gradflow.reporter import panels, prepare
from gradflow.reporter.charts.chart import below
from gradflow.reporter.picture import INK, SOFT, Picture
from gradflow.reporter.prepare import Heat, LagLine
from gradflow.reporter.scale import BAD, UNDEFINED, VERDICT_COLOURS, WRONG, ZERO

LEFT, GAP = 0.5, 0.32  # inches
HEAD, TICKS, LABEL = 0.45, 0.34, 0.17  # above a row's panels; below them; its axis labels
WORDS, LOW = 0.24, 1.05  # a curve below its heat map: the line above it, and its height
# rows in the figure -> height of a row's panels; more rows are lower
HEIGHTS = {1: 2.3, 2: 1.7, 3: 1.35, 4: 1.15, 6: 0.95, 12: 0.8}
LOWEST = 0.62
LINE = 0.17  # a line of the caption
UNWRITTEN = (
    "No font on this machine has the letters of the labels, so steps are numbered; install one, "
    "for Chinese e.g. Noto Sans CJK."
)
WHOLE = "its last step alone is not known; with a loss at many steps it need not fade."
SMALLEST = 7.0  # points: on a page the figure is shown at four fifths of its size


@dataclass(frozen=True)
class RowWidths:
    """The widths, in inches, and whether the curve stands beside its heat map or below it."""

    width: float
    heat: float
    curve: float
    beside: bool

    @property
    def room(self) -> float:
        """For a line of words across the figure."""
        return self.width - LEFT - 0.1

    @property
    def curve_left(self) -> float:
        """Where the curve begins."""
        return LEFT + self.heat + GAP if self.beside else LEFT


WIDE = RowWidths(8.8, 5.55, 1.85, beside=True)
NARROW = RowWidths(4.5, 3.85, 3.35, beside=False)  # for a telephone held upright


@dataclass(frozen=True)
class Entry:
    """A layer to draw, with the name of its analysis where there are several."""

    group: str
    layer: LayerAnalysis
    unwritten: bool = False  # whether no font at hand has the letters of its steps' labels

    @property
    def title(self) -> str:
        """The finding, as a headline."""
        if not self.group or self.layer.title.startswith(f"{self.group}:"):
            return self.layer.title  # "RNN — RNN: …" would say it twice
        return f"{self.group} — {self.layer.title}"

    @property
    def name(self) -> str:
        """The layer's name."""
        return f"{self.group} — {self.layer.name}" if self.group else self.layer.name


def draw_overview(
    entries: Sequence[Entry], layout: RowWidths = WIDE, *, captioned: bool = True, left_out: int = 0
) -> Figure:
    """The overview figure of these layers, without its captions where there is text around it."""
    heats = prepare.cropped([prepare.heat(entry.layer) for entry in entries])
    lines = [prepare.lag_line(entry.layer) for entry in entries]
    reach = curve_reach(lines, [entry.layer for entry in entries])
    top = curve_top(lines)
    height = panel_height(len(entries))
    specials = special_colours([(heat.values, heat.bad) for heat in heats if not heat.note])
    labelled = labelled_rows(heats)
    figure = Picture(layout.width, 1.0)  # to measure words; its height comes when all is placed
    heads = [_headline(figure, entry, layout) for entry in entries]
    places, place = [], 0.08
    for number, head in enumerate(heads):
        places.append(place + LINE * (len(head) - 1))
        place = places[-1] + HEAD + height + TICKS + below(heats[number].labels)
        place += LABEL if number in labelled else 0
        if not layout.beside:
            place += WORDS + LOW + TICKS + (LABEL if number in labelled else 0)
    explained = captions(entries, heats, layout) if captioned else []
    if left_out:
        worst = f"Of {len(entries) + left_out} layers the {len(entries)} with the worst verdicts; "
        explained = [f"{worst}gradflow.plot(run, layer=NAME) draws another.", *explained]
    words = [
        line
        for caption in explained
        for line in ([caption] if layout.beside else textwrap.wrap(caption, 64))
    ]
    bar = panels.ratio_bar("as at the loss")
    legend = place + (0.04 if layout.beside else footer_height(specials, bar) + 0.06)
    foot = place + footer_height(specials, bar) + (0 if layout.beside else 0.5)
    figure.set_size_inches(layout.width, foot + LINE * len(words))
    for number, (entry, heat, line) in enumerate(zip(entries, heats, lines, strict=True)):
        label, top_of_row = number in labelled, places[number]
        _head(figure, entry, heat, layout, top_of_row, heads[number])
        left = figure.inches(LEFT, top_of_row + HEAD, layout.heat, height)
        panels.draw_heat(left, heat, label=label)
        above = top_of_row + HEAD - WORDS + 0.02
        if not layout.beside:
            above += height + TICKS + below(heat.labels) + (LABEL if label else 0) + WORDS
        _said(figure, entry, line, layout, above)
        high = height if layout.beside else LOW
        right = figure.inches(layout.curve_left, above + WORDS - 0.02, layout.curve, high)
        right.yaxis.tick_right()
        right.yaxis.set_label_position("right")
        right.set_ylabel("" if line.note else "gain", labelpad=4)
        panels.draw_lag(right, line, entry.layer, reach, top, label=label)
    footer(figure, specials, LEFT, place + 0.04, layout.heat, bar)
    _legend(figure, layout, legend)
    for number, caption in enumerate(words):
        said = figure.words(LEFT, foot + LINE * (number - 0.2), caption, fontsize=8, color=SOFT)
        figure.fit(said, layout.room)
    return figure


def captions(
    entries: Sequence[Entry], heats: Sequence[Heat], layout: RowWidths = WIDE
) -> list[str]:
    """How to read the figure: one line, and one more for what would puzzle in these rows."""
    heat, curve = ("left", "right") if layout.beside else ("above", "below")
    drawn = [heat for heat in heats if not heat.note]
    loss = "whole loss" if drawn and all(one.whole for one in drawn) else "last loss step"
    lines = [
        f"{heat.capitalize()}: how much of the {loss}'s gradient reaches each unit, step by "
        f"step. {curve.capitalize()}: the most that any direction keeps from step t to t′."
    ]
    if any(entry.unwritten for entry in entries):
        lines.append(UNWRITTEN)
    if any(heat.whole and not heat.note for heat in heats):
        lines.append(f"The whole loss's gradient{_where_whole(entries, heats)}: {WHOLE}")
    shown = [entry.layer for entry, heat in zip(entries, heats, strict=True) if not heat.note]
    if any(_is_fed(layer, [entry.layer for entry in entries]) for layer in shown):
        lines.append(
            "A layer below another also gets gradient from above at every step: it may stay bright "
            f"{_where(heat)} where its own memory, {_where(curve)}, is gone."
        )
    return lines


def _where_whole(entries: Sequence[Entry], heats: Sequence[Heat]) -> str:
    """Which rows show the whole loss's gradient, where others do not."""
    whole = [e.name for e, heat in zip(entries, heats, strict=True) if heat.whole]
    return "" if len(whole) == len(entries) else f" of {', '.join(whole)}"


def _where(side: str) -> str:
    return f"on the {side}" if side in ("left", "right") else side


_NUMBER = re.compile(r"^(.*?)l(\d+)(?:_reverse)?(@\d+)?$")


def _is_fed(layer: LayerAnalysis, layers: Sequence[LayerAnalysis]) -> bool:
    """Whether one of these layers lies above a layer in its own module."""
    own = _NUMBER.match(layer.name)
    others = [found for other in layers if (found := _NUMBER.match(other.name))]
    return own is not None and any(
        other[1] == own[1] and other[3] == own[3] and int(other[2]) > int(own[2])
        for other in others
    )


def labelled_rows(heats: Sequence[Heat]) -> set[int]:
    """Rows that say what their axes are: all of a few, else the last, and the last with a picture."""
    rows = set(range(len(heats))) if len(heats) <= 3 else {len(heats) - 1}
    return rows | {max((n for n, heat in enumerate(heats) if not heat.note), default=0)}


def panel_height(rows: int) -> float:
    """Inches per row's panels: fewer when there are many rows.

    >>> panel_height(1) > panel_height(12) > panel_height(40)
    True
    """
    return next((height for most, height in HEIGHTS.items() if rows <= most), LOWEST)


def curve_reach(lines: Sequence[LagLine], layers: Sequence[LayerAnalysis]) -> float:
    """The largest distance on the axis: four times as far as the gradient reaches, shared by rows."""
    needed = [1.0]
    for line, layer in zip(lines, layers, strict=True):
        last = float(line.lag[-1]) if len(line.lag) else 1.0
        needed.append(last if layer.horizon is None else min(last, max(4.0 * layer.horizon, 10.0)))
    return max(needed)


def curve_top(lines: Sequence[LagLine]) -> float:
    """The highest power of ten on the axis: 10², or 10⁸ where something explodes."""
    peaks = [line.median[np.isfinite(line.median)] for line in lines]
    high = max((float(peak.max()) for peak in peaks if len(peak)), default=0.0)
    return 8.0 if high > panels.CURVE_TOP else panels.CURVE_TOP


def describe(entry: Entry, heat: Heat) -> str:
    """One line under the headline: which layer, and what is drawn."""
    unit = "cell" if heat.state == "c" else "unit"
    whole = "the whole loss's " if heat.whole else ""
    parts = [
        *_named(entry),
        f"{whole}|∂L/∂{heat.state}| of each {unit} ÷ their typical size at the loss, "
        + ("largest on top" if heat.whole else "longest memory on top"),
    ]
    pooled = []
    if heat.step_pool > 1:
        pooled.append(f"{heat.step_pool} steps")
    if heat.unit_pool > 1:
        pooled.append(f"{heat.unit_pool} {unit}s")
    if pooled:
        parts.append(f"each the largest of {' × '.join(pooled)}")
    return "  ·  ".join(parts)


def _named(entry: Entry) -> list[str]:
    """The layer's name, where the headline does not begin with it."""
    return [] if entry.layer.name in entry.title else [entry.layer.name]


TITLE: dict[str, Any] = {"fontsize": 10.5, "fontweight": "bold", "color": INK}


def _headline(figure: Picture, entry: Entry, layout: RowWidths) -> list[str]:
    """The finding, on two lines where one is too narrow for it."""
    wanted = figure.shortened(entry.title, entry.layer.name, 1.3 * layout.room, **TITLE)
    return [wanted] if layout.beside else figure.folded(wanted, layout.room, **TITLE)


def _head(
    figure: Picture, entry: Entry, heat: Heat, layout: RowWidths, place: float, headline: list[str]
) -> None:
    """The finding above a row, and what its heat map shows; the last line of the headline at `place`."""
    for above, words in enumerate(reversed(headline)):
        figure.fit(figure.words(LEFT, place - LINE * above, words, **TITLE), layout.room, 8.0)
    below = figure.words(LEFT, place + 0.23, describe(entry, heat), fontsize=8, color=SOFT)
    if heat.broken:
        said = figure.words(
            LEFT + layout.heat, place + 0.23, heat.broken, fontsize=8, color=WRONG, ha="right",
            fontweight="bold",
        )  # fmt: skip
        below.set_text(
            "  ·  ".join([*_named(entry), f"|∂L/∂{heat.state}| ÷ its typical size at the loss"])
        )
        figure.fit(below, layout.heat - figure.width_of(said) - 0.2, SMALLEST)
    figure.fit(below, layout.heat - 0.1, SMALLEST)


def _said(figure: Picture, entry: Entry, line: LagLine, layout: RowWidths, place: float) -> None:
    """How far the gain reaches, above the curve."""
    if not line.words:
        return
    left = layout.curve_left
    dot = figure.words(left, place, "●" if line.dot else "—", fontsize=8)
    dot.set(color=VERDICT_COLOURS[entry.layer.verdict], fontweight="bold")
    figure.fit(figure.words(left + 0.14, place, line.words, fontsize=8), layout.curve, SMALLEST)


def footer(
    figure: Picture,
    specials: Mapping[str, str],
    left: float,
    top: float,
    width: float,
    bar: panels.ColourBar,
) -> None:
    """The colour bar in words, what of it is unusual, and the colours outside it that occur."""
    panels.draw_scale(figure.inches(left, top, width, 0.11), bar, short=width < 5)
    if bar.note:
        said = figure.words(left, top + 0.355 + 0.17 * bool(specials), bar.note, fontsize=8)
        figure.fit(said, figure.get_size_inches()[0] - left - 0.1, SMALLEST - 1)
    for colour, words in specials.items():
        ax = figure.inches(left, top + 0.37, 0.11, 0.11)
        ax.set(xticks=[], yticks=[], facecolor=colour)
        left += 0.46 + figure.width_of(figure.words(left + 0.16, top + 0.355, words, fontsize=8))


def footer_height(specials: Mapping[str, str], bar: panels.ColourBar) -> float:
    """Inches below the rows: the colour bar, and a line for colours outside it, and for its note."""
    return (0.62 if specials else 0.5) + 0.17 * bool(bar.note)


def special_colours(
    images: Sequence[tuple[np.ndarray, np.ndarray]], undefined: str = "no earlier step"
) -> dict[str, str]:
    """Colour -> its meaning, for those outside the scale in these (values, bad) images."""
    found = {}
    if any(np.isneginf(values).any() for values, _ in images):
        found[ZERO] = "exactly zero"
    if any((np.isnan(values) & ~bad).any() for values, bad in images):
        found[UNDEFINED] = undefined
    if any(bad.any() for _, bad in images):
        found[BAD] = "NaN or Inf"
    return found


def _legend(figure: Picture, layout: RowWidths, top: float) -> None:
    left = layout.curve_left
    said = "largest gain from step t to t′"
    figure.fit(figure.words(left, top - 0.05, said, fontsize=8, color=SOFT), layout.curve + 0.4)
    handles = [
        Line2D([], [], color=SOFT, lw=1.8, label="median"),
        Patch(color=SOFT, alpha=0.3, lw=0, label="10–90 %"),
        Line2D([], [], color=INK, lw=0.8, ls=(0, (2, 2)), label="rate"),
    ]
    wide, high = figure.get_size_inches()
    figure.legend(
        handles=handles,
        loc="upper left",
        frameon=False,
        borderaxespad=0,
        borderpad=0,
        bbox_to_anchor=(left / wide, 1 - (top + 0.15) / high),
        handlelength=1.3,
        ncols=3,
        columnspacing=0.8,
        handletextpad=0.35,
        fontsize=7.5,
    )
