"""Units × steps of the gradient of the last loss step, at every state of a layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes

from gradflow.analysis import LayerAnalysis
from gradflow.limits import (
    CARRIED_DECADES,
    CARRIED_WORDS,
    GONE_DECADES,
    GONE_WORDS,
    GREW_DECADES,
    GREW_WORDS,
)
from gradflow.reporter.charts.chart import Chart
from gradflow.reporter.numbers import count_words
from gradflow.reporter.overview import WHOLE
from gradflow.reporter.panels import draw_heat
from gradflow.reporter.prepare import Heat, heat


@dataclass(frozen=True, kw_only=True)
class States(Chart):
    """One heat per state, the main one first in the message."""

    heats: tuple[Heat, ...]


def prepare(layer: LayerAnalysis) -> States:
    """The heat of every state."""
    heats = tuple(heat(layer, str(state)) for state in layer.data["state"].values)
    notes = [one.note for one in heats]
    reading = "Units are sorted, longest memory on top; the colours are powers of ten."
    shown = [one for one in heats if not one.note]
    if any(one.whole for one in shown):
        reading = f"Units are sorted, the largest on top; of the whole loss: {WHOLE}"
    pools = [
        (one.step_pool, one.unit_pool) for one in shown if (one.step_pool, one.unit_pool) != (1, 1)
    ]
    if pools:
        steps, units = pools[0]
        reading += f" A cell is the largest of {count_words(steps, 'step')} × {count_words(units, 'unit')}."
    return States(
        message=_message(layer, "whole loss" if shown[0].whole else "loss") if shown else "",
        reading=reading,
        note="" if shown else notes[0],
        heats=heats,
        labels=heats[0].labels,
    )


def _message(layer: LayerAnalysis, whose: str) -> str:
    """How many units of the main state still have a gradient at the far end; of whose gradient."""
    raw = layer.data["log10_grad"].sel(state=layer.main_state).transpose("unit", "back").values
    raw = raw[~np.isnan(raw).all(axis=1)]
    known = np.flatnonzero(~np.isnan(raw).all(axis=0))
    if not len(known):
        return f"∂L/∂{layer.main_state} is not finite"
    far = int(known[-1])
    if far == 0:
        return "the loss reads a step at which the layer starts, or starts anew: there is none before it"
    left = int((raw[:, far] >= GONE_DECADES).sum())
    steady = int((np.isnan(raw) | (raw >= CARRIED_DECADES)).all(axis=1).sum())
    unit = "cell" if layer.main_state == "c" else "unit"
    grown = int((raw[:, far] >= GREW_DECADES).sum())
    if 2 * grown > len(raw):
        have = "has" if grown == 1 else "have"
        return (
            f"{grown} of {count_words(len(raw), unit)} {have} {GREW_WORDS} times the {whose}'s gradient "
            f"or more {count_words(far, 'step')} back"
        )
    have = "has" if left == 1 else "have"
    said = (
        f"{left} of {count_words(len(raw), unit)} {have} {GONE_WORDS} of the {whose}'s gradient left "
        f"{count_words(far, 'step')} back"
    )
    # the headline of the overview counts these
    keeps = "keeps" if steady == 1 else "keep"
    return f"{said}; {steady} {keeps} {CARRIED_WORDS} all the way" if left else said


def draw(axes: Sequence[Axes], states: States) -> None:
    """Every state's heat, one above the other."""
    pairs = list(zip(axes, states.heats, strict=False))
    for number, (ax, one) in enumerate(pairs):
        draw_heat(ax, one, label=number == len(pairs) - 1)
        ax.set_ylabel(f"∂L/∂{one.state}", labelpad=2, parse_math=False)
        ax.tick_params(labelbottom=number == len(pairs) - 1)
