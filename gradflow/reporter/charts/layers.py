"""The layers of a stack side by side: the gradient at each one's state, and what it passes down."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes

from gradflow.analysis import LayerAnalysis
from gradflow.recording.track import unnumbered
from gradflow.reporter.charts.chart import Chart, label_steps, log_limits, measured, power_ticks
from gradflow.reporter.fonts import legible
from gradflow.reporter.numbers import ratio_words
from gradflow.reporter.prepare import HEAT_COLUMNS, pooled
from gradflow.reporter.scale import DIRECT, SERIES, paint

WORDS = 14  # characters of a layer's name beside its row


@dataclass(frozen=True, kw_only=True)
class Layers(Chart):
    """log10 of gradient norms ÷ the largest at the uppermost layer's state; top layer first."""

    names: tuple[str, ...]  # L
    at_state: np.ndarray  # (L, columns) ‖∂L/∂h_t‖, input-time order
    passed: np.ndarray  # (L, columns) ‖∂L/∂x_t‖ handed to the layer below; NaN where unknown
    steps: int
    total_state: np.ndarray  # (L,) log10 of the root of the sum of squares over steps
    total_passed: np.ndarray  # (L,)


def prepare(layers: Sequence[LayerAnalysis]) -> Layers:
    """Norms of all layers over the steps, the one nearest to the loss first."""
    joint = {layer.part_of for layer in layers}  # a closed loop stands in for no layer
    order = [layer for layer in reversed(layers) if layer.name not in joint]
    steps = max(layer.steps for layer in order)
    at_state = np.stack([_norms(layer, steps, down=False) for layer in order])
    passed = np.stack([_norms(layer, steps, down=True) for layer in order])
    note = ""
    if len(order) == 1:
        note = "The model has one recurrent layer, so there is nothing to lay beside it."
    elif len({unnumbered(layer.name) for layer in order}) == 1:
        note = "These are several runs of one layer, and none hands its gradient down to another."
    elif np.isnan(at_state).all() and np.isnan(passed).all():
        note = next((layer.gradient_note for layer in order if layer.gradient_note), "")
        note = note or "No gradient of the loss was recorded."
    highest = [float(np.fmax.reduce(row)) for row in at_state]
    unit = next((top for top in highest if math.isfinite(top)), 0.0)
    pool = math.ceil(steps / HEAT_COLUMNS)
    totals = [_total(rows) - unit for rows in (at_state, passed)]
    return Layers(
        message="" if note else _message(order, totals[0]),
        reading=(
            "Rows are layers, the one that ran last on top. Every norm is divided by the largest at "
            "the state of the uppermost row that has a gradient; the bars are the root of the sum "
            "of squares over all steps. What a layer passes down is the gradient at its input."
        ),
        note=note,
        names=tuple(short_name(layer.name) for layer in order),
        at_state=pooled(at_state - unit, 1, pool),
        passed=pooled(passed - unit, 1, pool),
        steps=steps,
        total_state=totals[0],
        total_passed=totals[1],
        labels=max((layer.step_labels for layer in order), key=len),
    )


def short_name(name: str) -> str:
    """The end of a long layer name, where names differ.

    >>> short_name("encoder.blocks.3.lstm.l0"), short_name("rnn.l0")
    ('…s.3.lstm.l0', 'rnn.l0')
    """
    return name if len(name) <= WORDS else "…" + name[-(WORDS - 3) :]


def _norms(layer: LayerAnalysis, steps: int, *, down: bool) -> np.ndarray:
    values = np.full(steps, np.nan)
    if down:
        array = measured(layer, "grad_input_norm")
        if array is None:
            return values
        norms = array.values
    else:
        states = [str(state) for state in layer.data["state"].values]
        state = "h" if "h" in states else states[0]
        norms = layer.data["grad_norm"].sel(kind="total", state=state).values
    with np.errstate(divide="ignore"):
        values[: len(norms)] = np.log10(np.maximum(norms, 0))
    values[np.isposinf(values)] = np.nan
    return values


