"""The Lyapunov spectrum: growth per step of every direction, and whether the numbers have settled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from gradflow.analysis import LayerAnalysis, Rate
from gradflow.limits import CARRIED_WORDS
from gradflow.reporter.charts.chart import LN10, Chart, absent, measured, whole
from gradflow.reporter.numbers import gain_words, number_words, rate_words
from gradflow.reporter.picture import FAINT
from gradflow.reporter.readout import Curves, tell
from gradflow.reporter.scale import VERDICT_COLOURS


@dataclass(frozen=True, kw_only=True)
class Lyapunov(Chart):
    """Exponents with their 95 % intervals over sequences, and their running means."""

    index: np.ndarray  # (K,) counted from 1
    mean: np.ndarray  # (K,) nats per step
    low: np.ndarray  # (K,)
    high: np.ndarray  # (K,)
    trace: np.ndarray  # (k, N) running means of the first few, over the counted steps
    band: float  # within ± this a direction counts as stable, nats per step
    verdict: str


def prepare(layer: LayerAnalysis) -> Lyapunov:
    """The spectrum of a layer; without the newer arrays, the exponents themselves."""
    array = measured(layer, "lyapunov")
    mean = layer.lyapunov if array is None else array.values
    steps = layer.gain.steps or max(1, layer.span)
    band = LN10 / steps
    mean = np.empty(0) if mean is None else np.asarray(mean, float)
    known = np.isfinite(mean)
    nothing = np.full(len(mean), np.nan)
    low, high = (measured(layer, f"lyapunov_{end}") for end in ("low", "high"))
    trace = measured(layer, "lyapunov_trace")
    means = np.empty((0, 0)) if trace is None else trace.transpose("index_k", "step").values
    means = means[~np.isnan(means).all(axis=1)]
    means = means[:, ~np.isnan(means).all(axis=0)]
    return Lyapunov(
        message=_message(layer, mean, steps) if known.any() else "",
        reading=_reading(layer, steps, sure=low is not None, traced=bool(means.size)),
        note="" if known.any() else _why(layer, mean),
        index=np.arange(1, len(mean) + 1),
        mean=mean,
        low=nothing if low is None else low.values,
        high=nothing if high is None else high.values,
        trace=means,
        band=band,
        verdict=layer.verdict,
    )


def _why(layer: LayerAnalysis, mean: np.ndarray) -> str:
    if np.isneginf(mean).any():
        return "Every exponent is −∞: exact zeros cut every direction."
    return absent(layer, "lyapunov", "No Lyapunov exponent was measured for this layer.")


def _message(layer: LayerAnalysis, mean: np.ndarray, over: int) -> str:
    first = layer.rate if math.isfinite(layer.rate.value) else Rate(mean[0], mean[0], mean[0])
    largest = f"the largest exponent is {rate_words(first)} per step"
    if "not settled" in layer.labels:
        return f"{largest}: the exponents have not settled in {layer.steps} steps"
    kept = int((mean >= -LN10 / over).sum())
    otherwise = layer.verdict == "vanishing" if kept else layer.verdict in ("stable", "exploding")
    if otherwise:  # near the edge, or where few steps are not yet like many
        gain = f"; over {over} steps the largest gain is {gain_words(layer)}"
        return f"{largest} in the long run{gain * math.isfinite(layer.gain.value)}"
    share = (
        f"{kept} of the {len(mean)} measured"
        if len(mean) < layer.size
        else f"{kept} of {len(mean)}"
    )
    if kept == 0:
        return f"{largest}: every direction fades in the long run"
    keep = "keeps" if kept == 1 else "keep"
    return f"{largest}; in the long run {share} {keep} {CARRIED_WORDS} or more over {over} steps"


def _reading(layer: LayerAnalysis, over: int, *, sure: bool, traced: bool) -> str:
    words = (
        f"growth per step of each direction{', with its 95 % interval over sequences' * sure}; in the "
        f"grey band (± {number_words(LN10 / over)}) less than a power of ten is lost or won over "
        f"{over} steps."
    )
    words = f"Above, {words}" if traced else words[0].upper() + words[1:]
    if traced:
        words += " Below, the running means, thick for the largest: flat at the end means settled."
    rule = measured(layer, "sum_rule")
    if rule is not None and np.isfinite(rule.values).all():
        got, exact = (float(rule.sel(side=side)) for side in ("measured", "exact"))
        words += (
            f" All exponents add up to {number_words(got)}; ln|det| says {number_words(exact)}."
        )
    return words + _attractor(layer)


def _attractor(layer: LayerAnalysis) -> str:
    """What all exponents together say, where some direction grows."""
    entropy, dimension = layer.entropy_rate, layer.kaplan_yorke
    if not (layer.rate_told and entropy > 0):
        return ""
    words = (
        f" Entropy rate: at most {number_words(entropy)} nats per step, the sum of those above 0."
    )
    if math.isfinite(dimension):
        words += f" Kaplan–Yorke dimension: {number_words(dimension)} of {layer.size}."
    return words


def draw(axes: Sequence[Axes], chart: Lyapunov) -> None:
    """Above the exponents with intervals, below the running means."""
    colour = VERDICT_COLOURS[chart.verdict]
    ax = axes[0]
    finite = np.isfinite(chart.mean)
    ax.axhspan(-chart.band, chart.band, color="#e3e3e3", lw=0, zorder=0)
    ax.axhline(0, color=FAINT, lw=0.7, zorder=1)
    ax.vlines(chart.index, chart.low, chart.high, color=colour, lw=1.2, alpha=0.5)
    size = 4.5 if len(chart.index) <= 40 else 2.5
    ax.plot(chart.index[finite], chart.mean[finite], "o", color=colour, ms=size)
    ends = (("exponent", chart.mean), ("95 % from", chart.low), ("to", chart.high))
    tell(ax, Curves(chart.index, ends, log10=False))
    ax.set_xlim(0.4, max(len(chart.index), 1) + 0.6)
    ax.xaxis.set_major_locator(whole(8))
    ax.yaxis.set_major_locator(MaxNLocator(nbins=5))
    ax.set_xlabel("direction, largest exponent first", labelpad=2)
    ax.set_ylabel("nats per step", labelpad=2)
    if len(axes) == 1:
        return
    below = axes[1]
    if not chart.trace.size:
        below.set_visible(False)
        return
    steps = np.arange(1, chart.trace.shape[1] + 1)
    for number, row in enumerate(chart.trace):
        lone = "." if len(row) < 3 else None
        shown = np.where(np.isfinite(row), row, np.nan)
        below.plot(steps, shown, color=colour, lw=1.6 if number == 0 else 0.8, marker=lone,
                   alpha=1 if number == 0 else 0.6)  # fmt: skip
    below.axhline(0, color=FAINT, lw=0.7, zorder=1)
    below.set_xlim(0.5, len(steps) + 0.5)
    below.xaxis.set_major_locator(whole(8))
    below.yaxis.set_major_locator(MaxNLocator(nbins=4))
    below.set_xlabel("steps counted, after the burn-in", labelpad=2)
    below.set_ylabel("mean so far", labelpad=2)
