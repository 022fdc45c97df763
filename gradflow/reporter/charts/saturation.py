"""Saturation: where every gate of every unit stands over the steps, and which units are stuck."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes

from gradflow.analysis import LayerAnalysis
from gradflow.cells import called
from gradflow.limits import CLOSED_WORDS, OPEN_WORDS, SATURATED_WORDS, STUCK
from gradflow.reporter.charts.chart import (
    DASHED,
    Chart,
    absent,
    key,
    label_steps,
    measured,
    own_cell,
    whole,
)
from gradflow.reporter.numbers import count_words, percent_words
from gradflow.reporter.panels import ColourBar
from gradflow.reporter.prepare import HEAT_COLUMNS, HEAT_ROWS, in_blocks
from gradflow.reporter.readout import Curves, tell
from gradflow.reporter.scale import GATE_COLOURS, SERIES, paint_gates


@dataclass(frozen=True, kw_only=True)
class GateHeat:
    """Units × steps of one gate, longest memory on top."""

    name: str
    values: np.ndarray  # (rows, columns) share of the way from shut (0) to open (1)
    words: str  # shares closed and open


@dataclass(frozen=True, kw_only=True)
class Saturation(Chart):
    """The gates of a layer, and the shares of steps its units spend at their limits."""

    gates: tuple[GateHeat, ...]
    units: int
    steps: int
    limits: tuple[tuple[str, np.ndarray], ...]  # name, (H,) share of steps, largest first


def prepare(layer: LayerAnalysis) -> Saturation:
    """Gates by unit and step; for cells without gates the units at their limits."""
    array = measured(layer, "gate_value")
    gates: tuple[GateHeat, ...] = ()
    if array is not None:
        array = array.transpose("gate", "unit", "step")
        order = _order(layer, array.sizes["unit"])
        gates = tuple(_gate(layer, str(gate), array.sel(gate=gate).values[order])
                      for gate in array["gate"].values)  # fmt: skip
    limits = _limits(layer)
    note = ""
    unused = [name for name, shares in limits if shares.max() == 0]
    limits = tuple(limit for limit in limits if limit[0] not in unused)
    if not gates and not limits and unused:
        note = f"No unit is stuck: none is ever {unused[0].removeprefix('h ')}."
    elif not gates and not limits:
        why = f"{layer.cell} has no gates and no limits at which a unit could be stuck."
        if own_cell(layer):
            why = "What happens inside a cell of your own is not known, so neither are its limits."
        note = absent(layer, "gate_value", why)
    reading = []
    if gates:
        reading.append(
            "Mean over sequences, units sorted as in the states, longest memory on top; g and n go "
            "from −1 (dark) to 1 (light)."
            if any(_from_minus_one(layer, gate.name) for gate in gates)
            else "Mean over sequences, units sorted as in the states, longest memory on top."
        )
    if limits:
        reading.append(
            "The line is the share of steps and sequences a unit spends there, units sorted by it."
        )
    return Saturation(
        message="" if note else _message(layer, limits),
        reading=" ".join(reading),
        note=note,
        gates=gates,
        units=array.sizes["unit"] if array is not None else layer.hidden,
        steps=layer.steps,
        limits=limits,
        labels=layer.step_labels,
    )


def _order(layer: LayerAnalysis, units: int) -> np.ndarray:
    """The order of the states' picture, where it names every unit; else as they come."""
    order = layer.data["unit_order"].sel(state=layer.main_state).values
    order = order[order >= 0].astype(int)
    fits = len(order) == units and sorted(order.tolist()) == list(range(units))
    return order if fits else np.arange(units)


def _from_minus_one(layer: LayerAnalysis, gate: str) -> bool:
    spec = called(layer.cell)
    return spec is not None and gate in spec.tanh


def _gate(layer: LayerAnalysis, name: str, values: np.ndarray) -> GateHeat:
    low = -1.0 if _from_minus_one(layer, name) else 0.0
    rows = math.ceil(values.shape[0] / HEAT_ROWS)
    columns = math.ceil(values.shape[1] / HEAT_COLUMNS)
    return GateHeat(
        name=name, values=_averaged((values - low) / (1.0 - low), rows, columns),
        words=_gate_words(layer, name),
    )  # fmt: skip


