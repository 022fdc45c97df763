"""The lag curve: the largest gain against the distance, its fit, half-life and horizon."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes

from gradflow.analysis import LayerAnalysis
from gradflow.reporter import overview, panels
from gradflow.reporter.charts.chart import Chart
from gradflow.reporter.numbers import half_life_words, rate_words
from gradflow.reporter.prepare import LagLine, lag_line


@dataclass(frozen=True, kw_only=True)
class LagCurve(Chart):
    """The curve, and how much of it is shown."""

    line: LagLine
    layer: LayerAnalysis
    reach: float  # the largest lag on the axis
    top: float  # the highest power of ten


def prepare(layer: LayerAnalysis) -> LagCurve:
    """The same curve as in the overview, with its words."""
    line = lag_line(layer)
    return LagCurve(
        message="" if line.note else _message(layer, line),
        reading=(
            "Above, the median over sequences and starting steps, its 10–90 % band, and dashed the "
            "rate. Below, the slope from one distance to the next, in nats per step, and the "
            "rate's interval."
        ),
        note=line.note,
        line=line,
        layer=layer,
        reach=overview.curve_reach([line], [layer]),
        top=overview.curve_top([line]),
    )


def _message(layer: LayerAnalysis, line: LagLine) -> str:
    said = [f"the gain is {line.words}"] if line.words else []
    half = half_life_words(layer)
    if half not in ("none", "never") and math.isfinite(layer.rate.value):
        said.append(f"it halves in {half} steps")
    rate = rate_words(layer.rate)
    if rate != "none":
        said.append(f"rate {rate} nats per step")
    return "; ".join(said) or "the gain against the distance"


def draw(axes: Sequence[Axes], curve: LagCurve) -> None:
    """The curve; below it, where there is room, its slope."""
    panels.draw_lag(axes[0], curve.line, curve.layer, curve.reach, curve.top, label=len(axes) == 1)
    axes[0].set_ylabel("gain", labelpad=2)
    if len(axes) > 1:
        axes[0].tick_params(labelbottom=False)
        panels.draw_slope(axes[1], curve.line, curve.layer, curve.reach)
