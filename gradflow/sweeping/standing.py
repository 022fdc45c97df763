"""Where the last checkpoint of every run stands, for the conditions of --fail-on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gradflow.analysis import Rate
from gradflow.conditions import Condition
from gradflow.history import History


@dataclass(frozen=True)
class SweptLayer:
    """The last checkpoint of one layer of one run, as a condition of --fail-on reads it."""

    name: str  # of run and layer
    verdict: str  # one of gradflow.limits.VERDICTS, "" without one
    labels: tuple[str, ...]  # "not finite", "not settled"
    rate: Rate  # nats per step
    half_life: float  # steps
    horizon: int | None  # steps; None where it was not reached
    searched: int  # lags
    channels: int | None  # where they were counted
    never_gone: bool  # whether the gain never falls below its limit
    pace: float  # nats per step over the span


def held_in(history: History, conditions: Sequence[Condition]) -> list[str]:
    """A sentence for every run and layer whose last checkpoint holds a condition.

    Args:
        history: of a sweep.
        conditions: of --fail-on.
    """
    found = []
    for run, one in history.runs.items() if conditions else ():
        data = one.data
        good = [place for place, words in enumerate(data["failed"].values) if not words]
        for layer in one.layers if good else ():
            standing = _standing(
                f"{run} {layer}".strip(), data.isel(step=good[-1]).sel(layer=layer)
            )
            found += [
                f"{standing.name}: {condition.text}{condition.measured(standing)}"
                for condition in conditions
                if condition.holds(standing)
            ]
    return found


def _standing(name: str, one: Any) -> SweptLayer:
    def number(what: str) -> float:
        return float(one[what])

    labels = ("not finite",) * (number("nonfinite") == 1)
    labels += ("not settled",) * (number("rate_settled") == 0)
    horizon, channels, steps = number("horizon"), number("channels"), number("gain_steps")
    return SweptLayer(
        name=name,
        verdict=str(one["verdict"].item()),
        labels=labels,
        rate=Rate(number("rate"), number("rate_low"), number("rate_high")),
        half_life=number("half_life"),
        horizon=int(horizon) if math.isfinite(horizon) else None,
        searched=0 if math.isnan(number("searched")) else int(number("searched")),
        channels=None if math.isnan(channels) else int(channels),
        never_gone=horizon == math.inf,
        pace=number("gain") / steps if steps > 0 else math.nan,
    )
