"""The lag spectrum of the parameter gradient: how much of ∂L/∂W comes from how far back.

C_k is the part of ∂L/∂W through step t' − k of a loss at t'; keeping K steps keeps C_0 … C_{K−1}.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes

from gradflow.analysis import LayerAnalysis
from gradflow.cells import kinds
from gradflow.limits import LAG_TOLERANCE, SMALLEST_SHARE, TOLERANCE_WORDS
from gradflow.reporter.charts.chart import (
    DASHED,
    Chart,
    Line,
    absent,
    draw_log_lines,
    key,
    measured,
    no_gradient,
    own_cell,
    whole,
)
from gradflow.reporter.numbers import count_words, number_words, percent_words
from gradflow.reporter.picture import INK
from gradflow.reporter.scale import SERIES

WEIGHT_NAMES = {"weight_hh": "W_hh", "weight_ih": "W_ih"}


@dataclass(frozen=True, kw_only=True)
class LagGradient(Chart):
    """Shares of the parameter gradient by lag, in log10, and what truncation would cost."""

    lag: np.ndarray  # (K,)
    parameters: tuple[str, ...]  # P names as people write them
    share: np.ndarray  # (P, K) log10 ‖C_k‖ ÷ Σ_k ‖C_k‖
    error: np.ndarray  # (P, K) log10 of the relative error if the gradient goes back k steps
    windows: tuple[float, ...]  # steps to keep for 5 %, of the first parameter; or empty
    reach: float  # the largest lag worth showing


def prepare(layer: LayerAnalysis) -> LagGradient:
    """Contribution of every lag to the parameter gradient, and the truncation window."""
    array = measured(layer, "lag_contribution")
    if layer.steps <= 1:
        return _empty("one step: nothing of the gradient goes further back")
    if array is None or not (array.values > 0).any():
        why = (
            "The parameter gradient cannot be taken apart by lag here: below a bidirectional layer a "
            "loss step acts at every step, before it and after it; between the calls of a loop it "
            "may not be known what happens."
        )
        if own_cell(layer):
            why = f"The parameter gradient by lag is known for {_known()} layers only."
        why = no_gradient(layer, why)
        if array is not None:
            why = "The parameter gradient is exactly 0."
        return _empty(absent(layer, "lag_contribution", why))
    array = array.transpose("parameter", "lag")
    names = [str(name) for name in array["parameter"].values]
    # the recurrent weight first: its gradient is the one that flows through time
    names.sort(key=lambda name: name != "weight_hh")
    parts = array.sel(parameter=names).values
    if not np.isfinite(parts[~np.isnan(parts)]).all():
        return _empty("The parameter gradient is not finite.")
    lag = array["lag"].values.astype(float)
    parts = parts / np.nanmax(parts)  # shares are asked for, and sums are not to overflow
    whole_sum = np.nansum(parts, axis=1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.log10(parts / whole_sum)
        error = np.log10(_error(layer, names, parts))
    window = _window(layer, names[0])
    return LagGradient(
        message=_message(names[0], parts[0], window, layer),
        reading=_reading(layer, names[0]),
        lag=lag,
        parameters=tuple(WEIGHT_NAMES.get(name, name) for name in names),
        share=share,
        error=error,
        windows=() if math.isnan(window) else (window,),
        reach=_shown(lag, share, window),
    )


def _known() -> str:
    """The kinds of cells, those with many gates first: "LSTM, GRU and RNN"."""
    *most, last = sorted(kinds(), key=lambda kind: -kinds()[kind].blocks)
    return f"{', '.join(most)} and {last}"


def _empty(note: str) -> LagGradient:
    nothing = np.empty((0, 0))
    return LagGradient(
        note=note, lag=np.empty(0), parameters=(), share=nothing, error=nothing, windows=(), reach=1
    )


def _error(layer: LayerAnalysis, names: Sequence[str], parts: np.ndarray) -> np.ndarray:
    array = measured(layer, "truncation_error")
    if array is None:
        return np.full(parts.shape, np.nan)
    return array.transpose("parameter", "lag").sel(parameter=list(names)).values


def _window(layer: LayerAnalysis, name: str) -> float:
    array = measured(layer, "truncation_window")
    if array is None:
        return math.nan
    # a dict, for xarray's own sel has an argument named tolerance
    return float(array.sel(parameter=name).sel({"tolerance": LAG_TOLERANCE}, method="nearest"))


def _half(parts: np.ndarray) -> int:
    """How many steps, from the loss backwards, make up half of Σ ‖C_k‖."""
    sums = np.cumsum(np.nan_to_num(parts))
    return int(np.searchsorted(sums, 0.5 * sums[-1])) + 1


def _message(name: str, parts: np.ndarray, window: float, layer: LayerAnalysis) -> str:
    if not (parts > 0).any():
        return f"∂L/∂{WEIGHT_NAMES.get(name, name)} is exactly 0: nothing of this loss trains it"
    steps = _half(parts)
    last = "the loss step itself" if steps == 1 else f"the last {steps} steps"
    if steps > 10 and 2 * steps > np.count_nonzero(parts > 0):
        last = f"{steps - 1} or more steps back"  # far steps carry it, which "the last" would hide
    gradient = f"∂L/∂{WEIGHT_NAMES.get(name, name)}"
    said = f"half of {gradient} comes from {last}"
    if math.isnan(window):
        return said
    if window >= layer.steps:
        return f"{said}; only the whole sequence keeps {gradient} within {TOLERANCE_WORDS}"
    return f"{said}; a window of {count_words(int(window), 'step')} keeps {gradient} within {TOLERANCE_WORDS}"


def _reading(layer: LayerAnalysis, name: str) -> str:
    words = (
        "Above, the size of the part of the gradient that went k steps back, as a share of the sum "
        "of all parts; below, the error left if it may go back k steps and no further (dashed: 5 %). "
        "Truncated backpropagation loses the grey part."
    )
    depth, cancel = (measured(layer, what) for what in ("gradient_depth", "cancellation"))
    if depth is not None and not math.isnan(float(depth.sel(parameter=name))):
        words += f" On average it goes {number_words(float(depth.sel(parameter=name)))} steps back."
    if cancel is not None and float(cancel.sel(parameter=name)) < 0.9:
        left = percent_words(float(cancel.sel(parameter=name)))
        words += f" The parts cancel to {left} of their sum."
    return words


def _shown(lag: np.ndarray, share: np.ndarray, window: float) -> float:
    """As far as anything is drawn: twice the window, and every part above a thousandth."""
    carrying = lag[(np.nan_to_num(share, nan=-np.inf) > -3).any(axis=0)]
    needed = [10.0, carrying.max() if len(carrying) else 0.0]
    needed.append(0.0 if math.isnan(window) else 2 * window)
    return float(max(1.0, min(lag[-1], max(needed))))


def draw(axes: Sequence[Axes], chart: LagGradient) -> None:
    """Above the share of every lag, below what truncation there would cost."""
    panels = (("share of the gradient", chart.share), ("error if cut at k", chart.error))
    for number, (ax, (name, values)) in enumerate(zip(axes, panels, strict=False)):
        lines = [
            Line(row[chart.lag <= chart.reach], f"∂L/∂{parameter}", colour, 1.6, dash)
            for row, parameter, colour, dash in zip(
                values, chart.parameters, SERIES, ("-", DASHED), strict=False
            )
        ]
        for window in chart.windows:
            ax.axvspan(window - 0.5, chart.reach + 0.5, color="#ededed", lw=0, zorder=0)
            ax.axvline(window - 0.5, color=INK, lw=0.9, zorder=1)
        level = math.log10(LAG_TOLERANCE) if number == 1 else None
        shown = chart.lag[chart.lag <= chart.reach]
        draw_log_lines(ax, shown, lines, decades=-SMALLEST_SHARE, level=level, share=True)
        ax.set_ylabel(name, labelpad=2)
        ax.set_xlim(-0.5, chart.reach + 0.5)
        ax.xaxis.set_major_locator(whole(8))
        ax.tick_params(labelbottom=number == len(axes) - 1)
    axes[-1].set_xlabel("lag k: steps back from the loss", labelpad=2)
    if chart.windows:
        words = f"{count_words(int(chart.windows[0]), 'step')} kept: error 5 % or less"
        axes[0].plot([], [], color=INK, lw=0.9, label=words)
    key(axes[0], 3)
