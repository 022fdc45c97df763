"""Several trainings on one scale: a table, a picture, and what differs between their histories."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from gradflow import reporter
from gradflow.errors import InputError, must_be
from gradflow.history import History
from gradflow.reporter import Course, course, far_words, number_words, reach, updates


@dataclass(frozen=True)
class Difference:
    """One layer in two trainings."""

    layer: str  # its name
    before: str  # the first run
    after: str  # the other
    verdict_before: str  # at the last probe
    verdict_after: str  # the same of the other
    best_before: float  # steps, the farthest that it reached at any probe, smoothed over a few
    best_after: float  # the same of the other
    last_before: float  # steps that it reached at the last probe
    last_after: float  # the same of the other
    rate_before: float  # nats per step at the last probe
    rate_after: float  # the same of the other
    apart: bool | None  # whether the 95 % intervals of these rates do not meet; None if unknown
    sentence: str  # all that in words


def differences(runs: Mapping[str, History]) -> list[Difference]:
    """What differs between the first training and each other one, layer by layer, paired by name.

    Numbers are those of single probes, so that a difference is told with both, never as an effect.
    """
    (first, before), *others = runs.items()
    return [
        _difference(first, course(before, layer), name, course(after, layer))
        for name, after in others
        for layer in before.layers
        if layer in after.layers
    ]


def _difference(first: str, before: Course, second: str, after: Course) -> Difference:
    ways = [_reached(one) for one in (before, after)]
    verdicts = [_last_verdict(one) for one in (before, after)]
    rates = [_last_rate(one) for one in (before, after)]
    apart = None
    if not any(math.isnan(end) for rate in rates for end in rate):
        apart = rates[0][2] < rates[1][1] or rates[1][2] < rates[0][1]
    made = Difference(
        layer=before.layer,
        before=first,
        after=second,
        verdict_before=verdicts[0],
        verdict_after=verdicts[1],
        best_before=ways[0][0],
        best_after=ways[1][0],
        last_before=ways[0][1],
        last_after=ways[1][1],
        rate_before=rates[0][0],
        rate_after=rates[1][0],
        apart=apart,
        sentence="",
    )
    words = _sentence(made, [ways[0][2], ways[1][2]])
    return Difference(**asdict(made) | {"sentence": words})


def _reached(one: Course) -> tuple[float, float, str]:
    """Steps at best and at the last probe, and both in words."""
    way = reach(one)
    if way is None:
        return math.nan, math.nan, "not measured"
    top = int(np.nanargmax(way.steps))
    best, last = float(way.steps[top]), float(way.steps[way.last])
    words = f"{far_words(one, top, best)} at best (update {updates(one.step[top])})"
    return best, last, f"{words}, {far_words(one, way.last, last)} at the end"


def _last_verdict(one: Course) -> str:
    told = one.verdict[one.verdict != ""]
    return str(told[-1]) if len(told) else ""


def _last_rate(one: Course) -> tuple[float, float, float]:
    """The last rate that may be told, with its interval."""
    numbers = one.numbers
    known = np.flatnonzero(np.isfinite(numbers["rate"]) & (numbers["rate_settled"] != 0))
    if not len(known):
        return math.nan, math.nan, math.nan
    value, low, high = (float(numbers[n][known[-1]]) for n in ("rate", "rate_low", "rate_high"))
    return value, low, high


def _sentence(one: Difference, reached: list[str]) -> str:
    if one.verdict_before == one.verdict_after:
        verdicts = f"{one.verdict_before or 'no verdict'} at the end of both"
    else:
        words = [verdict or "no verdict" for verdict in (one.verdict_before, one.verdict_after)]
        verdicts = f"{words[0]} → {words[1]} at the end"
    said = (
        f"{one.layer}, {one.before} → {one.after}: {verdicts}; reached {reached[0]} → {reached[1]}"
    )
    if one.apart is None:
        return said
    rates = f"{number_words(one.rate_before)} → {number_words(one.rate_after)} per step"
    meet = "its 95 % intervals do not meet" if one.apart else "its 95 % intervals meet"
    return f"{said}; rate {rates}, {meet}"


def alone(runs: Mapping[str, History]) -> list[str]:
    """A sentence on every layer that is not in all runs."""
    notes = []
    for name, history in runs.items():
        only = [
            layer
            for layer in history.layers
            if not any(layer in other.layers for key, other in runs.items() if key != name)
        ]
        if only:
            notes.append(f"{', '.join(only)} {'is' if len(only) == 1 else 'are'} in {name} only")
    return notes


def compare_histories(runs: Mapping[str, History], folder: Path, *, force: bool = False) -> str:
    """Compare trainings; write comparison.png, comparison.csv, changes.csv; return what to print."""
    for name, history in runs.items():
        if not len(history) or not history.layers:
            raise InputError(
                must_be(name, "a history with probes", "none", "wait for the first one")
            )
    found = differences(runs)
    tables = []
    for name, history in runs.items():
        table = history.frame("layers")
        table.insert(0, "run", name)
        tables.append(table)
    with reporter.whole_folder(folder, force=force) as work:
        figure = reporter.plot_histories(list(runs.values()), names=list(runs))
        (work / "comparison.png").write_bytes(reporter.png(figure))
        pd.concat(tables, ignore_index=True).to_csv(work / "comparison.csv", index=False)
        rows = pd.DataFrame([asdict(one) for one in found])
        rows.reindex(columns=list(Difference.__dataclass_fields__)).to_csv(
            work / "changes.csv", index=False
        )
    sentences = [one.sentence for one in found] or [
        "Nothing is compared: no layer of one training is in another, and they are paired by name."
    ]
    reporter.render_histories(runs, [*sentences, *alone(runs)])
    return f"picture: {folder / 'comparison.png'}"
