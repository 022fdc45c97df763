"""The loss triangle: how far back every single loss step is felt.

t' is a loss step, t an earlier one, G[t', t] = ∂L_t'/∂s_t.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes

from gradflow.analysis import LayerAnalysis
from gradflow.limits import GONE_DECADES
from gradflow.reporter.charts.chart import (
    Chart,
    absent,
    draw_contour,
    label_steps,
    measured,
    no_gradient,
)
from gradflow.reporter.numbers import count_words
from gradflow.reporter.prepare import MAP_CELLS, pooled
from gradflow.reporter.readout import Cells, Grid, tell
from gradflow.reporter.scale import paint


@dataclass(frozen=True, kw_only=True)
class TriangleChart(Chart):
    """log10 of ‖∂L_t'/∂s_t‖ ÷ its size at t = t', for one sequence, input-time order."""

    values: np.ndarray  # (rows, columns): loss step down, step across; NaN undefined, −inf zero
    rows: tuple[float, float]  # the loss steps at the upper and lower edge, counted from 1
    columns: tuple[float, float]  # the steps at the left and right edge, counted from 1
    losses: Cells  # the rows one by one
    earlier: Cells  # the columns one by one
    reach: np.ndarray  # (R,) per loss step, steps back until gone; inf if never
    contour: bool  # whether some entries are gone and some are not


def prepare(layer: LayerAnalysis) -> TriangleChart:
    """The triangle of the first mapped sequence, every loss step against its own size."""
    array = measured(layer, "log10_triangle")
    if array is None:
        why = no_gradient(layer, "The gradient of single loss steps was not measured here.")
        return _empty(absent(layer, "log10_triangle", why))
    array = array.sel(state=layer.main_state).isel(sequence=0).transpose("loss_step", "step")
    at = array["loss_step"].values.astype(int)
    values = array.values
    own = values[np.arange(len(at)), at]
    felt = np.isfinite(own)
    if felt.sum() <= 1:
        only = f" (step {at[felt][0] + 1})" if felt.any() else ""
        return _empty(
            f"The loss reads no more than one step of this sequence{only}, so there is no triangle "
            "to draw; the states show that loss step."
        )
    relative = np.where(felt[:, None], values - np.where(felt, own, 0.0)[:, None], np.nan)
    pasts = [_past(row, step, layer.reverse) for row, step in zip(relative, at, strict=True)]
    reach = np.array([_reach(past) for past in pasts])
    stride = float(at[1] - at[0])
    down, across = math.ceil(len(at) / MAP_CELLS), math.ceil(values.shape[1] / MAP_CELLS)
    shown = pooled(relative, down, across)
    top = at[0] + 1 - stride / 2
    known = shown[~np.isnan(shown)]
    reading = (
        "A row is one loss step t′, divided by its size at t = t′: read leftwards from the diagonal, "
        "how far back that loss is felt."
    )
    return TriangleChart(
        message=_message(reach, [len(past) for past in pasts], values.shape[1]),
        reading=reading.replace("leftwards", "rightwards") if layer.reverse else reading,
        values=shown,
        rows=(top, top + shown.shape[0] * down * stride),
        columns=(0.5, 0.5 + shown.shape[1] * across),
        losses=Cells(
            np.array((top, top + shown.shape[0] * down * stride)),
            at[::down] + 1,
            int((down - 1) * stride),
            labels=tuple(layer.step_labels[step] for step in at)
            if layer.step_labels and down == 1
            else (),
        ),
        earlier=Cells(
            np.array((0.5, 0.5 + shown.shape[1] * across)),
            np.arange(1, values.shape[1] + 1)[::across],
            across - 1,
            labels=layer.step_labels if across == 1 else (),
        ),
        reach=reach,
        contour=bool(known.min() < GONE_DECADES < known.max() and min(shown.shape) > 2),
        labels=layer.step_labels,
    )


def _empty(note: str) -> TriangleChart:
    nothing = np.empty((0, 0))
    return TriangleChart(
        note=note, values=nothing, rows=(0, 0), columns=(0, 0), reach=np.empty(0), contour=False,
        losses=Cells(nothing, nothing), earlier=Cells(nothing, nothing),
    )  # fmt: skip


def _past(row: np.ndarray, step: int, reverse: bool) -> np.ndarray:
    """A row from its own step on backwards in processing order, as far as it is defined."""
    past = row[step:] if reverse else row[step::-1]
    unknown = np.flatnonzero(np.isnan(past))
    return past[: unknown[0]] if len(unknown) else past


def _reach(past: np.ndarray) -> float:
    gone = np.flatnonzero(past < GONE_DECADES)
    return float(gone[0]) if len(gone) else math.inf


def _message(reach: np.ndarray, depths: Sequence[int], steps: int) -> str:
    """The median reach of the loss steps that have at least half of the sequence behind them."""
    deep = reach[(np.array(depths) > 1) & (np.array(depths) >= steps / 2)]
    if not len(deep):
        return "No loss step has half of the sequence behind it"
    middle = float(np.sort(deep)[(len(deep) - 1) // 2])
    if math.isinf(middle):
        still = int(np.isinf(deep).sum())
        every = "every" if still == len(deep) else f"{still} of {len(deep)}"
        late = "late loss step" if every == "every" else "late loss steps"
        return f"{every} {late} is still felt at the far end".replace("steps is", "steps are")
    return (
        f"one loss step's gradient is gone {count_words(int(middle), 'step')} before it (median of "
        f"{len(deep)} loss steps of one sequence)"
    )


def draw(axes: Sequence[Axes], triangle: TriangleChart) -> None:
    """Loss step down, step across, in the fixed colours; a white line where it is gone."""
    ax = axes[0]
    extent = (*triangle.columns, *triangle.rows[::-1])
    ax.imshow(paint(triangle.values), extent=extent, interpolation="nearest", aspect="auto")
    ax.set_ylim(triangle.rows[1], max(0.5, triangle.rows[0]))  # there is no step 0
    tell(ax, _grid(triangle))
    if triangle.contour:
        draw_contour(ax, triangle.values, triangle.columns, triangle.rows, GONE_DECADES)
    for axis in (ax.xaxis, ax.yaxis):
        label_steps(axis, triangle.labels, range(1, len(triangle.labels) + 1), 5)
    ax.set_xlabel("step t", labelpad=2)
    ax.set_ylabel("loss step t′", labelpad=2)


def _grid(triangle: TriangleChart) -> Grid:
    """The same for the pointer."""
    most = "the most among " * (triangle.losses.more + triangle.earlier.more > 0)
    at = "of the gradient of the loss at step {y}"
    return Grid(
        values=triangle.values,
        bad=None,
        across=triangle.earlier,
        down=triangle.losses,
        words={
            "same": f"{most}step {{x}}: {{value}} {at}, the loss step itself",
            "some": f"{most}step {{x}} still gets {{value}} {at}, {{apart}} away",
            "less": f"{most}step {{x}} gets {{value}} {at}, {{apart}} away",
            "more": f"{most}step {{x}} gets {{value}} the gradient of the loss at step {{y}}, {{apart}} away",
            "zero": f"step {{x}} gets nothing {at}, {{apart}} away: exactly zero",
            "none": "no loss at step {y}, or it does not come after step {x}",
        },
        row=True,
    )
