"""The blocks of a product of step Jacobians: from which state to which, against the lag."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr
from matplotlib.axes import Axes

from gradflow.analysis import LayerAnalysis
from gradflow.reporter.charts.chart import (
    DASHED,
    DOTTED,
    LN10,
    Chart,
    Line,
    absent,
    draw_log_lines,
    key,
    measured,
    running_median,
    whole,
)
from gradflow.reporter.numbers import count_words, percent_words, ratio_words
from gradflow.reporter.picture import FAINT
from gradflow.reporter.readout import Curves, tell
from gradflow.reporter.scale import SERIES

DASHES = ("-", DASHED, DOTTED, (0, (4, 1.5, 1, 1.5)))


@dataclass(frozen=True, kw_only=True)
class BlockChart(Chart):
    """Median over mapped sequences and sources, at every lag."""

    names: tuple[str, ...]  # B, as "c → h"
    lag: np.ndarray  # (K,)
    gain: np.ndarray  # (B, K) log10 of the rms gain
    cell_path: np.ndarray  # (K,) share of c → c that runs through the forget gates alone


def prepare(layer: LayerAnalysis) -> BlockChart:
    """The gain of every block against the lag, and the share of the cell path in c → c."""
    array = measured(layer, "log_block_gain")
    if array is None or layer.steps <= 1:
        why = "This layer carries one state only, so its product has one block."
        if layer.data.sizes.get("block", 0):
            why = "No product over several steps was measured."
        return _empty(absent(layer, "log_block_gain", why))
    codes = [str(code) for code in array["block"].values]
    curves = np.stack([_by_lag(array.sel(block=code)) for code in codes])
    gain = running_median(curves, 1) / LN10
    states = [str(state) for state in layer.data["state"].values]
    path = _cell_path(layer, array, codes)
    names = tuple(_arrow(code, states) for code in codes)
    lag = np.arange(gain.shape[1])
    last = np.flatnonzero(~np.isnan(gain).all(axis=0))[-1]
    # at some distances some blocks only may be known: words are for all of them
    said = np.flatnonzero(~np.isnan(gain).any(axis=0))
    said_at = int(said[-1]) if len(said) else int(last)
    if last == 0:
        return _empty("No product over one step or more is finite.")
    words = "Each line is the typical gain (root mean square) from one state to another."
    if not np.isnan(path).all():
        words += (
            " Below, the share of c → c that the product of the forget gates alone explains; above "
            "1 the other paths take some of it back."
        )
    return BlockChart(
        message=_message(names, gain[:, said_at], said_at, path[: said_at + 1]),
        reading=words,
        names=names,
        lag=lag[: last + 1],
        gain=gain[:, : last + 1],
        cell_path=path[: last + 1],
    )


def _empty(note: str) -> BlockChart:
    nothing = np.empty(0)
    return BlockChart(note=note, names=(), lag=nothing, gain=np.empty((0, 0)), cell_path=nothing)


def _by_lag(array: xr.DataArray) -> np.ndarray:
    """(pairs of sequence and source, lag), NaN beyond what was measured."""
    array = array.transpose("sequence", "source", "target")
    values = array.values
    sources = array["source"].values.astype(int)
    targets = array["target"].values.astype(int)
    count = int(targets.max()) + 1
    shifted = np.full((values.shape[0], len(sources), count), np.nan)
    for number, source in enumerate(sources):
        later = targets >= source
        shifted[:, number, targets[later] - source] = values[:, number, later]
    return shifted.reshape(-1, count)


def _cell_path(layer: LayerAnalysis, gains: xr.DataArray, codes: Sequence[str]) -> np.ndarray:
    count = int(gains["target"].values.max()) + 1
    path = measured(layer, "log_cell_path")
    if path is None or "cc" not in codes:
        return np.full(count, np.nan)
    with np.errstate(invalid="ignore", over="ignore"):  # a block that is exactly 0 has no share
        share = np.exp(_by_lag(path) - _by_lag(gains.sel(block="cc")))
    return running_median(share, 0)


def _arrow(code: str, states: Sequence[str]) -> str:
    """A block's name as from → to; its rows, first in the code, are where it ends."""
    for end in states:
        for start in states:
            if code == end + start:
                return f"{start} → {end}"
    return code


def _message(names: Sequence[str], gain: np.ndarray, lag: int, path: np.ndarray) -> str:
    known = np.flatnonzero(~np.isnan(gain))
    order = known[np.argsort(-gain[known], kind="stable")]
    best, worst = order[0], order[-1]
    said = (
        f"after {count_words(lag, 'step')} {names[best]} keeps {ratio_words(gain[best])}, "
        f"{names[worst]} {ratio_words(gain[worst])}"
    )
    known = np.flatnonzero(np.isfinite(path))
    if not len(known):
        return said
    share = float(path[known[-1]])
    if share > 1.05:
        return f"{said}; the forget gates alone would keep {ratio_words(np.log10(share))} × c → c"
    return f"{said}; the forget gates alone make {percent_words(share)} of c → c"


def draw(axes: Sequence[Axes], blocks: BlockChart) -> None:
    """Above the gain of every block, below the share of the cell path."""
    lines = [
        Line(row, name, SERIES[number % len(SERIES)], 1.6, DASHES[number % len(DASHES)])
        for number, (name, row) in enumerate(zip(blocks.names, blocks.gain, strict=True))
    ]
    ax = axes[0]
    ax.axhline(0, color=FAINT, lw=0.7, zorder=0)
    draw_log_lines(ax, blocks.lag, lines, decades=12, share=True)
    ax.set_ylabel("gain", labelpad=2)
    key(ax, min(6, len(lines)))
    drawn = [ax]
    if len(axes) > 1 and np.isnan(blocks.cell_path).all():
        axes[1].set_visible(False)
    elif len(axes) > 1:
        below = axes[1]
        finite = np.where(np.isfinite(blocks.cell_path), blocks.cell_path, np.nan)
        lone = "." if np.isfinite(finite).sum() < 3 else None
        below.plot(blocks.lag, finite, color=SERIES[0], lw=1.4, marker=lone)
        tell(below, Curves(blocks.lag, [("", finite)], log10=False))
        below.axhline(1, color=FAINT, lw=0.7, zorder=0)
        top = float(np.fmax.reduce(finite))
        below.set_ylim(0, 1.12 * max(1.0, min(top, 5.0)))
        below.set_ylabel("share", labelpad=2)
        ax.tick_params(labelbottom=False)
        drawn.append(below)
    for one in drawn:
        one.set_xlim(0, max(1, blocks.lag[-1]))
        one.xaxis.set_major_locator(whole(8))
    drawn[-1].set_xlabel("distance t′ − t in steps", labelpad=2)
