"""Lines, keys and ticks that several pictures share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.ticker import MaxNLocator

from gradflow.limits import power
from gradflow.reporter.numbers import number_words
from gradflow.reporter.picture import FAINT
from gradflow.reporter.readout import Curves, tell

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
