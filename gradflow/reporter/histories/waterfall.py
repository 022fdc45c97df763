"""The waterfall: how far back the gradient of the last loss step reaches, over the whole training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from gradflow.limits import GONE_WORDS
from gradflow.reporter.histories.across import (
    STRIP,
    Along,
    Shared,
    change_lines,
    draw_strip,
    edges,
    step_axis,
    strips_of,
)
from gradflow.reporter.histories.course import Course
from gradflow.reporter.histories.story import stretches, title, updates
from gradflow.reporter.picture import INK
from gradflow.reporter.readout import Cells, Grid, tell
from gradflow.reporter.scale import paint

DOTS_DOWN, DOTS_ACROSS = 128, 720  # of the picture, at most: what a page shows as single dots
LOSS_HIGH, FALL_HIGH = 0.62, 1.9  # inches


@dataclass(frozen=True, kw_only=True)
class Waterfall(Along):
    """Training steps across, steps back from the loss down."""

    values: np.ndarray  # (rows, columns) log10 over that at the loss; -inf zero, NaN no such step
    bad: np.ndarray  # (rows, columns) true where the gradient was NaN or Inf
    top: bool  # whether its loss is drawn above it
    pool: int  # probes of a column; their median is shown
    told: Grid  # the same numbers, one for each probe or pool of probes and distance


def prepare(course: Course, shared: Shared, *, first: bool = True) -> Waterfall:
    """The picture of a layer; the ``first`` of a run has the loss above it."""
    measured = ~np.isnan(course.profile).all(axis=1)
    note = ""
    if not (measured | course.bad).any():
        note = f"The gradient of the last loss step was not measured at any {course.noun}."
    grid = _grid(course, shared)
    image, bad = _image(grid, shared)
    pool = max(1, math.ceil(len(course.step) / DOTS_ACROSS))
    top = first and bool(np.isfinite(course.numbers["loss"]).any())
    return Waterfall(
        message=title(course),
        reading=_reading(course, top, pool, shared),
        note=note,
        course=course,
        shared=shared,
        strips=strips_of(course),
        values=image,
        bad=bad,
        top=top,
        pool=pool,
        told=grid,
    )


def depth(lag: np.ndarray | float) -> np.ndarray:
    """The place of a lag on the axis, which is logarithmic and begins with the loss itself."""
    return np.log1p(np.asarray(lag, dtype=float))


def _grid(course: Course, shared: Shared) -> Grid:
    """The profile as it was measured: distances down, probes across."""
    known = np.flatnonzero(~np.isnan(course.profile).all(axis=0))
    lag = course.lag[known] if len(known) else np.zeros(1)
    profile = course.profile[:, known] if len(known) else np.full((len(course.step), 1), np.nan)
    bad = course.bad[:, None] & np.isnan(profile)
    pool = max(1, math.ceil(len(course.step) / DOTS_ACROSS))
    profile, bad, edge = _pooled(profile, bad, edges(course.step), pool)
    # a row of the picture shows the measured distance that lies nearest, in the logarithm
    middle = (depth(lag)[1:] + depth(lag)[:-1]) / 2
    end = min(float(depth(shared.lags + 0.5)), float(depth(float(lag[-1]) * 1.07 + 0.5)))
    first, last = course.step[::pool], np.append(course.step[pool - 1 :: pool], course.step[-1])
    names = [updates(one) if pool == 1 else f"{updates(one)} to {updates(other)}"
             for one, other in zip(first, last, strict=False)]  # fmt: skip
    when = f"{course.counted_in}{'s' * (pool > 1)} {{x}}, {{y}} back from the loss"
    median = ", median" * (pool > 1)
    return Grid(
        values=profile.T,
        bad=bad.T,
        across=Cells(edge, first, names=tuple(names)),
        down=Cells(np.array([0.0, *middle, end]), lag, noun="step"),
        words={
            "some": f"{when}: {{value}} of the gradient's size at the loss{median}",
            "more": f"{when}: {{value}} the gradient's size at the loss{median}",
            "zero": f"{when}: exactly zero",
            "none": f"{when}: no such step, or not measured",
            "bad": f"{when}: NaN or Inf",
        },
    )


def _image(grid: Grid, shared: Shared) -> tuple[np.ndarray, np.ndarray]:
    """The profile on an even grid: rows by the logarithm of the lag, columns by the training step."""
    profile, bad, edge, lag = grid.values.T, grid.bad, grid.across.edges, grid.down.first
    across = np.linspace(*shared.steps, DOTS_ACROSS, endpoint=False)
    across = across + (shared.steps[1] - shared.steps[0]) / DOTS_ACROSS / 2
    column = np.searchsorted(edge, across, side="right") - 1
    inside = (column >= 0) & (column < len(profile))
    down = np.expm1((np.arange(DOTS_DOWN) + 0.5) / DOTS_DOWN * depth(shared.lags + 0.5))
    row = np.abs(depth(lag)[None, :] - depth(down)[:, None]).argmin(axis=1)
    image = profile[np.clip(column, 0, len(profile) - 1)][:, row].T
    broken = np.zeros_like(image, dtype=bool)
    if bad is not None:
        broken = bad.T[np.clip(column, 0, len(profile) - 1)][:, row].T & inside[None, :]
    beyond = down > float(lag[-1]) * 1.07 + 0.5
    image = np.where(inside[None, :] & ~beyond[:, None], image, np.nan)
    return image, broken


def _pooled(
    profile: np.ndarray, bad: np.ndarray, edge: np.ndarray, pool: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every so many probes as one: their median, and bad where any is."""
    if pool == 1:
        return profile, bad, edge
    count = -(-len(profile) // pool)
    filled = np.full((count * pool, profile.shape[1]), np.nan)
    filled[: len(profile)] = profile
    any_bad = np.zeros(filled.shape, dtype=bool)
    any_bad[: len(bad)] = bad
    blocks = filled.reshape(count, pool, -1)
    return (
        _median(blocks),
        np.logical_or.reduce(any_bad.reshape(count, pool, -1), axis=1),
        np.append(edge[:-1:pool], edge[-1]),
    )


def _median(blocks: np.ndarray) -> np.ndarray:
    """The lower median of every block, (count, K); exact zeros count, NaN do not."""
    ordered = np.sort(blocks, axis=1)  # NaN go last
    known = np.sum(~np.isnan(ordered), axis=1)
    place = np.maximum((known - 1) // 2, 0)
    return np.take_along_axis(ordered, place[:, None], axis=1)[:, 0]


def _reading(course: Course, top: bool, pool: int, shared: Shared) -> str:
    words = (
        f"A column is one {course.noun} of the training: how much of the last loss step's gradient reaches "
        "the state so many steps back, over its size at the loss; rows are even in the logarithm of the "
        "distance, and the gradient is gone where it is below "
        f"{GONE_WORDS} (the black line)."
    )
    if pool > 1:
        words += f" Each column is the median of {pool} {course.noun}s."
    if course.has_gains:
        words += " Sentence and verdict are of gains: the best direction may reach further than the loss's."
    if (course.numbers["cuts"] > 0).any():
        words += (
            " Grey: no sequence reaches so far back, from the loss to where it was last cut off."
        )
    if stretches(course.verdict)[1:]:
        words += f" Dotted: the verdict changed for at least three {course.noun}s."
    return words


def heights(chart: Waterfall) -> tuple[float, ...]:
    """Inches of the panels: the loss, the strips, the waterfall."""
    return (*((LOSS_HIGH,) if chart.top else ()), *(STRIP for _ in chart.strips), FALL_HIGH)


def gap(chart: Waterfall, panel: int) -> float:
    """Inches above a panel."""
    if panel == len(chart.strips) + chart.top:
        return 0.09  # the word at its top has its place
    return 0.07 if panel == 1 and chart.top else 0.025


def draw(axes: Sequence[Axes], chart: Waterfall) -> None:
    """The loss, the strips and the waterfall, one below the other; into one panel the waterfall."""
    main = axes[-1] if len(axes) > 1 else axes[0]
    if len(axes) > 1:
        above = list(axes[:-1])
        if chart.top:
            draw_loss(above.pop(0), chart.course, chart.shared)
        for ax, strip in zip(above, chart.strips, strict=True):
            draw_strip(ax, strip, chart.shared)
    _draw_image(main, chart)


def draw_loss(ax: Axes, course: Course, shared: Shared) -> None:
    """The loss over the training steps, as it was told to the watch."""
    loss = course.numbers["loss"]
    lone = "." if len(loss) < 3 else None
    ax.plot(course.step, np.where(np.isfinite(loss), loss, np.nan), color=INK, lw=1.0, marker=lone)
    ax.set_ylim(*shared.limits("loss"))
    ax.set_ylabel("loss", labelpad=2)
    ax.yaxis.set_major_locator(MaxNLocator(nbins=3))
    ax.ticklabel_format(axis="y", useOffset=False)
    step_axis(ax, shared, label=False)


def _draw_image(ax: Axes, chart: Waterfall) -> None:
    bottom = float(depth(chart.shared.lags + 0.5))
    ax.imshow(
        paint(chart.values, chart.bad),
        aspect="auto",
        interpolation="nearest",
        extent=(*chart.shared.steps, bottom, 0.0),
    )
    ax.set_ylim(bottom, 0.0)
    tell(ax, chart.told)
    ticks = lag_ticks(chart.shared.lags)
    ax.set_yticks(depth(np.array(ticks)), ["loss" if tick == 0 else f"{tick:,}" for tick in ticks])
    ax.set_ylabel("steps back from the loss", labelpad=2)
    _draw_gone(ax, chart)
    change_lines(ax, chart.course)
    step_axis(ax, chart.shared, label=True)


def _draw_gone(ax: Axes, chart: Waterfall) -> None:
    """Where the profile first falls below 10⁻³, a step at every probe."""
    gone = chart.course.gone
    known = np.isfinite(gone)
    place = np.where(known, depth(np.where(known, gone, 0.0) - 0.5), np.nan)
    place = np.where(np.isposinf(gone), np.nan, place)
    edge = edges(chart.course.step)
    ax.stairs(place, edge, baseline=None, color="black", lw=0.9, zorder=6)


def lag_ticks(most: float) -> list[int]:
    """Steps back to label on the axis, the loss first.

    >>> lag_ticks(99), lag_ticks(4)
    ([0, 1, 2, 5, 10, 20, 50, 99], [0, 1, 2, 4])
    """
    every = [digit * 10**ten for ten in range(9) for digit in (1, 2, 5)]
    inside = [value for value in every if value < 0.75 * most]
    return [0, *inside, int(most)] if most >= 1 else [0]
