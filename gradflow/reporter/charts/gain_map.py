"""The gain map: how much of every step's state is felt at every later step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes

from gradflow.analysis import LayerAnalysis
from gradflow.limits import GONE_DECADES, GONE_WORDS
from gradflow.reporter.charts.chart import LN10, Chart, draw_contour, label_steps
from gradflow.reporter.numbers import percent_words
from gradflow.reporter.prepare import MAP_CELLS, measured_distances, pooled
from gradflow.reporter.readout import Cells, Grid, tell
from gradflow.reporter.scale import UNDEFINED, paint


@dataclass(frozen=True, kw_only=True)
class GainMap(Chart):
    """ln gain of one sequence as powers of ten: target t' down, source t across."""

    values: np.ndarray  # (targets, sources) log10; NaN where t' < t
    rows: tuple[float, float]  # the target steps at the upper and lower edge, counted from 1
    columns: tuple[float, float]  # the source steps at the left and right edge, counted from 1
    targets: Cells  # the same cell by cell
    sources: Cells  # from left to right
    last: float  # where the sequence ends; the last row and column may reach beyond it
    sequence: int  # index in the user's batch
    contour: bool  # whether some gains are gone and some are not
    unknown: (
        bool  # whether gains of t' ≥ t are missing: a cut lies between, or nothing was measured
    )
    reverse: bool


def prepare(layer: LayerAnalysis) -> GainMap:
    """The gain of every measured pair t' ≥ t of the first mapped sequence, at most 128 × 128 cells."""
    data = layer.data["log_gain"]
    if not data.sizes["sequence"] or not data.sizes["source"]:
        unknown_gains = "no gains" in layer.labels
        return _empty("Gains are not known." if unknown_gains else "No map was made.")
    picked = data.sel(norm="spectral").isel(sequence=0).transpose("target", "source")
    sequence = int(data["sequence"].values[0])
    length = int(layer.data["length"].values[sequence])
    picked = picked.isel(target=picked["target"] < length, source=picked["source"] < length)
    values = picked.values / LN10
    targets, sources = picked["target"].values + 1, picked["source"].values + 1
    known = values[(targets[:, None] != sources[None, :]) & ~np.isnan(values)]
    note = _note(layer, sources, known)
    if note:
        return _empty(note)
    down, across = _axis(targets), _axis(sources)
    shown = pooled(values, down.pool, across.pool)
    low = shown[~np.isnan(shown)]
    contour = bool(len(low) and low.min() < GONE_DECADES < low.max() and len(targets) > 2)
    unknown = bool(np.isnan(values[targets[:, None] >= sources[None, :]]).any())
    return GainMap(
        message=_message(known, "measured pair" if unknown else "pair"),
        reading=_reading(layer, sequence, contour, down, across),
        values=shown,
        rows=down.edges,
        columns=across.edges,
        targets=down.cells(targets, _labels(layer)),
        sources=across.cells(sources, _labels(layer)),
        last=length + 0.5,
        sequence=sequence,
        contour=contour,
        unknown=unknown,
        reverse=layer.reverse,
        labels=_labels(layer),
    )


@dataclass(frozen=True)
class _Axis:
    """The steps along one side of a map: measured every ``stride``, drawn ``pool`` to a cell."""

    stride: int
    pool: int
    edges: tuple[float, float]

    def cells(self, steps: np.ndarray, labels: tuple[str, ...]) -> Cells:
        """What each cell stands for."""
        first = steps[:: self.pool]
        own = tuple(labels[step - 1] for step in first) if labels and self.pool == 1 else ()
        return Cells(np.array(self.edges), first, (self.pool - 1) * self.stride, labels=own)


def _axis(steps: np.ndarray) -> _Axis:
    stride = int(steps[1] - steps[0]) if len(steps) > 1 else 1
    pool = math.ceil(len(steps) / MAP_CELLS)
    cells = math.ceil(len(steps) / pool)
    start = float(steps[0]) - 0.5  # a cell reaches from its own first step to that of the next
    return _Axis(stride, pool, (start, start + cells * pool * stride))


def _empty(note: str) -> GainMap:
    return GainMap(
        note=note, values=np.empty((0, 0)), rows=(0, 0), columns=(0, 0), last=0, sequence=-1,
        targets=Cells(np.empty(0), np.empty(0)), sources=Cells(np.empty(0), np.empty(0)),
        contour=False, unknown=False, reverse=False,
    )  # fmt: skip


