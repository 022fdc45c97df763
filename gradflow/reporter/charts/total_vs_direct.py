"""Total against direct: the whole gradient at h, and the part a hook on the output would show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes

from gradflow.analysis import LayerAnalysis
from gradflow.reporter.charts.chart import Chart, Line, draw_log_lines, key, label_steps
from gradflow.reporter.picture import INK
from gradflow.reporter.scale import DIRECT, SERIES


@dataclass(frozen=True, kw_only=True)
class Parts(Chart):
    """Norms of total and direct gradient over the steps, log10; -inf is exactly zero."""

    state: str
    step: np.ndarray  # (T,) counted from 1
    total: np.ndarray  # (T,)
    direct: np.ndarray  # (T,)
    last: np.ndarray  # (T,) of the last loss step alone; NaN where that is the total


def prepare(layer: LayerAnalysis) -> Parts:
    """Total gradient at h against the part that a hook on the layer's output would have shown."""
    states = [str(state) for state in layer.data["state"].values]
    state = "h" if "h" in states else states[0]
    norms = layer.data["grad_norm"].sel(state=state)
    with np.errstate(divide="ignore"):
        total, direct, last = (
            np.log10(norms.sel(kind=kind).values) for kind in ("total", "direct", "last")
        )
    note = layer.gradient_note
    if not note and np.isnan(total).all():
        note = "No gradient of the loss was recorded for this layer."
    with np.errstate(invalid="ignore"):  # −inf and −inf are equal
        # the loss acts at one step only; two sums of one gradient may differ in their last digits
        alone = np.allclose(total, last, rtol=0, atol=1e-3, equal_nan=True)
    return Parts(
        message="" if note else _message(total, direct),
        reading=_reading(layer, direct, last, alone),
        note=note,
        state=state,
        step=np.arange(1, len(total) + 1),
        total=total,
        direct=direct,
        last=np.full(last.shape, np.nan) if alone else last,
        labels=layer.step_labels,
    )


def _reading(layer: LayerAnalysis, direct: np.ndarray, last: np.ndarray, alone: bool) -> str:
    words = (
        "The direct part comes from the loss, or from the layer above, and leaves out what comes back "
        "through the layer's own recurrence; a hook on the output shows no more than that."
    )
    if np.isneginf(direct).any():
        words += " Exact zeros are dots at 0."
    if len(np.unique(layer.data["length"].values)) > 1:
        words += (
            " Sequences end at different steps; every step shows the median of those still running."
        )
    if not alone and not np.isnan(last).all():
        words += (
            " The total adds up all loss steps, so it need not fade; how far back one loss step "
            "reaches, its own dotted line shows."
        )
    return words


def _message(total: np.ndarray, direct: np.ndarray) -> str:
    """What a hook on the layer's output would have missed, in words."""
    known = ~np.isnan(total) & ~np.isnan(direct)
    missed = np.isneginf(direct[known]) & ~np.isneginf(total[known])
    if not known.any():
        return "the direct part was not recorded"
    where = f"{int(missed.sum())} of {int(known.sum())} steps"
    if missed.any():
        return f"a hook on the output shows exactly 0 at {where}; the total is not 0 there"
    pair = np.isfinite(total) & np.isfinite(direct)
    if not pair.any():
        return "total and direct gradient are exactly 0 at every step"
    apart = float(np.max(np.abs(total[pair] - direct[pair])))
    if apart < 0.005:
        return "a hook on the output shows the whole gradient: none comes through recurrence"
    return f"without its own recurrence the gradient is off by up to a factor of {10 ** min(apart, 300):.2g}"


def draw(axes: Sequence[Axes], parts: Parts) -> None:
    """Total and direct gradient over the steps; exact zeros sit on the lower edge."""
    ax = axes[0]
    lines = (
        Line(parts.total, f"total ∂L/∂{parts.state}", SERIES[0], 1.8),
        Line(parts.last, "total, last loss step alone", INK, 0.9, (0, (2, 2))),
        Line(parts.direct, "direct: all that a hook can show", DIRECT, 1.4),
    )
    draw_log_lines(ax, parts.step, lines)
    ax.set_xlim(1 - 0.5, len(parts.step) + 0.5)
    label_steps(ax.xaxis, parts.labels, parts.step[: len(parts.labels)], 6)
    ax.set_xlabel("step", labelpad=2)
    ax.set_ylabel("gradient norm", labelpad=2)
    key(ax, 3)
