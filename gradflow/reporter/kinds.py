"""The menu of pictures: adding a kind is one entry in `KINDS`; documents and tests go through it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from gradflow.limits import CLOSED_WORDS, OPEN_WORDS
from gradflow.reporter import panels
from gradflow.reporter.charts import (
    blocks,
    gain_map,
    gates,
    heads,
    lag_curve,
    lag_gradient,
    layers,
    lyapunov,
    paths,
    rank,
    saturation,
    states,
    time_scales,
    total_vs_direct,
    triangle,
)
from gradflow.reporter.charts.chart import Chart, below, beside
from gradflow.reporter.overview import special_colours


@dataclass(frozen=True)
class Scale:
    """The colour bar below a picture, and the colours outside it that occur."""

    bar: Callable[[], panels.ColourBar]  # as the colours are now
    specials: Callable[[Sequence[Any]], dict[str, str]]  # of these charts: colour -> meaning
    used: Callable[[Any], bool] = lambda chart: True  # whether a chart has colours at all


@dataclass(frozen=True)
class Kind:
    """A kind of picture with one block of panels per layer.

    ``prepare`` makes a `gradflow.reporter.charts.chart.Chart` of a layer, or of all layers
    ``together``; ``draw`` puts it into axes, the main panel first.
    """

    what: str  # one line saying what is drawn, the same for every layer
    prepare: Callable[..., Any]
    draw: Callable[[Sequence[Axes], Any], None]
    heights: Callable[[Any], tuple[float, ...]]  # of the panels of a chart, inches
    width: float = 7.2  # inches
    left: float = 0.75  # inches for the labels of the y axis
    above: float = 0.22  # inches between the words and the panels, for a key
    gap: Callable[[Any, int], float] = lambda chart, panel: 0.16  # inches above a panel
    below: Callable[[Any], float] = lambda chart: 0.0  # inches more beneath the panels, for labels
    beside: Callable[[Any], float] = lambda chart: 0.0  # and to the left of them
    scale: Scale | None = None  # the colour bar below, if any
    columns: int = 1  # blocks side by side, at most
    together: bool = False  # one block for all layers of an analysis
    stepped: bool = False  # whether an axis counts steps, and takes their labels
    title: str = ""  # on the page, where the name of the kind does not say it
    folded: bool = True  # whether the page shows it only when the reader asks
    always: bool = False  # whether a report has it of every layer, be it to say why not
    of_gains: bool = False  # it shows gains alone: a part of a closed loop has that of the loop


def ratios(middle: str) -> Callable[[], panels.ColourBar]:
    """The scale of gradients and gains; what its pale yellow means."""
    return lambda: panels.ratio_bar(middle)


def _plain(values: Sequence[np.ndarray], undefined: str) -> dict[str, str]:
    return special_colours([(one, np.zeros(one.shape, bool)) for one in values], undefined)


def _heats(charts: Sequence[states.States]) -> dict[str, str]:
    heats = [heat for chart in charts for heat in chart.heats if not heat.note]
    return special_colours([(heat.values, heat.bad) for heat in heats])


OVERVIEW_SCALE = Scale(ratios("as at the loss"), _heats)


def _gate_specials(charts: Sequence[saturation.Saturation]) -> dict[str, str]:
    return _plain([gate.values for chart in charts for gate in chart.gates], "undefined")


def _map_specials(charts: Sequence[gain_map.GainMap]) -> dict[str, str]:
    unknown = any(chart.unknown for chart in charts)
    return _plain([chart.values for chart in charts],
                  "t′ before t, cut apart, or not measured" if unknown else "t′ before t")  # fmt: skip


def _below(chart: Chart) -> float:
    """The last panel has the labels of the steps beneath it."""
    return below(chart.labels)


def _beside(chart: Chart) -> float:
    """The panel has the labels of the steps on its left as well."""
    return beside(chart.labels)


def _layer_heights(chart: layers.Layers) -> tuple[float, ...]:
    high = min(3.0, max(0.6, 0.17 * len(chart.names)))
    return (high, high, max(high, 0.8))


KINDS: dict[str, Kind | None] = {
    "overview": None,  # two panels per row, drawn by `draw_overview`
    "gain-map": Kind(
        what="largest gain ‖∂s(t′)/∂s(t)‖ of every pair of steps",
        prepare=gain_map.prepare,
        draw=gain_map.draw,
        below=_below,
        beside=_beside,
        heights=lambda chart: (3.3,),
        width=3.3,
        scale=Scale(ratios("1: unchanged"), _map_specials),
        columns=2,
        stepped=True,
        folded=False,
        always=True,
        of_gains=True,
    ),
    "total-vs-direct": Kind(
        what="norm of the gradient at h: all of it, and what a hook sees",
        prepare=total_vs_direct.prepare,
        draw=total_vs_direct.draw,
        below=_below,
        heights=lambda chart: (2.1,),
        stepped=True,
        folded=False,
        always=True,
    ),
    "lag-curve": Kind(
        what="largest gain ‖∂s(t′)/∂s(t)‖ against the distance t′ − t",
        prepare=lag_curve.prepare,
        draw=lag_curve.draw,
        heights=lambda chart: (2.4, 0.9) if np.isfinite(chart.slope).any() else (2.4,),
        width=6.0,
        always=True,
        of_gains=True,
    ),
    "triangle": Kind(
        what="gradient ‖∂L(t′)/∂s(t)‖ of every loss step ÷ its size at t = t′",
        prepare=triangle.prepare,
        draw=triangle.draw,
        below=_below,
        beside=_beside,
        heights=lambda chart: (3.3,),
        width=3.3,
        scale=Scale(
            ratios("as at t′"),
            lambda charts: _plain([chart.values for chart in charts], "no loss, or t after t′"),
        ),
        columns=2,
        stepped=True,
        title="loss triangle",
    ),
    "lag-gradient": Kind(
        what="parts of the parameter gradient by how many steps back they went",
        prepare=lag_gradient.prepare,
        draw=lag_gradient.draw,
        heights=lambda chart: (1.5, 1.5),
        title="parameter gradient by lag",
    ),
    "states": Kind(
        what="gradient of the loss at every state, ÷ its typical size where the loss acts",
        prepare=states.prepare,
        draw=states.draw,
        below=_below,
        heights=lambda chart: (1.5,) * len(chart.heats),
        scale=Scale(ratios("as at the loss"), _heats),
        stepped=True,
        title="gradient at every unit",
        always=True,
    ),
    "layers": Kind(
        what="norm of the gradient at every layer, median over sequences",
        prepare=layers.prepare,
        draw=layers.draw,
        heights=_layer_heights,
        left=1.3,
        width=6.6,
        gap=lambda chart, panel: 0.56 + _below(chart),
        scale=Scale(
            ratios("as at the top"),
            lambda charts: _plain(
                [values for chart in charts for values in (chart.at_state, chart.passed)],
                "not measured",
            ),
        ),
        together=True,
        stepped=True,
        title="layers side by side",
    ),
    "rank": Kind(
        what="how many directions of the state survive, against the distance t′ − t",
        prepare=rank.prepare,
        draw=rank.draw,
        heights=lambda chart: (2.0,),
        title="rank against lag",
        of_gains=True,
    ),
    "lyapunov": Kind(
        what="Lyapunov exponents: growth per step of each direction, in nats",
        prepare=lyapunov.prepare,
        draw=lyapunov.draw,
        heights=lambda chart: (1.7, 1.0) if chart.trace.size else (1.7,),
        gap=lambda chart, panel: 0.5,
        title="Lyapunov spectrum",
        of_gains=True,
    ),
    "paths": Kind(
        what="the ways from c(t−1) to c(t): largest gain of each",
        prepare=paths.prepare,
        draw=paths.draw,
        below=_below,
        heights=lambda chart: (2.1,),
        stepped=True,
        title="paths of the cell state",
    ),
    "blocks": Kind(
        what="gain from one state to another, against the distance t′ − t",
        prepare=blocks.prepare,
        draw=blocks.draw,
        heights=lambda chart: (2.0,) if np.isnan(chart.cell_path).all() else (2.0, 0.8),
        title="blocks of the product",
        of_gains=True,
    ),
    "gates": Kind(
        what=f"gates over the steps: mean, share {CLOSED_WORDS}, {OPEN_WORDS}",
        prepare=gates.prepare,
        draw=gates.draw,
        below=_below,
        heights=lambda chart: (1.2, 1.2, 1.2),
        stepped=True,
        title="gates over the steps",
    ),
    "saturation": Kind(
        what="where every gate of every unit stands, and which units are stuck",
        prepare=saturation.prepare,
        draw=saturation.draw,
        heights=lambda chart: (0.95,) * len(chart.gates) + ((1.1,) if chart.limits else ()),
        gap=lambda chart, panel: 0.26 if panel < len(chart.gates) else 0.72 + _below(chart),
        below=lambda chart: 0.0 if chart.limits else _below(chart),
        scale=Scale(saturation.colour_bar, _gate_specials, lambda chart: bool(chart.gates)),
        stepped=True,
    ),
    "heads": Kind(
        what="how far each head of a linear recurrence remembers",
        prepare=heads.prepare,
        draw=heads.draw,
        heights=lambda chart: (min(3.4, max(0.9, 0.17 * len(chart.heads))),),
        scale=Scale(ratios("1: unchanged"), lambda charts: _plain([c.values for c in charts], "")),
        title="heads against distance",
        of_gains=True,
    ),
    "time-scales": Kind(
        what="how long each unit's own gate lets it remember, −1 ÷ mean ln of the gate",
        prepare=time_scales.prepare,
        draw=time_scales.draw,
        heights=lambda chart: (1.8,),
        title="time-scales of the units",
    ),
}
