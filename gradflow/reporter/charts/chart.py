"""What pictures share: a message and how to read it, lines, keys, ticks, and words along an axis of steps."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.collections import LineCollection
from matplotlib.ticker import MaxNLocator

from gradflow.analysis import LayerAnalysis
from gradflow.cells import CELLS
from gradflow.limits import power
from gradflow.reporter.fonts import BOX, families, inches, legible
from gradflow.reporter.numbers import number_words
from gradflow.reporter.picture import FAINT
from gradflow.reporter.readout import Curves, tell

LN10 = math.log(10)


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One picture of one layer, made ready. Its arrays are in its subclass."""

    message: str = ""  # its title: what is seen, with numbers from the data
    reading: str = ""  # one sentence on how to read it
    note: str = ""  # words that stand in place of the drawing, or ""
    labels: tuple[str, ...] = ()  # of the steps from 1 on, as the axis runs; none: their numbers


def measured(layer: LayerAnalysis, name: str) -> xr.DataArray | None:
    """A variable that holds at least one number, or None."""
    if name not in layer.data:
        return None
    array = layer.data[name]
    return None if array.size == 0 or bool(np.isnan(array.values).all()) else array


def absent(layer: LayerAnalysis, name: str, why: str) -> str:
    """Words for a variable that holds nothing: not part of an older run, or for a reason."""
    if name not in layer.data:
        return "This run was saved without these numbers; analyze the model again to see them."
    return why


def no_gradient(layer: LayerAnalysis, why: str) -> str:
    """Words for a variable that rests on the loss, where there is none of it."""
    return layer.gradient_note or why


def own_cell(layer: LayerAnalysis) -> bool:
    """Whether a layer is a cell of the user's own, or a tapped loop: what is inside is not known."""
    return layer.cell not in CELLS