def _averaged(values: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """The mean of every rows × columns block, NaN left out."""
    blocks = in_blocks(values, rows, columns)
    count = np.sum(~np.isnan(blocks), axis=(1, 3))
    total = np.nansum(blocks, axis=(1, 3))
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _gate_words(layer: LayerAnalysis, name: str) -> str:
    if _from_minus_one(layer, name):
        return f"{name}: candidate"
    closed, opened = (_shares(layer, name, end) for end in ("closed", "open"))
    if closed is None or opened is None:
        return name
    return (
        f"{name}: {percent_words(float(closed.mean()))} {CLOSED_WORDS}, "
        f"{percent_words(float(opened.mean()))} {OPEN_WORDS}"
    )


def _shares(layer: LayerAnalysis, gate: str, end: str) -> np.ndarray | None:
    """Known shares of every unit, or None."""
    array = measured(layer, f"gate_unit_{end}")
    if array is None or gate not in array["gate"].values:
        return None
    values = array.sel(gate=gate).values
    values = values[~np.isnan(values)]
    return values if len(values) else None


def _limits(layer: LayerAnalysis) -> tuple[tuple[str, np.ndarray], ...]:
    found = []
    saturated, idle = measured(layer, "unit_saturated"), measured(layer, "unit_idle")
    if saturated is not None:
        for state in saturated["state"].values:
            values = saturated.sel(state=state).values
            if not np.isnan(values).all():
                name = "tanh c" if str(state) == "c" else str(state)
                found.append((f"{name} {SATURATED_WORDS}", _sorted(values)))
    if idle is not None:
        found.append(("exactly 0", _sorted(idle.values)))
    return tuple(found)


def _sorted(values: np.ndarray) -> np.ndarray:
    return np.sort(values[~np.isnan(values)])[::-1]


def _message(layer: LayerAnalysis, limits: Sequence[tuple[str, np.ndarray]]) -> str:
    """The gate, or the limit, at which most units are stuck."""
    stuck = []
    for gate in map(str, layer.data["gate"].values):
        for end in ("closed", "open"):
            shares = _shares(layer, gate, end)
            if shares is not None:
                words = f"gate {gate} {end}"
                stuck.append(
                    (int((shares > STUCK).sum()), float(shares.mean()), len(shares), words)
                )
    for name, shares in limits:
        stuck.append((int((shares > STUCK).sum()), float(shares.mean()), len(shares), name))
    if not stuck:
        return "gates over the steps"
    count, mean, units, words = max(stuck)
    if count:
        be, have = ("is", "has") if count == 1 else ("are", "have")
        verb = have if words.startswith(("gate", "tanh")) else be
        many = f"{'unit' if units == 1 else 'units'} {verb}"
        words = words.replace("h beyond", "beyond") if words.startswith("h ") else words
        return f"{count} of {units} {many} {words} more than {STUCK:.0%} of the time".replace(
            "%", " %"
        )
    count, mean, units, words = max(stuck, key=lambda one: one[1])
    if mean == 0:
        return "no unit is ever at a limit"
    return f"no unit is stuck; the commonest limit: {_is(words)} {percent_words(mean)} of the time"


def _is(words: str) -> str:
    """The same as a clause: gate f is closed, h is beyond ± 0.95."""
    if words == "exactly 0":
        return "a unit is exactly 0"
    kind = words.rsplit(" ", 3 if words.endswith(SATURATED_WORDS) else 1)
    return f"{kind[0]} is {' '.join(kind[1:])}"


def draw(axes: Sequence[Axes], chart: Saturation) -> None:
    """One picture of units × steps per gate; below, the units at their limits."""
    if len(axes) == 1 and chart.gates:  # axes of the reader's own: the gate that forgets
        shown = next((gate for gate in chart.gates if gate.name in ("f", "z")), chart.gates[0])
        _draw_gate(axes[0], chart, shown, label=True)
        return
    for number, (ax, gate) in enumerate(zip(axes, chart.gates, strict=False)):
        _draw_gate(ax, chart, gate, label=number == len(chart.gates) - 1)
    if chart.limits:
        _draw_limits(axes[-1], chart)


def _draw_gate(ax: Axes, chart: Saturation, gate: GateHeat, *, label: bool) -> None:
    extent = (0.5, chart.steps + 0.5, chart.units + 0.5, 0.5)
    ax.imshow(paint_gates(gate.values), aspect="auto", interpolation="nearest", extent=extent)
    ends = [1, chart.units] if chart.units > 1 else [1]
    ax.set_yticks(ends, [str(end) for end in ends])
    ax.set_ylabel("unit", labelpad=2)
    ax.set_title(gate.words, loc="left", fontsize=8, pad=2, parse_math=False)
    label_steps(ax.xaxis, chart.labels, range(1, len(chart.labels) + 1))
    ax.tick_params(labelbottom=label)
    if label:
        ax.set_xlabel("step", labelpad=2)


def _draw_limits(ax: Axes, chart: Saturation) -> None:
    for (name, values), colour, dash in zip(chart.limits, SERIES, ("-", DASHED, ":"), strict=False):
        places = np.arange(1, len(values) + 1)
        lone = "o" if len(values) < 3 else None
        ax.plot(places, values, color=colour, ls=dash, lw=1.5, marker=lone, label=name)
    longest = max(len(values) for _, values in chart.limits)
    padded = [(name, np.append(values, np.full(longest - len(values), np.nan)))
              for name, values in chart.limits]  # fmt: skip
    tell(ax, Curves(np.arange(1, longest + 1), padded, log10=False))
    ax.set_xlim(0.5, longest + 0.5)
    ax.set_ylim(-0.03, 1.03)
    ax.xaxis.set_major_locator(whole(8))
    ax.set_xlabel(f"{count_words(longest, 'unit')}, the most often there first", labelpad=2)
    ax.set_ylabel("share of steps", labelpad=2)
    key(ax, 3)


def colour_bar() -> ColourBar:
    """The colours of the gates, in words."""
    words = {0.0: "0 closed", 0.5: "0.5", 1.0: "open 1"}
    return ColourBar(GATE_COLOURS, words, words)