def _labels(layer: LayerAnalysis) -> tuple[str, ...]:
    """The labels of the mapped sequence in processing order."""
    sequence = int(layer.data["sequence"].values[0])
    labels = layer.step_labels[: int(layer.data["length"].values[sequence])]
    return labels[::-1] if layer.reverse else labels


def _note(layer: LayerAnalysis, sources: np.ndarray, known: np.ndarray) -> str:
    if layer.steps <= 1:
        return "one step: no pair of steps to show"
    if not len(known):
        cut = layer.verdict == "dead" and not layer.gain.steps
        every = "The state is cut off from its past at every step: no gain to show."
        return every if cut else "No gain from one step to another is finite."
    if len(sources) == 1 and layer.steps > 2:
        return (
            f"Only step {sources[0]} was followed, since more would have taken too long. The lag curve "
            f"shows its gain; analyze(…, stride={math.ceil(layer.steps / MAP_CELLS)}) makes a map."
        )
    return ""


def _message(known: np.ndarray, pair: str) -> str:
    """How many of the measured pairs of different steps keep a gain that is not gone."""
    kept = float((known >= GONE_DECADES).mean())
    if kept == 1:
        return f"every {pair} of steps keeps a gain above {GONE_WORDS}"
    if kept == 0:
        return f"no {pair} of different steps keeps a gain of {GONE_WORDS}"
    return f"{percent_words(kept)} of the {pair}s of steps keep a gain above {GONE_WORDS}"


def _reading(layer: LayerAnalysis, sequence: int, contour: bool, down: _Axis, across: _Axis) -> str:
    words = "Along a row, leftwards from the diagonal: how far back step t′ still feels."
    if contour:
        words += f" White line: {GONE_WORDS}."
    if layer.sequences > 1:
        words += f" Sequence {sequence + 1} of {layer.sequences}."
    apart = across.stride > down.stride
    if apart:
        words += f" One step in {across.stride} was followed as a source."
    distances = measured_distances(layer)
    if distances:
        words += f" Measured at distances of {distances} steps only."
    targets, sources = down.pool * down.stride, across.pool * (1 if apart else across.stride)
    if max(down.pool, across.pool) > 1:
        each = f"{targets} × {sources} steps" if sources > 1 else f"{targets} target steps"
        words += f" A cell is the largest of {each}."
    return words


def draw(axes: Sequence[Axes], gain: GainMap) -> None:
    """Source t across, target t′ down; the undefined half is grey; contour where it is gone."""
    ax = axes[0]
    extent = (*gain.columns, *gain.rows[::-1])
    ax.imshow(paint(gain.values), extent=extent, interpolation="nearest", aspect="equal")
    ax.set(xlim=(0.5, gain.last), ylim=(gain.last, 0.5), facecolor=UNDEFINED)
    tell(ax, _grid(gain))
    if gain.contour:
        draw_contour(ax, gain.values, gain.columns, gain.rows, GONE_DECADES)
    for axis in (ax.xaxis, ax.yaxis):
        label_steps(axis, gain.labels, range(1, len(gain.labels) + 1), 5)
    order = " (processing order)" if gain.reverse else ""
    ax.set_xlabel(f"source step t{order}", labelpad=2)
    ax.set_ylabel("target step t′", labelpad=2)


def _grid(gain: GainMap) -> Grid:
    """The same for the pointer."""
    most = "at most: " * (gain.targets.more + gain.sources.more > 0)
    unknown = ", or the pair was cut apart or not measured" * gain.unknown
    return Grid(
        values=gain.values,
        bad=None,
        across=gain.sources,
        down=gain.targets,
        words={
            "same": "step {y} and itself: {value}",
            "some": f"{most}step {{y}} still feels up to {{value}} of step {{x}}, {{apart}} earlier",
            "less": f"{most}step {{y}} feels no more than {{value}} of step {{x}}, {{apart}} earlier",
            "more": f"{most}step {{y}} feels step {{x}}, {{apart}} earlier, magnified up to {{value}}",
            "zero": "step {y} feels nothing of step {x}, {apart} earlier: exactly zero",
            "none": f"step {{x}} is not before step {{y}}{unknown}",
        },
        row=True,
    )
