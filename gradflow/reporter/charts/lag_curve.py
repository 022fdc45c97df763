"""The lag curve: the largest gain against the distance, its fit, half-life and horizon."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes

from gradflow.analysis import LayerAnalysis
from gradflow.limits import GONE_WORDS
from gradflow.reporter import overview, panels
from gradflow.reporter.charts.chart import Chart
from gradflow.reporter.numbers import half_life_words, rate_words
from gradflow.reporter.prepare import LagLine, lag_line, measured_distances


@dataclass(frozen=True, kw_only=True)
class LagCurveChart(Chart):
    """The curve, and how much of it is shown."""

    line: LagLine
    slope: np.ndarray  # (K,) nats per step, over ``window`` steps
    window: int
    limits: tuple[float, float]  # of the axis of slopes
    layer: LayerAnalysis
    reach: float  # the largest lag on the axis
    top: float  # the highest power of ten


def prepare(layer: LayerAnalysis) -> LagCurveChart:
    """The same curve as in the overview, with its words."""
    line = lag_line(layer)
    reach = overview.curve_reach([line], [layer])
    window = _window(layer, reach)
    slope = _smoothed(line.slope, window)
    return LagCurveChart(
        message="" if line.note else _message(layer, line),
        reading=_reading(layer, slope, window) + _joined(layer),
        note=line.note,
        line=line,
        slope=slope,
        window=window,
        limits=_limits(layer, slope[: int(reach) + 1]),
        layer=layer,
        reach=reach,
        top=overview.curve_top([line]),
    )


def _reading(layer: LayerAnalysis, slope: np.ndarray, window: int) -> str:
    rate, known = layer.rate, layer.rate_told
    words = (
        f"the median over starting steps and sequences, its 10–90 % band{', dotted the rate' * known}; "
        f"in the grey part, below {GONE_WORDS}, the gradient is gone."
    )
    if not np.isfinite(slope).any():
        return words[0].upper() + words[1:]
    over = "to the next" if window == 1 else f"to {window} steps more"
    words = (
        f"Above, {words} Below, the slope from one distance {over}, in nats per step: flat where the "
        "gain falls or grows at one rate"
    )
    if not known:
        return f"{words}."
    interval = math.isfinite(rate.low) and math.isfinite(rate.high)
    return f"{words}, which is dotted{', with its interval' * interval}."


def _joined(layer: LayerAnalysis) -> str:
    """What was measured, where not every distance was."""
    distances = measured_distances(layer)
    return f" Measured at distances of {distances} steps; a line joins them." if distances else ""


def _window(layer: LayerAnalysis, reach: float) -> int:
    """Over how many steps a slope is taken: about a hundred to an axis, and whole strides.

    Where one step in n was followed as a source, the median is over other pairs at every n-th
    distance, and jumps there.
    """
    sources = layer.data["source"].values
    stride = int(sources[1] - sources[0]) if len(sources) > 1 else 1
    return stride * max(1, math.ceil(reach / 100 / stride))


def _smoothed(slope: np.ndarray, window: int) -> np.ndarray:
    """The mean of so many slopes, the middle one last of the first half; NaN without all of them."""
    if window == 1 or len(slope) <= window:
        return slope
    sums = np.convolve(slope, np.ones(window) / window, "valid")
    smooth = np.full(len(slope), np.nan)
    start = (window - 1) // 2
    smooth[start : start + len(sums)] = sums
    return smooth


def _limits(layer: LayerAnalysis, slope: np.ndarray) -> tuple[float, float]:
    """Room for the rate, for zero and for most of the slopes: the first few are often far off."""
    known = slope[np.isfinite(slope)]
    told = (layer.rate.low, layer.rate.high) if layer.rate_told else ()
    ends = [0.0, *(end for end in told if math.isfinite(end))]
    ends += [float(end) for end in np.quantile(known, (0.04, 0.96))] if len(known) else []
    if len(known) <= 10:
        ends += [float(end) for end in known]
    margin = max(0.1 * (max(ends) - min(ends)), 1e-4)
    return min(ends) - margin, max(ends) + margin


def _message(layer: LayerAnalysis, line: LagLine) -> str:
    said = [f"the largest gain: {line.words}"] if line.words else []
    half = half_life_words(layer)
    if half not in ("none", "never"):
        # a half-life that is not that of the rate is where the curve itself has fallen by half
        near = math.isclose(-layer.rate.value * layer.half_life, math.log(2), rel_tol=0.01)
        steady = layer.rate_told and near
        said.append(f"it {'halves every' if steady else 'has halved after'} {half} steps")
    rate = rate_words(layer.rate)
    if rate != "none" and layer.rate_told:
        said.append(f"rate {rate} nats per step")
    return "; ".join(said) or "the gain against the distance"


def draw(axes: Sequence[Axes], curve: LagCurveChart) -> None:
    """The curve; below it, where there is room, its slope."""
    panels.draw_lag(axes[0], curve.line, curve.layer, curve.reach, curve.top, label=len(axes) == 1)
    axes[0].set_ylabel("gain", labelpad=2)
    if len(axes) > 1:
        axes[0].tick_params(labelbottom=False)
        panels.draw_slope(
            axes[1], curve.line.lag, curve.slope, curve.layer, curve.reach, curve.limits
        )
