"""The heads of a linear recurrence: which of them remembers how far."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes

from gradflow.analysis import LayerAnalysis
from gradflow.limits import GONE_DECADES, VERDICTS
from gradflow.reporter.charts.chart import LN10, Chart, absent, count_ticks, measured
from gradflow.reporter.numbers import count_words
from gradflow.reporter.scale import paint


@dataclass(frozen=True, kw_only=True)
class HeadChart(Chart):
    """ln gain of every head at every distance, as powers of ten; the longest memory on top."""

    values: np.ndarray  # (G, columns) log10 of the median gain; NaN where there is no pair
    heads: tuple[int, ...]  # (G,) which head each row is, counted from 1
    edges: tuple[float, float]  # log10 of the distances at the left and right edge


def prepare(layer: LayerAnalysis) -> HeadChart:
    """Heads sorted by what they keep over the longest distance that was measured of all."""
    found = measured(layer, "head_log_gain")
    if found is None:
        why = "This layer has no heads beside each other."
        note = absent(layer, "head_log_gain", why)
        return HeadChart(note=note, values=np.empty((0, 0)), heads=(), edges=(0.0, 0.0))
    lags, values = found["head_lag"].values.astype(float), found.values / LN10
    gains = layer.data["head_gain"].values
    order = np.argsort(-np.nan_to_num(gains, nan=-np.inf, neginf=-1e300), kind="stable")
    # a distance fills the axis up to halfway to its neighbours, so that it stays a logarithmic one
    columns = np.geomspace(lags[0], lags[-1] + 1e-9, 240)
    middles = np.sqrt(lags[:-1] * lags[1:])
    places = np.searchsorted(middles, columns)
    return HeadChart(
        message=_message(layer, gains),
        reading=(
            "A row is a head, the longest memory on top: how much of any direction of its state is "
            "left so many steps later, the median over pairs of steps."
        ),
        values=values[order][:, places],
        heads=tuple(int(place) + 1 for place in order),
        edges=(math.log10(lags[0]), math.log10(lags[-1])),
    )


def _message(layer: LayerAnalysis, gains: np.ndarray) -> str:
    codes = layer.data["head_verdict"].values
    counts = {name: int((codes == place).sum()) for place, name in enumerate(VERDICTS)}
    said = [f"{count} {name}" for name, count in counts.items() if count]
    words = f"of {count_words(len(gains), 'head')} {', '.join(said)}"
    if len(said) == 1:
        words = f"all {len(gains)} heads {said[0].partition(' ')[2]}"
    lags = layer.data["head_lag"].values
    curves = layer.data["head_log_gain"].values / LN10
    gone = [np.flatnonzero(row < GONE_DECADES) for row in curves]
    reach = [int(lags[places[0]]) if len(places) else None for places in gone]
    shortest = min((one for one in reach if one is not None), default=None)
    if shortest is None:
        return (
            f"{words}; none is gone in every direction within {count_words(int(lags[-1]), 'step')}"
        )
    if any(one is None for one in reach):
        kept = sum(one is None for one in reach)
        return (
            f"{words}; {kept} of them not gone within {count_words(int(lags[-1]), 'step')}, the "
            f"shortest gone in every direction after {count_words(shortest, 'step')}"
        )
    longest = max(one for one in reach if one is not None)
    return f"{words}; gone in every direction after {shortest} to {count_words(longest, 'step')}"


def draw(axes: Sequence[Axes], chart: HeadChart) -> None:
    """Heads down, the distance across on a logarithmic axis, in the fixed colours."""
    ax = axes[0]
    count = len(chart.heads)
    extent = (*chart.edges, count + 0.5, 0.5)
    ax.imshow(paint(chart.values), extent=extent, interpolation="nearest", aspect="auto")
    step = max(1, math.ceil(count / 16))
    shown = range(0, count, step)
    ax.set_yticks([place + 1 for place in shown], [str(chart.heads[place]) for place in shown])
    places, words = count_ticks(chart.edges[0], chart.edges[1], 7)
    ax.set_xticks(places, words)
    ax.set_xlim(*chart.edges)
    ax.set_xlabel("distance t′ − t in steps", labelpad=2)
    ax.set_ylabel("head", labelpad=2)
