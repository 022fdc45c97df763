"""The single panels figures are made of; each draws prepared arrays into axes and computes nothing."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap
from matplotlib.font_manager import FontProperties
from matplotlib.ticker import MaxNLocator

from gradflow.analysis import LayerAnalysis
from gradflow.limits import power
from gradflow.reporter import prepare
from gradflow.reporter.charts.chart import label_steps, whole
from gradflow.reporter.fonts import inches, legible
from gradflow.reporter.numbers import ratio_words
from gradflow.reporter.picture import FAINT, INK, SOFT
from gradflow.reporter.prepare import Heat, LagLine
from gradflow.reporter.readout import Cells, Curves, Grid, tell
from gradflow.reporter.scale import (
    BAD,
    COLOURS,
    FIXED,
    UNDEFINED,
    VERDICT_COLOURS,
    ZERO,
    ends,
    paint,
)

CURVE_FLOOR, CURVE_TOP = -8.0, 2.0
SHADE = "#ededed"
NAMED = {UNDEFINED: "grey", ZERO: "black", BAD: "magenta"}  # colours outside the scale
BEYOND = "no earlier step: the layer starts, or its state was cut, at the right"


def draw_heat(ax: Axes, heat: Heat, *, label: bool = True) -> None:
    """Units × steps back from the loss in the fixed colours; words where there is no gradient."""
    if heat.note:
        say(ax, heat.note)
        return
    rows, columns = heat.values.shape
    left = columns * heat.step_pool - 0.5
    bottom = rows * heat.unit_pool + 0.5
    ax.imshow(
        paint(heat.values, heat.bad),
        aspect="auto",
        interpolation="nearest",
        extent=(left, -0.5, bottom, 0.5),
    )
    ax.set_xlim(heat.steps - 0.5, -0.5)
    ax.set_ylim(heat.units + 0.5, 0.5)
    tell(ax, _heat_grid(heat, (left, -0.5), (0.5, bottom)))
    if heat.beyond > 0.3 * columns:  # wide enough for words
        _in_the_middle(ax, BEYOND, heat.beyond / columns, fontsize=8, color=INK)
    if heat.labels:
        label_steps(ax.xaxis, heat.labels[::-1], range(len(heat.labels))[::-1])
    else:
        ticks = back_ticks(heat.steps)
        ax.set_xticks(ticks, ["loss" if tick == 0 else str(tick) for tick in ticks])
    ends = [1, heat.units] if heat.units > 1 else [1]
    ax.set_yticks(ends, [str(end) for end in ends])
    ax.set_ylabel("cell" if heat.state == "c" else "unit", labelpad=2)
    if label:
        words = "steps, the loss on the right" if heat.labels else "steps back from the loss"
        ax.set_xlabel(words, labelpad=2)


def _heat_grid(heat: Heat, across: tuple[float, float], down: tuple[float, float]) -> Grid:
    """The same for the pointer: what of the gradient reaches which unit, so many steps back."""
    rows, columns = heat.values.shape
    unit = "cell" if heat.state == "c" else "unit"
    names = [", ".join(map(str, heat.numbers[row * heat.unit_pool : (row + 1) * heat.unit_pool]))
             for row in range(rows)]  # fmt: skip
    largest = "the largest of " * (heat.unit_pool * heat.step_pool > 1)
    whose = f"{largest}{unit}{'s' * (heat.unit_pool > 1)} {{y}}, {{x}} back from the loss"
    size = f"typical size of |∂L/∂{heat.state}| at the loss"
    return Grid(
        values=heat.values,
        bad=heat.bad,
        across=Cells(
            np.array(across),
            np.arange(columns)[::-1] * heat.step_pool,
            more=heat.step_pool - 1,
            noun="step",
            labels=heat.labels[:: heat.step_pool][:columns][::-1] if heat.step_pool == 1 else (),
        ),
        down=Cells(np.array(down), np.arange(1, rows + 1), names=tuple(names)),
        words={
            "some": f"{whose}: {{value}} of the {size}",
            "more": f"{whose}: {{value}} the {size}",
            "zero": f"{whose}: exactly zero",
            "none": f"{whose}: no such step, or the state was cut before the loss",
            "bad": f"{whose}: NaN or Inf",
        },
    )


def back_ticks(steps: int) -> list[int]:
    """Round numbers of steps back, the loss, and the earliest step where there is room.

    >>> back_ticks(100), back_ticks(1)
    ([0, 20, 40, 60, 80, 99], [0])
    """
    if steps == 1:
        return [0]
    round_numbers = whole(6).tick_values(0, steps - 1)
    ticks = [int(tick) for tick in round_numbers if 0 <= tick <= steps - 1]
    if steps - 1 - ticks[-1] > 0.06 * steps:
        ticks.append(steps - 1)
    return ticks


def draw_lag(
    ax: Axes, line: LagLine, layer: LayerAnalysis, reach: float, top: float, *, label: bool = True
) -> None:
    """The lag curve with its band, the fit, the line below which it is gone and the dot where it goes."""
    ax.set_xlim(0, max(reach, 1))
    ax.set_ylim(CURVE_FLOOR, top)
    if label:
        ax.set_xlabel("distance t′ − t in steps", labelpad=2)
    if line.note:
        say(ax, line.note)
        return
    ax.axhspan(CURVE_FLOOR, prepare.GONE_DECADES, color=SHADE, lw=0, zorder=0)
    ax.axhline(0, color=FAINT, lw=0.7, zorder=1)
    ax.axhline(prepare.GONE_DECADES, color=FAINT, lw=0.7, ls=(0, (4, 3)), zorder=1)
    _draw_line(ax, line, VERDICT_COLOURS[layer.verdict], top)
    quantiles = (("median", line.median), ("10 % quantile", line.low), ("90 % quantile", line.high))
    tell(ax, Curves(line.lag, quantiles, log10=True, share=True))
    ax.xaxis.set_major_locator(whole(6))
    figure = ax.get_figure(root=True)
    inches = ax.get_window_extent().height / (figure.dpi if figure else 100)
    ticks = gain_ticks(top, inches)
    ax.set_yticks(ticks, [power(tick) for tick in ticks])


def gain_ticks(top: float, inches: float) -> list[int]:
    """Powers of ten to label on a gain axis, fewer where the panel is low.

    >>> gain_ticks(2, 2.0), gain_ticks(8, 0.8)
    ([-6, -3, 0], [-6, 0, 6])
    """
    apart = 3 if inches / (top - CURVE_FLOOR) > 0.07 else 6
    return [tick for tick in range(-6, 9, apart) if tick <= top]


def _draw_line(ax: Axes, line: LagLine, colour: str, top: float) -> None:
    ax.fill_between(line.lag, line.low, line.high, color=colour, alpha=0.25, lw=0, zorder=2)
    ax.plot(line.lag, line.fit, color=INK, lw=0.8, ls=(0, (2, 2)), zorder=3)
    ax.plot(line.lag, line.median, color=colour, lw=1.8, zorder=4)
    if line.zero_from is not None and line.zero_from > 0:
        known = line.median[: line.zero_from]
        start = known[-1] if len(known) and np.isfinite(known[-1]) else top
        ax.plot([line.zero_from] * 2, [start, CURVE_FLOOR], color="black", lw=1.8, zorder=4)
    if line.dot is not None:
        x, y = line.dot
        ax.plot([x], [y], "o", color=colour, ms=5.5, mec="white", mew=0.8, zorder=6, clip_on=False)


def draw_slope(
    ax: Axes,
    lag: np.ndarray,
    slope: np.ndarray,
    layer: LayerAnalysis,
    reach: float,
    limits: tuple[float, float],
) -> None:
    """The local slope of the lag curve, and the rate with its interval."""
    colour = VERDICT_COLOURS[layer.verdict]
    rate = layer.rate
    if layer.rate_told and np.isfinite([rate.low, rate.high]).all():
        ax.axhspan(rate.low, rate.high, color=colour, alpha=0.25, lw=0)
    if layer.rate_told:
        ax.axhline(rate.value, color=INK, lw=0.8, ls=(0, (2, 2)))
    ax.axhline(0, color=FAINT, lw=0.7)
    finite = np.where(np.isfinite(slope), slope, np.nan)
    lone = "." if np.isfinite(finite).sum() < 3 else None
    ax.plot(lag, finite, color=colour, lw=1.1, marker=lone)
    tell(ax, Curves(lag, [("", finite)], log10=False))
    ax.set_xlim(0, max(reach, 1))
    ax.set_ylim(*limits)
    ax.set_ylabel("nats per step", labelpad=2)
    ax.set_xlabel("distance t′ − t in steps", labelpad=2)
    ax.yaxis.set_major_locator(MaxNLocator(nbins=4))
    ax.xaxis.set_major_locator(whole(6))


@dataclass(frozen=True)
class ColourBar:
    """What colours mean."""

    colours: ListedColormap  # from one end to the other, evenly
    words: Mapping[float, str]  # place from 0 to 1 -> what it says, where there is room
    short: Mapping[float, str]  # the same where there is little
    note: str = ""  # what is not as in other pictures


def ratio_bar(middle: str) -> ColourBar:
    """The scale of gradients and gains; ``middle`` says what the pale yellow means."""
    low, high = ends()
    if (low, high) == FIXED:
        words = {
            0.0: "≤ 10⁻⁶ vanished",
            0.25: "10⁻³",
            0.5: middle,
            0.75: "10³",
            1.0: "exploded ≥ 10⁶",
        }
        return ColourBar(COLOURS, words, {0.0: "≤ 10⁻⁶ gone", 0.5: middle, 1.0: "≥ 10⁶"})
    least, most = (power(int(end)) if end == int(end) else ratio_words(end) for end in (low, high))
    words = {0.0: f"≤ {least}", 0.5: middle, 1.0: f"≥ {most}"}
    said = f"colours narrowed to {least} … {most} on request"
    return ColourBar(COLOURS, words, words, said)


def draw_scale(ax: Axes, bar: ColourBar, *, short: bool = False) -> None:
    """The colour bar, in words."""
    colours = bar.colours(np.arange(bar.colours.N))[None, :, :3]
    ax.imshow(colours, aspect="auto", extent=(0, 1, 0, 1), interpolation="nearest")
    ax.set_yticks([])
    marks = bar.short if short else bar.words
    ax.set_xticks(list(marks), list(marks.values()))
    first, *_, last = ax.get_xticklabels()
    first.set_horizontalalignment("left")
    last.set_horizontalalignment("right")
    ax.tick_params(axis="x", length=2.5, pad=2)


def stand_beside(ax: Axes, bar: ColourBar, specials: Mapping[str, str]) -> None:
    """The colour bar beside axes of a reader's own, which give it some of their room."""
    figure = ax.get_figure(root=True)
    if figure is None:
        return
    # as much room as its words take
    size = 0.85 * FontProperties(size=rcParams["font.size"]).get_size_in_points()
    words = 0.3 + max(inches(legible(word), size) for word in bar.short.values())
    share = min(0.6, words * figure.dpi / ax.bbox.width)
    mapped = ScalarMappable(cmap=bar.colours)
    beside = figure.colorbar(mapped, ax=ax, fraction=share, aspect=30, pad=0.03)
    beside.outline.set_linewidth(0.5)
    beside.set_ticks(list(bar.short), labels=[legible(word) for word in bar.short.values()])
    beside.ax.tick_params(labelsize=size)
    named = [f"{NAMED[one]}: {words}" for one, words in specials.items() if one in NAMED]
    beside.ax.tick_params(length=2.5, pad=2)
    beside.set_label("\n".join([*filter(None, [bar.note]), *named]), fontsize=7, parse_math=False)


def say(ax: Axes, words: str) -> None:
    """Words in the middle of an empty panel, which a layout engine does not make room for."""
    ax.set(facecolor="#f4f4f4", xticks=[], yticks=[])
    _in_the_middle(ax, words, 1.0, fontsize=8.5, color=SOFT, linespacing=1.35)


def _in_the_middle(ax: Axes, words: str, share: float, **style: Any) -> None:
    """Words in so much of a panel, from the left, on as many lines as they need."""
    letters = int(share * ax.bbox.width / ax.figure.dpi / 0.075)
    lines = textwrap.fill(words, max(12, letters))
    ax.text(
        share / 2, 0.5, lines, transform=ax.transAxes, ha="center", va="center", in_layout=False,
        parse_math=False, **style,
    )  # fmt: skip