def _total(rows: np.ndarray) -> np.ndarray:
    """log10 of the root of the sum of squares of every row; NaN where nothing is known."""
    totals = np.full(len(rows), np.nan)
    for number, row in enumerate(rows):
        known = row[~np.isnan(row)]
        if len(known):
            top = known.max()
            with np.errstate(divide="ignore"):
                totals[number] = (
                    top + 0.5 * np.log10(np.sum(10 ** (2 * (known - top))))
                    if np.isfinite(top)
                    else top
                )
    return totals


def _message(order: Sequence[LayerAnalysis], totals: np.ndarray) -> str:
    known = np.flatnonzero(~np.isnan(totals))
    if len(known) < 2:
        return (
            f"only {order[known[0]].name} has a gradient"
            if len(known)
            else "no layer has a gradient"
        )
    top, bottom = known[0], known[-1]
    ratio = totals[bottom] - totals[top]
    first, last = short_name(order[top].name), short_name(order[bottom].name)
    if np.isneginf(totals[bottom]):
        return f"nothing of the gradient at {first} reaches {last}: it is exactly 0 there"
    if not math.isfinite(ratio):
        return f"the gradient at {first} is exactly 0"
    if abs(ratio) < math.log10(2):
        return f"the gradient at {last} is about as large as at {first}: × {ratio_words(ratio)}"
    if ratio < 0:
        return f"the gradient at {last} is {ratio_words(ratio)} of that at {first}"
    return f"the gradient at {last} is {ratio_words(ratio)} times that at {first}"


def draw(axes: Sequence[Axes], chart: Layers) -> None:
    """Layers × steps at the states and passed down in the fixed colours, and one bar per layer."""
    pictures = (("at its state: ‖∂L/∂h(t)‖", chart.at_state),
                ("passed down: ‖∂L/∂x(t)‖", chart.passed))  # fmt: skip
    count = len(chart.names)
    for ax, (name, values) in zip(axes, pictures, strict=False):
        extent = (0.5, chart.steps + 0.5, count - 0.5, -0.5)
        ax.imshow(paint(values), aspect="auto", interpolation="nearest", extent=extent)
        ax.set_title(name, loc="left", fontsize=8, pad=2)
        label_steps(ax.xaxis, chart.labels, range(1, len(chart.labels) + 1))
        _rows(ax, chart.names)
        ax.set_xlabel("step", labelpad=1)
    if len(axes) < 3:
        return
    bars = axes[2]
    low, high = log_limits([chart.total_state, chart.total_passed, np.zeros(1)], 30)
    for shift, values, colour, name in (
        (-0.2, chart.total_state, SERIES[0], "at its state"),
        (0.2, chart.total_passed, DIRECT, "passed down"),
    ):
        if np.isnan(values).all():
            continue
        places = np.arange(count) + shift
        lengths = np.where(np.isfinite(values), np.maximum(values, low) - low, 0.0)
        bars.barh(places, lengths, 0.36, left=low, color=colour, label=name)
        for place in places[np.isneginf(values)]:
            bars.annotate("0", (low, place), fontsize=7, va="center", xytext=(2, 0),
                          textcoords="offset points")  # fmt: skip
    bars.set_ylim(count - 0.4, -0.6)
    bars.set_xlim(low, high)
    ticks, words = power_ticks(low, high, 8)
    bars.set_xticks(ticks, words)
    _rows(bars, chart.names)
    bars.set_xlabel("over all steps, ÷ the largest norm at the top", labelpad=2)
    bars.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.1)


def _rows(ax: Axes, names: Sequence[str]) -> None:
    """Names beside the rows: all of a few, every n-th of many."""
    apart = math.ceil(len(names) / 24)
    places = range(0, len(names), apart)
    ax.set_yticks(list(places), [legible(names[place]) for place in places])
    for label in ax.get_yticklabels():
        label.set(parse_math=False, fontsize=7.5)
    ax.tick_params(axis="y", length=0)
