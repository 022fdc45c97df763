"""Walls: few steps at which most of the gradient is lost."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from gradflow.analysis import Finding
from gradflow.analyzer.causes.remedies import inputs_at
from gradflow.analyzer.evidence import Evidence, counted, number
from gradflow.limits import WALL_LEAST, WALL_LOSS, WALL_STEPS


def walls(e: Evidence) -> Iterator[Finding]:
    """At most a tenth of the steps account for half of what the leading direction loses."""
    if not e.fades:
        return
    growth = e.data["step_growth"].values
    known = int((~np.isnan(growth)).sum())
    lost = np.where(growth < 0, -growth, 0.0)  # NaN compares false
    steps = _highest(lost)
    if (
        known < WALL_LEAST
        or len(steps) > max(1, int(WALL_STEPS * known))
        or not _late_enough(e, steps)
    ):
        return
    within, total = float(lost[steps].sum()), float(lost.sum())
    if within < WALL_LOSS * math.log(10):
        return
    share = 1.0 if math.isinf(total) else within / total
    noun, verb = ("step", "accounts") if len(steps) == 1 else ("steps", "account")
    named = ", ".join(str(step + 1) for step in steps[:5]) + (", …" if len(steps) > 5 else "")
    yield Finding(
        name="walls",
        layer=e.track.name,
        message=f"{len(steps)} of {counted(known, 'step')} {verb} for {share:.0%} of what is lost: "
        f"{_decades(within)}",
        where=f"{noun} {named}",
        value=share,
        threshold=WALL_LOSS,
        basis=f"{100 * WALL_LOSS:g} % of the loss within {100 * WALL_STEPS:g} % of the steps",
        severity=-within / math.log(10),
        advice="look at what is read at these steps: an input far larger than the others, a token "
        "that shuts the gates, a reset",
        code=inputs_at(e, steps[:5]),
    )


def _highest(lost: np.ndarray) -> list[int]:
    """The fewest steps that lose half of everything, and all that are half as high as these."""
    order = np.argsort(-lost, kind="stable")
    if math.isinf(lost[order[0]]):
        return [int(step) for step in np.flatnonzero(np.isinf(lost))]
    reached = np.cumsum(lost[order]) >= WALL_LOSS * lost.sum()
    least = lost[order[int(reached.argmax())]]
    return [int(step) for step in np.flatnonzero(lost >= WALL_LOSS * least)] if least > 0 else []


def _late_enough(e: Evidence, steps: list[int]) -> bool:
    """Whether the steps are no mere beginning: a layer that is dead at once has no wall."""
    leading = e.growth.log_growth[..., 0].numpy()
    return bool(steps) and not np.isneginf(leading[0]).any()


def _decades(lost: float) -> str:
    if math.isinf(lost):
        return "an exact zero"
    return f"{number(lost / math.log(10))} decades"
