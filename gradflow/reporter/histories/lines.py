"""Curves over the training steps: rates, horizons, gates, gradient norms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from gradflow.analysis import Rate
from gradflow.limits import GATE_CLOSED, GATE_OPEN, GONE_WORDS
from gradflow.reporter.charts.chart import DASHED, DOTTED, Dash, key, log_limits, power_ticks
from gradflow.reporter.histories.across import (
    STRIP,
    Along,
    Shared,
    Strip,
    change_lines,
    draw_strip,
    step_axis,
    strips_of,
)
from gradflow.reporter.histories.course import Course
from gradflow.reporter.histories.story import reach, title, updates
from gradflow.reporter.numbers import number_words, percent_words, rate_words
from gradflow.reporter.picture import FAINT, INK, SOFT
from gradflow.reporter.readout import Curves, tell
from gradflow.reporter.scale import DIRECT, SERIES, VERDICT_COLOURS

PANEL_HIGH = 1.5  # inches of a panel


@dataclass(frozen=True)
class Curve:
    """One line of a panel."""

    name: str  # in the key
    values: np.ndarray  # (N,) NaN where it was not measured
    colour: str  # of the line
    dash: Dash = "-"  # of the line
    low: np.ndarray | None = None  # (N,) lower end of its band
    high: np.ndarray | None = None  # (N,) upper end
    step: np.ndarray | None = None  # (N,) training steps of its own; None: those of the picture
    faint: bool = False  # one of many, beside their mean


@dataclass(frozen=True)
class Panel:
    """One panel of curves."""

    what: str  # of the y axis
    curves: tuple[Curve, ...]  # drawn in this order
    limits: tuple[float, float]  # of the y axis
    levels: tuple[tuple[float, str], ...] = ()  # dashed lines, with their words
    powers: bool = False  # whether the values are log10
    steps: bool = False  # whether the values are log10 of counts
    ticks: tuple[float, ...] = ()  # of the y axis; none: round numbers
    beyond: np.ndarray | None = None  # (N,) true where a value lies above the axis
    high: float = PANEL_HIGH  # inches


@dataclass(frozen=True, kw_only=True)
class Lines(Along):
    """Panels of curves below the strips."""

    panels: tuple[Panel, ...]  # from top to bottom
    changes: bool = True  # whether changes of the verdict are marked


def heights(chart: Lines) -> tuple[float, ...]:
    """Inches of strips and panels."""
    return (*(STRIP for _ in chart.strips), *(panel.high for panel in chart.panels))


def gap(chart: Lines, panel: int) -> float:
    """Inches above a panel; those with a key have room for it."""
    if panel < len(chart.strips):
        return 0.025
    return 0.26 if _keyed(chart, panel - len(chart.strips)) else 0.09


def _keyed(chart: Lines, panel: int) -> bool:
    """Whether a panel has a key of its own: not where the one above it has the same."""
    names = [
        [curve.name for curve in one.curves if curve.name] for one in chart.panels[: panel + 1]
    ]
    return len(names[-1]) > 1 and names[-1] not in names[:-1]


def prepare_rates(course: Course, shared: Shared, *, first: bool = True) -> Lines:
    """The rate over the training, with its 95 % interval."""
    numbers = course.numbers
    settled = numbers["rate_settled"] != 0
    rate, low, high = (np.where(settled, numbers[name], np.nan)
                       for name in ("rate", "rate_low", "rate_high"))  # fmt: skip
    rate = np.where(np.isfinite(rate), rate, np.nan)
    note = ""
    if np.isnan(rate).all():
        note = "No rate was measured: the preset pulse has none, or so few steps do not show it."
    unit = "batches" if (numbers["batches"] > 1).any() else "sequences"
    panel = Panel(
        what="nats per step",
        curves=(Curve("rate", rate, INK, low=low, high=high),),
        limits=shared.limits("rate"),
        levels=((0.0, ""),),
    )
    return _lines(course, shared, note, _rate_words(course, rate), (panel,),
                  f"Growth of ln gain per step in the long run, with its 95 % interval over {unit}: below "
                  "0 the gain vanishes with the distance, above it explodes. "
                  + "Where so few steps do not show it, there is none." * (not settled.all()))  # fmt: skip


def _rate_words(course: Course, rate: np.ndarray) -> str:
    known = np.flatnonzero(~np.isnan(rate))
    if not len(known):
        return ""
    first, last = (_rate(course, int(place)) for place in known[[0, -1]])
    if len(known) == 1:
        return f"the rate was {first} nats per step"
    top, low = int(np.nanargmax(rate)), int(np.nanargmin(rate))
    said = f"the rate went from {first} to {last} nats per step"
    best = [place for place in (top, low) if place not in known[[0, -1]]]
    best = [place for place in best if abs(rate[place] - rate[known]).min() == 0]
    if best and top == best[0]:
        said += (
            f", its highest {_rate(course, top)} at {course.counted_in} {updates(course.step[top])}"
        )
    return said


def _rate(course: Course, place: int) -> str:
    ends = (course.numbers[name][place] for name in ("rate", "rate_low", "rate_high"))
    return rate_words(Rate(*map(float, ends)))


def prepare_horizons(course: Course, shared: Shared, *, first: bool = True) -> Lines:
    """How far back the gain, and the gradient of the last loss step, are not gone."""
    gone, horizon = course.gone, course.numbers["horizon"]
    curves = []
    if course.has_gains:
        curves.append(Curve("gain of the best direction", _log(horizon), INK))
    curves.append(Curve("gradient of the last loss step", _log(gone), DIRECT, DASHED))
    note = "" if reach(course) else "How far back gradients reach was not measured."
    span = course.numbers["span"]
    known = span[~np.isnan(span)]
    levels = ((math.log10(known[-1]), f"span {known[-1]:.0f}"),) if len(known) else ()
    unknown = np.isnan(horizon) & (course.numbers["searched"] > 0) & (course.verdict != "")
    panel = Panel(
        what="steps",
        curves=tuple(curves),
        limits=shared.limits("horizon"),
        levels=levels,
        steps=True,
        beyond=(np.isposinf(horizon) | unknown) if course.has_gains else np.isposinf(gone),
    )
    return _lines(course, shared, note, title(course), (panel,),
                  f"Steps until the gain, or the gradient, is below {GONE_WORDS} of its size at the loss; a "
                  "triangle at the top: it was nowhere below, as far as was looked.")  # fmt: skip


def _log(values: np.ndarray) -> np.ndarray:
    known = np.isfinite(values) & (values > 0)
    return np.log10(np.where(known, values, 1.0), where=known, out=np.full(len(values), np.nan))


def prepare_gates(course: Course, shared: Shared, *, first: bool = True) -> Lines:
    """Mean of every gate with that of its least and its most open unit; shares closed and open."""
    panels = []
    for place, gate in enumerate(course.gates):
        mean, low, high = (course.of_gate[name][:, place] for name in
                           ("gate_mean", "gate_low", "gate_high"))  # fmt: skip
        shut, opened = (course.of_gate[name][:, place] for name in ("gate_closed", "gate_open"))
        tanh = bool(np.nanmin(np.append(low, 0.0)) < 0)
        words = "mean, and from the lowest unit's to the highest's"
        curves = [Curve(words, mean, SERIES[place % len(SERIES)], low=low, high=high)]
        if not (np.isnan(shut).all() or np.isnan(opened).all() or tanh):
            curves += [Curve(f"share open (> {GATE_OPEN:g})", opened, SOFT, DASHED),
                       Curve(f"share closed (< {GATE_CLOSED:g})", shut, SOFT, DOTTED)]  # fmt: skip
        panels.append(
            Panel(
                f"gate {gate}",
                tuple(curves),
                (-1.05 if tanh else -0.05, 1.05),
                high=0.8,
                ticks=(-1, 0, 1) if tanh else (0, 0.5, 1),
            )
        )
    note = "" if panels else "No gate was measured: this layer has none, or none that is known."
    return _lines(course, shared, note, _gate_words(course), tuple(panels),
                  f"Averages over units, steps and sequences of each {course.noun}.")  # fmt: skip


def _gate_words(course: Course) -> str:
    """The gate whose mean changed most."""
    mean = course.of_gate["gate_mean"]
    if not mean.size or np.isnan(mean).all():
        return ""
    changes = []
    for place, gate in enumerate(course.gates):
        known = mean[~np.isnan(mean[:, place]), place]
        if len(known):
            changes.append((abs(known[-1] - known[0]), gate, known[0], known[-1]))
    _, gate, first, last = max(changes)
    if (~np.isnan(mean).all(axis=1)).sum() == 1:
        said = (f"{gate} {number_words(value)}" for _, gate, value, _ in changes)
        return f"on average the gates stood at {', '.join(said)}"
    if abs(last - first) < 0.05:
        return f"no gate's mean moved by more than {number_words(abs(last - first))}"
    return f"gate {gate} went from {number_words(first)} to {number_words(last)} on average"


def prepare_norms(course: Course, shared: Shared, *, first: bool = True) -> Lines:
    """Norm of the parameter gradient before and after clipping, and the learning rate."""
    before, after = (course.numbers[name] for name in ("grad_norm", "grad_norm_clipped"))
    curves = [Curve("before clipping", _log(before), INK)]
    clipped = course.numbers["clipped"]
    if (clipped == 1).any():
        curves.append(Curve("as the optimizer read it", _log(after), DIRECT, DASHED))
    panels = [Panel("‖∂L/∂W‖", tuple(curves), shared.limits("norm"), powers=True)]
    rates = _log(course.learning_rate)
    if not np.isnan(rates).all():
        panels.append(Panel("learning\nrate", (Curve("learning rate", rates, SOFT),), log_limits([rates]),
                            powers=True, high=0.6))  # fmt: skip
    note = "The norm of the gradient was not measured." if np.isnan(curves[0].values).all() else ""
    return _lines(course, shared, note, _norm_words(course), tuple(panels),
                  "Norm of the gradient of the layer's own parameters, of the whole loss.")  # fmt: skip


def _norm_words(course: Course) -> str:
    norm, clipped = course.numbers["grad_norm"], course.numbers["clipped"]
    known = np.flatnonzero(np.isfinite(norm))
    if not len(known):
        return ""
    top = int(known[norm[known].argmax()])
    said = f"the gradient's norm was {number_words(float(np.median(norm[known])))}"
    if len(known) > 1:
        said += (
            f" in the median, at most {number_words(float(norm[top]))} at {course.counted_in} "
            f"{updates(course.step[top])}"
        )
    told = ~np.isnan(clipped)
    if (clipped == 1).any():
        said += (
            f"; clipping acted at {percent_words(float((clipped[told] == 1).mean()))} of the probes"
        )
    return said


def _lines(
    course: Course, shared: Shared, note: str, message: str, panels: tuple[Panel, ...], reading: str
) -> Lines:
    return Lines(
        message="" if note else message,
        reading=reading.strip(),
        note=note,
        course=course,
        shared=shared,
        strips=strips_of(course) or (Strip("", ()),),  # room for a key
        panels=panels,
    )


def draw(axes: Sequence[Axes], chart: Lines) -> None:
    """Strips and panels, one below the other; into one panel the first of the curves."""
    if len(axes) == 1:
        _draw_panel(axes[0], chart, 0, last=True)
        return
    for ax, strip in zip(axes, chart.strips, strict=False):
        draw_strip(ax, strip, chart.shared)
    below = axes[len(chart.strips) :]
    for number, ax in enumerate(below[: len(chart.panels)]):
        _draw_panel(ax, chart, number, last=number == len(below) - 1)


def _told(curve: Curve, *, alone: bool) -> list[tuple[str, np.ndarray]]:
    """A curve and the ends of its band, as the pointer names them."""
    name = "" if alone and curve.low is None else curve.name.partition(",")[0]
    ends = (("its band from", curve.low), ("to", curve.high))
    return [(name, curve.values), *((end, values) for end, values in ends if values is not None)]


def _draw_panel(ax: Axes, chart: Lines, number: int, *, last: bool) -> None:
    panel = chart.panels[number]
    for level, words in panel.levels:
        ax.axhline(level, color=FAINT, lw=0.8, ls=DASHED, zorder=1)
        if words:
            ax.annotate(words, (1, level), (-3, -2), xycoords=("axes fraction", "data"),
                        textcoords="offset points", ha="right", va="top", fontsize=7, color=SOFT)  # fmt: skip
    for curve in panel.curves:
        step = chart.course.step if curve.step is None else curve.step
        lone = "." if len(step) < 3 else None
        if curve.low is not None and curve.high is not None:
            ax.fill_between(
                step, curve.low, curve.high, color=curve.colour, alpha=0.2, lw=0, zorder=2
            )
        ax.plot(step, curve.values, color=curve.colour, ls=curve.dash, marker=lone, zorder=3,
                lw=0.6 if curve.faint else 1.3, alpha=0.5 if curve.faint else 1.0,
                label=curve.name or None)  # fmt: skip
    step = chart.course.step
    if panel.beyond is not None and panel.beyond.any():
        ax.plot(step[panel.beyond], np.full(int(panel.beyond.sum()), panel.limits[1]), "^",
                color=VERDICT_COLOURS["stable"], ms=3.5, clip_on=False, zorder=6, ls="")  # fmt: skip
    ax.set_ylim(*panel.limits)
    told = [curve for curve in panel.curves if not curve.faint]
    step = step if told[0].step is None else told[0].step
    lines = [line for curve in told if len(curve.values) == len(step)
             for line in _told(curve, alone=len(told) == 1)]  # fmt: skip
    tell(ax, Curves(step, lines, log10=panel.powers or panel.steps,
                    names=tuple(map(updates, step))))  # fmt: skip
    ax.set_ylabel(panel.what, labelpad=2)
    if panel.ticks:
        ax.set_yticks(panel.ticks)
    elif panel.powers or panel.steps:
        places, said = power_ticks(*panel.limits, max(2, int(panel.high / 0.3)))
        if panel.steps:
            said = [f"{10**place:,.0f}" for place in places]
        ax.set_yticks(places, said)
    else:
        ax.yaxis.set_major_locator(MaxNLocator(nbins=max(2, int(panel.high / 0.3))))
    if chart.changes:
        change_lines(ax, chart.course)
    step_axis(ax, chart.shared, label=last)
    if _keyed(chart, number):
        key(ax, sum(bool(curve.name) for curve in panel.curves))
