"""The census of time-scales: for how many steps each unit's own gate lets it remember."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes

from gradflow.analysis import LayerAnalysis
from gradflow.cells import CELLS
from gradflow.reporter.charts.chart import Chart, absent, count_ticks, measured, own_cell, whole
from gradflow.reporter.numbers import number_words
from gradflow.reporter.picture import INK
from gradflow.reporter.scale import SERIES

PER_DECADE = 6  # bars per power of ten


@dataclass(frozen=True, kw_only=True)
class TimeScales(Chart):
    """How many units have which time-scale; bars are equally wide in log10."""

    edges: np.ndarray  # (bars + 1,) log10 of steps
    units: np.ndarray  # (bars,) counts
    never: int  # units whose gate is 1 for good
    span: float  # log10
    span_steps: int


def prepare(layer: LayerAnalysis) -> TimeScales:
    """A histogram of −1/mean ln of the gate that keeps the state, over units."""
    array = measured(layer, "time_scale")
    known = np.empty(0) if array is None else array.values[~np.isnan(array.values)]
    if not len(known):
        why = f"{layer.cell} has no gate whose opening says for how long a unit remembers."
        if own_cell(layer):
            why = "The gates of a cell of your own are not known, so neither are their time-scales."
        nothing = np.empty(0)
        note = absent(layer, "time_scale", why)
        return TimeScales(note=note, edges=nothing, units=nothing, never=0, span=0, span_steps=0)
    finite = known[np.isfinite(known)]
    with np.errstate(divide="ignore"):
        places = np.maximum(np.log10(finite), -2.0)
    span = float(np.log10(max(1, layer.span)))
    inside = [*places, span]
    low = np.floor(PER_DECADE * min(inside)) - 1
    high = np.ceil(PER_DECADE * max(inside) + 1e-9) + 1
    edges = np.arange(low, high + 1) / PER_DECADE
    bars = np.clip(np.floor(PER_DECADE * places - low + 1e-9).astype(int), 0, len(edges) - 2)
    spec = CELLS.get(layer.cell)
    keeper = None if spec is None else spec.keeper
    gate = "decay |a|" if keeper is None else f"{keeper.name} gate {keeper.gate}"
    return TimeScales(
        message=_message(known, layer.span),
        reading=(
            f"A unit whose {gate} stays as it is on average keeps 1/e of its value for "
            "this many steps, its other paths left aside. The line is the span: units right of "
            "it can remember that far by themselves."
            + (
                " Green: their gate is 1, so they keep it for good."
                if np.isinf(known).any()
                else ""
            )
        ),
        edges=edges,
        units=np.bincount(bars, minlength=len(edges) - 1),
        never=int(np.isinf(known).sum()),
        span=span,
        span_steps=layer.span,
    )


def _message(known: np.ndarray, span: int) -> str:
    middle = float(np.sort(known)[(len(known) - 1) // 2])
    long = int((known >= span).sum())
    most = "for good" if np.isinf(middle) else f"for {number_words(middle)} steps"
    if len(known) == 1:
        return f"its only unit remembers {most}, the span is {span}"
    remember = "remembers" if long == 1 else "remember"
    said = f"{long} of {len(known)} units {remember} as long as the span of {span}"
    return (
        f"half of the units remember no longer than {most[4:]}; {said}"
        if not np.isinf(middle)
        else (f"half of the units or more remember for good; {said}")
    )


def draw(axes: Sequence[Axes], chart: TimeScales) -> None:
    """Bars on a logarithmic axis, the span as a line; never-forgetting units at the right end."""
    ax = axes[0]
    width = 1 / PER_DECADE
    ax.bar(chart.edges[:-1], chart.units, width * 0.92, align="edge", color=SERIES[0])
    right = chart.edges[-1]
    places, words = count_ticks(chart.edges[0], right, 7)
    if chart.never:
        ax.bar(right + width, chart.never, width * 0.92, align="edge", color=SERIES[2])
        places, words = [*places, right + 1.5 * width], [*words, "for good"]
        clear = [
            place < right + 0.2 * width or word == "for good"
            for place, word in zip(places, words, strict=True)
        ]
        places = [place for place, fine in zip(places, clear, strict=True) if fine]
        words = [word for word, fine in zip(words, clear, strict=True) if fine]
        right += 2 * width
    ax.axvline(chart.span, color=INK, lw=1.1, ls=(0, (4, 2)))
    near = chart.span < chart.edges[0] + 0.2 * (right - chart.edges[0])  # no room on its left
    ax.annotate(
        f" span {chart.span_steps} ", (chart.span, 0.97), xycoords=("data", "axes fraction"),
        ha="left" if near else "right", va="top", fontsize=8,
    )  # fmt: skip
    ax.set_xticks(places, words)
    ax.set_xlim(chart.edges[0], right)
    ax.set_ylim(0, 1.18 * max(1, chart.never, int(chart.units.max())))
    ax.yaxis.set_major_locator(whole(4))
    ax.set_xlabel("time-scale in steps", labelpad=2)
    ax.set_ylabel("units", labelpad=2)
