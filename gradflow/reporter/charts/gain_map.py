"""The gain map: how much of every step's state is felt at every later step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes

from gradflow.analysis import LayerAnalysis
from gradflow.reporter.charts.chart import LN10, Chart
from gradflow.reporter.charts.labels import label_steps
from gradflow.reporter.charts.marks import draw_contour
from gradflow.reporter.numbers import percent_words
from gradflow.reporter.prepare import GONE, MAP_CELLS, pooled
from gradflow.reporter.scale import paint


@dataclass(frozen=True, kw_only=True)
class GainMap(Chart):
    """ln gain of one sequence as powers of ten: target t' down, source t across."""

    values: np.ndarray  # (targets, sources) log10; NaN where t' < t
    first: float  # the step, counted from 1, at the first edge
    last: float
    sequence: int  # index in the user's batch
    norm: str
    pool: int  # steps in a cell of the picture; the largest is shown
    contour: bool  # whether some gains lie above and some below 10⁻³
    reverse: bool


def prepare(layer: LayerAnalysis, norm: str = "spectral") -> GainMap:
    """The gain of every pair t' ≥ t of the first mapped sequence, at most 128 × 128 cells."""
    data = layer.data["log_gain"]
    if not data.sizes["sequence"] or not data.sizes["source"]:
        return GainMap(
            note="No map was made.", values=np.empty((0, 0)), first=0, last=0, sequence=-1,
            norm=norm, pool=1, contour=False, reverse=layer.reverse,
        )  # fmt: skip
    picked = data.sel(norm=norm).isel(sequence=0).transpose("target", "source")
    values = picked.values / LN10
    count = values.shape[0]
    pool = max(1, math.ceil(count / MAP_CELLS))
    steps = picked["source"].values + 1.0
    stride = float(steps[1] - steps[0]) if count > 1 else 1.0
    shown = pooled(values, pool, pool)
    known = shown[~np.isnan(shown)]
    start = float(steps[0]) - stride / 2
    contour = bool(len(known) and known.min() < GONE < known.max() and count > 2)
    note = _note(layer, known)
    return GainMap(
        message="" if note else _message(values),
        reading=_reading(contour, pool * round(stride)),
        note=note,
        values=shown,
        first=start,
        last=start + shown.shape[0] * pool * stride,
        sequence=int(data["sequence"].values[0]),
        norm=norm,
        pool=pool * round(stride),
        contour=contour,
        reverse=layer.reverse,
        labels=_labels(layer),
    )


def _labels(layer: LayerAnalysis) -> tuple[str, ...]:
    """The labels of the mapped sequence in processing order."""
    sequence = int(layer.data["sequence"].values[0])
    labels = layer.step_labels[: int(layer.data["length"].values[sequence])]
    return labels[::-1] if layer.reverse else labels


def _note(layer: LayerAnalysis, known: np.ndarray) -> str:
    if layer.steps <= 1:
        return "one step: no pair of steps to show"
    return "" if len(known) else "no finite gain to show"


def _message(values: np.ndarray) -> str:
    """How many of the pairs of different steps keep a gain of 10⁻³."""
    apart = values.copy()
    np.fill_diagonal(apart, np.nan)
    known = apart[~np.isnan(apart)]
    if not len(known):
        return "no pair of different steps was measured"
    kept = float((known >= GONE).mean())
    if kept == 1:
        return "every pair of steps keeps a gain above 10⁻³"
    if kept == 0:
        return "no pair of different steps keeps a gain of 10⁻³"
    return f"{percent_words(kept)} of the pairs of steps keep a gain above 10⁻³"


def _reading(contour: bool, pool: int) -> str:
    words = "Along a row, leftwards from the diagonal: how far back step t′ still feels."
    if contour:
        words += " White line: 10⁻³."
    if pool > 1:
        words += f" A cell is the largest of {pool} × {pool} steps."
    return words


def draw(axes: Sequence[Axes], gain: GainMap) -> None:
    """Source t across, target t′ down; the undefined half is grey; contour at 10⁻³."""
    ax = axes[0]
    extent = (gain.first, gain.last, gain.last, gain.first)
    ax.imshow(paint(gain.values), extent=extent, interpolation="nearest", aspect="equal")
    if gain.contour:
        edges = (gain.first, gain.last)
        draw_contour(ax, gain.values, edges, edges, GONE)
    for axis in (ax.xaxis, ax.yaxis):
        label_steps(axis, gain.labels, range(1, len(gain.labels) + 1), 5)
    order = " (processing order)" if gain.reverse else ""
    ax.set_xlabel(f"source step t{order}", labelpad=2)
    ax.set_ylabel("target step t′", labelpad=2)
