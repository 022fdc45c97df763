"""Where the last checkpoint of every run stands, for the conditions of --fail-on."""

from __future__ import annotations

import math
from typing import Any

from gradflow.analysis import Gain, Rate
from gradflow.analyzer.paced import Paced
from gradflow.history import History


def standings(history: History) -> list[Paced]:
    """Every layer of every run at its last checkpoint that was measured, named by both.

    Args:
        history: of a sweep.
    """
    found = []
    for run, one in history.runs.items():
        good = [place for place, words in enumerate(one.data["failed"].values) if not words]
        for layer in one.layers if good else ():
            row = one.data.isel(step=good[-1]).sel(layer=layer)
            found.append(_standing(f"{run} {layer}".strip(), row))
    return found


def _standing(name: str, row: Any) -> Paced:
    def number(what: str) -> float:
        return float(row[what])

    def whole(what: str) -> int | None:
        return int(number(what)) if math.isfinite(number(what)) else None

    labels = ("not finite",) * (number("nonfinite") == 1)
    labels += ("not settled",) * (number("rate_settled") == 0)
    rate, gain = (
        Rate(*(number(f"{what}{end}") for end in ("", "_low", "_high")))
        for what in ("rate", "gain")
    )
    return Paced(
        name=name,
        verdict=str(row["verdict"].item()),
        gain=Gain(gain.value, gain.low, gain.high, whole("gain_steps") or 0),
        rate=rate,
        settling=number("rate_settling"),
        settled=number("rate_settled") != 0,
        half_life=number("half_life"),
        horizon=whole("horizon"),
        searched=whole("searched") or 0,
        span=whole("span") or 0,
        sequences=whole("sequences_rated") or 0,
        channels=whole("channels"),
        labels=labels,
    )
