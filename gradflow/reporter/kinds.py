"""The menu of pictures: adding a kind is one entry in `KINDS`; documents and tests go through it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes

from gradflow.analysis import LayerAnalysis
from gradflow.reporter import panels, prepare
from gradflow.reporter.overview import curve_reach, curve_top, special_colours


@dataclass(frozen=True)
class Scale:
    """What the colour bar below a picture has to say."""

    middle: str  # what the middle of the scale means
    specials: Callable[[Sequence[LayerAnalysis]], dict[str, str]]  # colours outside the scale


@dataclass(frozen=True)
class Kind:
    """A kind of picture with one block of panels per layer."""

    draw: Callable[[Sequence[Axes], LayerAnalysis], str]  # into axes; returns the caption
    heading: Callable[[LayerAnalysis], str]  # one line saying what is drawn
    heights: Callable[[LayerAnalysis], tuple[float, ...]]  # of its panels, inches
    width: float  # inches
    scale: Scale | None = None  # the colour bar below, if any
    columns: int = 1  # blocks side by side, at most


def _gain(axes: Sequence[Axes], layer: LayerAnalysis) -> str:
    gain = prepare.gain_map(layer)
    panels.draw_gain(axes[0], gain)
    if gain.note:
        return ""
    words = "Along a row, leftwards from the diagonal: how far back step t′ still feels."
    if gain.contour:
        words += " White line: 10⁻³."
    if gain.pool > 1:
        words += f" A cell is the largest of {gain.pool} × {gain.pool} steps."
    return words


def _lag(axes: Sequence[Axes], layer: LayerAnalysis) -> str:
    line = prepare.lag_line(layer)
    reach, top = curve_reach([line], [layer]), curve_top([line])
    panels.draw_lag(axes[0], line, layer, reach, top, label=len(axes) == 1)
    axes[0].set_ylabel("gain", labelpad=2)
    if len(axes) > 1 and line.note:
        axes[1].set_visible(False)
    elif len(axes) > 1:
        axes[0].tick_params(labelbottom=False)
        panels.draw_slope(axes[1], line, layer, reach)
    return (
        "Above, the median over sequences and starting steps, its 10–90 % band, and dashed the rate. "
        "Below, the slope from one distance to the next, in nats per step, and the rate's interval."
    )


def _parts(axes: Sequence[Axes], layer: LayerAnalysis) -> str:
    parts = prepare.parts(layer)
    panels.draw_parts(axes[0], parts)
    return parts.words


def _states(axes: Sequence[Axes], layer: LayerAnalysis) -> str:
    states = [str(state) for state in layer.data["state"].values]
    pairs = list(zip(axes, states[: len(axes)], strict=True))
    for number, (ax, state) in enumerate(pairs):
        panels.draw_heat(ax, prepare.heat(layer, state), label=number == len(pairs) - 1)
        ax.set_ylabel(f"∂L/∂{state}", labelpad=2)
        ax.tick_params(labelbottom=number == len(pairs) - 1)
    return "Units are sorted, longest memory on top; the colours are powers of ten."


def _gates(axes: Sequence[Axes], layer: LayerAnalysis) -> str:
    gates = prepare.gates(layer)
    panels.draw_gates(axes, gates)
    return gates.words


def _lag_heading(layer: LayerAnalysis) -> str:
    words = prepare.lag_line(layer).words
    heading = "largest gain ‖∂s(t′)/∂s(t)‖ against the distance t′ − t"
    return f"{heading}: {words}" if words else heading


def _map_specials(layers: Sequence[LayerAnalysis]) -> dict[str, str]:
    every = [prepare.gain_map(layer) for layer in layers]
    maps = [gain.values for gain in every if not gain.note]
    return special_colours(
        [(values, np.zeros(values.shape, bool)) for values in maps], "t′ before t"
    )


def _state_specials(layers: Sequence[LayerAnalysis]) -> dict[str, str]:
    heats = [prepare.heat(one, str(state)) for one in layers for state in one.data["state"].values]
    return special_colours([(heat.values, heat.bad) for heat in heats if not heat.note])


KINDS: dict[str, Kind | None] = {
    "overview": None,  # two panels per row, drawn by `draw_overview`
    "gain-map": Kind(
        draw=_gain,
        heading=lambda layer: "largest gain ‖∂s(t′)/∂s(t)‖ of every pair of steps",
        heights=lambda layer: (3.3,),
        width=3.3,
        scale=Scale("1: unchanged", _map_specials),
        columns=2,
    ),
    "total-vs-direct": Kind(
        draw=_parts,
        heading=lambda layer: "norm of the gradient at h: all of it, and what a hook sees",
        heights=lambda layer: (2.1,),
        width=7.2,
    ),
    "lag-curve": Kind(draw=_lag, heading=_lag_heading, heights=lambda layer: (2.4, 0.9), width=6.0),
    "states": Kind(
        draw=_states,
        heading=lambda layer: "gradient of the last loss step at every state, ÷ its size there",
        heights=lambda layer: (1.5,) * layer.data.sizes["state"],
        width=7.2,
        scale=Scale("as at the loss", _state_specials),
    ),
    "gates": Kind(
        draw=_gates,
        heading=lambda layer: "gates over the steps: mean, share closed (< 0.05), open (> 0.95)",
        heights=lambda layer: (1.2, 1.2, 1.2) if layer.data.sizes["gate"] else (0.6,),
        width=7.2,
    ),
}