def running_median(values: np.ndarray, axis: int) -> np.ndarray:
    """The median along an axis, NaN left out; NaN only where nothing is known.

    >>> running_median(np.array([[1.0, np.nan], [3.0, np.nan], [np.nan, np.nan]]), 0)
    array([ 2., nan])
    """
    ordered = np.sort(np.moveaxis(values, axis, 0), axis=0)  # NaN go last
    count = np.sum(~np.isnan(ordered), axis=0)
    places = np.maximum(np.stack([(count - 1) // 2, count // 2]), 0)
    low, high = np.take_along_axis(ordered, places, axis=0)
    with np.errstate(invalid="ignore"):  # −inf and +inf have no middle
        middle = np.where(low == high, low, (low + high) / 2)
    return np.where(count > 0, middle, np.nan)


Dash = str | tuple[float, tuple[float, ...]]
DASHED: Dash = (0, (4, 2))
DOTTED: Dash = (0, (1, 1.5))


@dataclass(frozen=True)
class Line:
    """One line of log10 values; −inf is exactly zero, NaN undefined."""

    values: np.ndarray
    name: str
    colour: str
    width: float = 1.5
    dash: Dash = "-"


def whole(most: int) -> MaxNLocator:
    """Round whole numbers as ticks, be it only one."""
    return MaxNLocator(nbins=most, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1)


def key(ax: Axes, columns: int) -> None:
    """A legend above the axes, in as many columns; none where nothing was drawn."""
    if not ax.get_legend_handles_labels()[0]:
        return
    ax.legend(
        frameon=False,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=columns,
        handlelength=1.5,
        columnspacing=1.3,
        borderaxespad=0.1,
        labelspacing=0.25,
    )


def draw_log_lines(
    ax: Axes,
    x: np.ndarray,
    lines: Sequence[Line],
    *,
    decades: float = 30,
    limits: tuple[float, float] | None = None,
    level: float | None = None,
    share: bool = False,
    names: tuple[str, ...] = (),
) -> None:
    """Lines over x on an axis of powers of ten; exact zeros are dots on its lower edge.

    A ``level`` to compare them with is dashed, and always on the axis. Under the pointer ratios are
    said as a ``share``, and ``names`` are what the places of x are called.
    """
    shown = [line for line in lines if not np.isnan(line.values).all()]
    zeros = any(np.isneginf(line.values).any() for line in shown)
    told = [(line.name, line.values) for line in shown]
    tell(ax, Curves(x, told, log10=True, share=share, names=names))
    levels = [] if level is None else [np.array([level])]
    low, high = limits or log_limits([*(line.values for line in shown), *levels], decades, zeros)
    if level is not None:
        ax.axhline(level, color=FAINT, lw=0.8, ls=DASHED)
    for line in shown:
        finite = np.where(np.isfinite(line.values), line.values, np.nan)
        ax.plot(x, finite, color=line.colour, lw=line.width, ls=line.dash, label=line.name)
        beside = [np.concatenate([finite[1:], [np.nan]]), np.concatenate([[np.nan], finite[:-1]])]
        alone = np.isfinite(finite) & np.isnan(beside[0]) & np.isnan(beside[1])
        zero = np.isneginf(line.values)
        # nothing at all would lie in the corner of the figure, and a layout engine makes room for it
        if alone.any():
            ax.plot(x[alone], finite[alone], "o", color=line.colour, ms=4, clip_on=False)
        if zero.any():
            ax.plot(x[zero], np.full(zero.sum(), low), ".", color=line.colour, ms=4, clip_on=False)
    ax.set_ylim(low, high)
    tall = _inches(ax)
    above = low + (max(0.04, 0.17 / tall) * (high - low) if zeros else 0)  # room for the label 0
    places, words = power_ticks(above, high, min(5, max(2, int(tall / 0.25))))
    ax.set_yticks([low, *places] if zeros else places, ["0", *words] if zeros else words)


def _inches(ax: Axes) -> float:
    """The height of axes, of a figure as it is now."""
    figure = ax.get_figure(root=True)
    return max(0.1, float(ax.get_window_extent().height) / (figure.dpi if figure else 100))


def log_limits(
    values: Iterable[np.ndarray], decades: float = 30, zeros: bool = False
) -> tuple[float, float]:
    """The powers of ten an axis spans: a little more than the data; room for zeros below it.

    >>> log_limits([np.array([-1.0, -50.0])], decades=10)
    (-11.6, -0.4)
    """
    known = np.concatenate([np.empty(0), *(np.ravel(one) for one in values)])
    known = known[np.isfinite(known)]
    if not len(known):
        return -1.0, 1.0
    high = float(known.max())
    low = max(float(known.min()), high - decades)
    if high - low < 0.7:  # a flat line is not to look like a slope, nor its ticks like noise
        low, high = (low + high) / 2 - 0.35, (low + high) / 2 + 0.35
    margin = max(0.05, 0.06 * (high - low))
    below = max(0.12, 0.1 * (high - low)) if zeros else margin
    return round(low - below, 6), round(high + margin, 6)


def power_ticks(low: float, high: float, most: int = 5) -> tuple[list[float], list[str]]:
    """Ticks of a log10 axis and what they say: powers of ten, or plain numbers on a short axis.

    >>> power_ticks(-6.5, 0.4)[1], power_ticks(-0.5, 0.1)[1]
    (['10⁻⁶', '10⁻⁴', '10⁻²', '1'], ['0.5', '1'])
    """
    if high - low > 2.2:
        apart = next(n for n in (1, 2, 3, 5, 10, 20, 50, 100, 1000) if (high - low) / n <= most)
        powers = [n * apart for n in range(math.ceil(low / apart), math.floor(high / apart) + 1)]
        return list(map(float, powers)), [power(place) for place in powers]
    return count_ticks(low, high, most)


def count_ticks(low: float, high: float, most: int = 6) -> tuple[list[float], list[str]]:
    """Ticks of an axis of log10 counts or steps.

    >>> count_ticks(0, 2)[1], count_ticks(0, 3)[1]
    (['1', '2', '5', '10', '20', '50', '100'], ['1', '3', '10', '30', '100', '300', '1000'])
    """
    for digits in ((1, 2, 5), (1, 3), (1,)):
        every = [
            digit * 10.0**ten
            for ten in range(math.floor(low) - 1, math.ceil(high) + 1)
            for digit in digits
        ]
        inside = [value for value in every if low - 1e-9 <= math.log10(value) <= high + 1e-9]
        if len(inside) <= most + 1:
            break
    inside = inside[:: max(1, math.ceil(len(inside) / (most + 1)))]
    return [math.log10(value) for value in inside], [number_words(value) for value in inside]


def draw_contour(
    ax: Axes,
    values: np.ndarray,
    columns: tuple[float, float],
    rows: tuple[float, float],
    level: float,
) -> None:
    """A white line over a picture with these edges, between cells below a power of ten and others."""
    across, down = (
        np.linspace(*edges, count + 1)
        for edges, count in zip((columns, rows), values.shape[::-1], strict=True)
    )
    # along the borders of the cells: a smooth line through their centres would cut them in two
    ax.add_collection(
        LineCollection(
            list(borders(values, across, down, level)),
            colors="white",
            linewidths=1.1,
            capstyle="projecting",
        ),
        autolim=False,
    )


def borders(values: np.ndarray, across: np.ndarray, down: np.ndarray, level: float) -> np.ndarray:
    """Borders between a cell below a level and one not below, NaN neither; (lines, 2 ends, xy).

    >>> borders(np.array([[1.0, -9.0, np.nan]]), np.arange(4), np.arange(2), 0).tolist()
    [[[1, 0], [1, 1]]]
    """
    low, known = values < level, ~np.isnan(values)
    row, left = np.nonzero((low[:, 1:] != low[:, :-1]) & known[:, 1:] & known[:, :-1])
    above, column = np.nonzero((low[1:] != low[:-1]) & known[1:] & known[:-1])
    upright = np.stack([across[left + 1], down[row], across[left + 1], down[row + 1]], axis=1)
    flat = np.stack([across[column], down[above + 1], across[column + 1], down[above + 1]], axis=1)
    return np.concatenate([upright, flat]).reshape(-1, 2, 2)


SIZE = 7.0  # points
LABEL_LINE = 0.125  # inches between two lines of labels
MOST_INCHES = 0.8  # inches of a label
TICK = 0.1  # inches that a number takes beneath an axis in any case
FLAT_INCHES = 0.3  # inches up to which labels stand side by side beneath an axis, not upright
SEEN = {" ": "␣", "\n": "↵", "\t": "⇥"}  # what a reader would take for nothing


def _seen(label: str) -> str:
    printed = "".join(letter if letter.isprintable() else " " for letter in label)
    return legible(SEEN.get(label) or " ".join(printed.split()))


def _cut(seen: str) -> str:
    if inches(seen, SIZE) <= MOST_INCHES:
        return seen
    fits = next(n for n in range(1, len(seen) + 1) if inches(seen[:n] + "…", SIZE) > MOST_INCHES)
    return seen[: fits - 1].rstrip() + "…"


def texts(labels: tuple[str, ...]) -> tuple[str, ...]:
    """What is written for labels; where they are too long, without a beginning that all share.

    >>> texts(("2024-03-01 05:00:00 UTC", "2024-03-01 06:00:00 UTC"))[0]
    '…05:00:00 UTC'
    """
    return _texts(labels, families())


@functools.lru_cache(maxsize=64)
def _texts(labels: tuple[str, ...], _: tuple[str, ...]) -> tuple[str, ...]:
    seen = [_seen(label) for label in labels]
    if len(set(seen)) > 1 and max(inches(one, SIZE) for one in seen) > MOST_INCHES:
        first, last = min(seen), max(seen)
        shared = next((first[:n] for n, one in enumerate(first) if last[n : n + 1] != one), first)
        # whole words and numbers only: what differs is read from where it begins
        start = next((n for n in range(len(shared), 0, -1) if not shared[n - 1].isalnum()), 0)
        seen = ["…" + one[start:] for one in seen] if start > 1 else seen
    return tuple(_cut(one) for one in seen)


def writable(labels: Sequence[str]) -> bool:
    """Whether the fonts at hand have letters for most of the labels.

    >>> writable(["the", "sky"]), writable([chr(0xE000), chr(0xE001)])
    (True, False)
    """
    drawn = [legible(label) for label in labels if label.strip()]
    lost = sum(set(one) <= {BOX} and BOX not in label
               for one, label in zip(drawn, filter(str.strip, labels), strict=True))  # fmt: skip
    return 2 * lost <= len(drawn)


def width(labels: Sequence[str]) -> float:
    """Inches of the widest of these labels."""
    return max((inches(text, SIZE) for text in texts(tuple(labels))), default=0.0)


def below(labels: Sequence[str]) -> float:
    """Inches that labels take beneath an axis, more than numbers do.

    >>> below(()), below(["a", "b"]), below(["France"]) > 0.2
    (0.0, 0.0, True)
    """
    wide = width(labels)
    return wide - TICK if wide > FLAT_INCHES else 0.0


def beside(labels: Sequence[str]) -> float:
    """Inches that labels take beside an axis, more than numbers do."""
    return max(0.0, width(labels) - FLAT_INCHES / 2)


def label_steps(axis: Axis, labels: Sequence[str], places: Iterable[float], most: int = 8) -> None:
    """Write the labels at their places, every n-th so that none meets the next; else numbers.

    The last place always has its label: it is the one nearest to the loss. Call it when the limits
    of the axis are set.
    """
    if not labels:
        axis.set_major_locator(whole(most))
        return
    box, (low, high) = axis.axes.get_window_extent(), sorted(axis.get_view_interval())
    figure = axis.get_figure(root=True)
    flat = axis is axis.axes.xaxis
    long = box.width if flat else box.height
    room = long / (figure.dpi if figure else 100)
    upright = flat and below(labels) > 0
    across = width(labels) + 0.08 if flat and not upright else LABEL_LINE
    shown = [(place, text) for place, text in zip(places, texts(tuple(labels)), strict=True)
             if low <= place <= high]  # fmt: skip
    every = max(1, math.ceil(across * (high - low) / room)) if room else 1
    shown = shown[::-1][::every]
    axis.set_ticks([place for place, _ in shown], [text for _, text in shown])
    for text in axis.get_ticklabels():
        text.set(parse_math=False, fontsize=SIZE, rotation=90 if upright else 0)
