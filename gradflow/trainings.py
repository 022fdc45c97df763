"""Several trainings on one scale: a table, a picture, and what differs between their histories."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import pandas as pd

from gradflow import reporter
from gradflow.analysis import Rate
from gradflow.analysis.results import welch
from gradflow.comparison import Comparison
from gradflow.errors import InputError
from gradflow.history import History
from gradflow.reporter import Course, GroupRow, course, far_words, number_words, reach, updates


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
    told = [one.verdict[one.verdict != ""] for one in (before, after)]
    verdicts = [str(some[-1]) if len(some) else "" for some in told]
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
    words = f"{far_words(one, top, best)} at best ({one.counted_in} {updates(one.step[top])})"
    return best, last, f"{words}, {far_words(one, way.last, last)} at the end"


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


@dataclass(frozen=True)
class GroupDifference:
    """One layer in two groups of runs; intervals are Welch's, over the runs: a seed is the unit."""

    layer: str  # its name
    by: str  # what the runs of one group differ in
    before: str  # the first group
    after: str  # the other
    runs_before: int  # how many it has
    runs_after: int  # the same of the other
    rate_difference: float  # after − before, nats per step
    rate_low: float  # of that; NaN where it is not known
    rate_high: float  # upper end
    reach_ratio: float  # steps reached, after ÷ before
    reach_low: float  # of that
    reach_high: float  # upper end
    among: int  # how many intervals there are: each is so wide that all hold
    larger: bool | None  # whether either is beyond chance; None where that is not known
    sentence: str  # all that in words


def group_differences(rows: Sequence[GroupRow]) -> list[GroupDifference]:
    """What differs between the first group and each other one, layer by layer, paired by name.

    Args:
        rows: of groups; of two or more layers those of each in the same order.

    >>> from gradflow.history import History, LayerProbe, Probe, Source
    >>> probes = [Probe(1, {}, {"l0": LayerProbe({"rate": (n + 1) * -0.1, "horizon": 9.0, "searched": 50.0})},
    ...                 source=Source("a.pt", f"{cell}/seed={seed}"))
    ...           for n, cell in enumerate(("rnn", "lstm")) for seed in (0, 1)]
    >>> from gradflow.reporter import rows_of
    >>> (one,) = group_differences(rows_of(History.of("Net", probes)))
    >>> one.before, one.after, round(one.rate_difference, 3)
    ('rnn', 'lstm', -0.1)
    """
    firsts: dict[str, GroupRow] = {}
    pairs = []
    for row in rows:
        first = firsts.setdefault(row.group.layer, row)
        pairs += [] if first is row else [(first, row)]
    return [_between(first, row, 2 * len(pairs)) for first, row in pairs]


def _between(first: GroupRow, other: GroupRow, among: int) -> GroupDifference:
    means = [[float(values.mean()) if len(values) else math.nan for values in (row.rates, row.reaches)]
             for row in (first, other)]  # fmt: skip
    rate = Rate(means[1][0] - means[0][0], *welch(first.rates, other.rates, among))
    reach = Rate(means[1][1] - means[0][1], *welch(first.reaches, other.reaches, among))
    rate = rate.wider(first.settling, other.settling)
    beyond = [not one.low <= 0 <= one.high for one in (rate, reach) if not math.isnan(one.low)]
    made = GroupDifference(
        layer=first.group.layer,
        by=first.group.by,
        before=first.group.name,
        after=other.group.name,
        runs_before=len(first.group.runs),
        runs_after=len(other.group.runs),
        rate_difference=rate.value,
        rate_low=rate.low,
        rate_high=rate.high,
        reach_ratio=10**reach.value,
        reach_low=10**reach.low,
        reach_high=10**reach.high,
        among=among,
        larger=any(beyond) if beyond else None,
        sentence="",
    )
    return replace(made, sentence=_group_sentence(made, first, other))


def _group_sentence(one: GroupDifference, first: GroupRow, other: GroupRow) -> str:
    verdicts = f"{first.verdict_words} → {other.verdict_words}"
    said = f"{one.layer}, {first.group.said} → {other.group.said}: {verdicts}"
    interval = f"95 % interval over {one.by}s for all {one.among} at once"
    if math.isfinite(one.rate_difference):
        way = "rises" if one.rate_difference > 0 else "falls"
        said += f"; the rate {way} by {number_words(abs(one.rate_difference))} per step"
        if not math.isnan(one.rate_low):
            said += f", {interval} [{one.rate_low:+.3g}, {one.rate_high:+.3g}]".replace("-", "−")
    if math.isfinite(one.reach_ratio):
        said += f"; {number_words(one.reach_ratio)} times the steps reached"
        if not math.isnan(one.reach_low):
            said += f", {interval} [{number_words(one.reach_low)}, {number_words(one.reach_high)}]"
    if one.larger is None:
        return f"{said}; without an interval: it takes two {one.by}s or more in each"
    return f"{said}: {'more' if one.larger else 'no more'} than {one.by}s differ by chance"


def compared(runs: Mapping[str, History], by: str = "seed") -> Comparison:
    """What differs between trainings, or between the groups of one or several sweeps.

    Args:
        runs: by name, the first is the one that the others are compared with.
        by: of sweeps, what the runs of one group differ in.

    Raises:
        InputError: a history has no probe, or there is one group of runs only.
    """
    swept = any(history.swept for history in runs.values())
    for name, history in runs.items():
        history.require_probes(name)
    return _of_groups(runs, by) if swept else _of_trainings(runs)


def _of_groups(runs: Mapping[str, History], by: str) -> Comparison:
    shown = reporter.courses(list(runs.values()), names=list(runs) if len(runs) > 1 else None)
    rows = [reporter.row_of(group) for group in reporter.groups_of(shown, by)]
    found = group_differences(rows)
    if not found:
        raise InputError(
            f"there is one group of runs, {rows[0].group.said}, and nothing to compare it with; give "
            "another sweep, or --by another label of the folders"
        )
    return Comparison(
        runs=runs,
        table=pd.DataFrame([row.numbers for row in rows]),
        changes=pd.DataFrame([asdict(one) for one in found]),
        sentences=tuple(one.sentence for one in found),
        notes=tuple(_other_inputs(runs)),
        numbers=reporter.of_groups(rows),
        drawn=lambda: reporter.draw_courses("groups", shown, by=by),
    )


def _other_inputs(runs: Mapping[str, History]) -> list[str]:
    """A sentence for each sweep that was measured on other batches than the first."""
    on = {name: _input(history) for name, history in runs.items()}
    (first, before), *others = on.items()
    return [
        f"{first} was measured on {before}, {name} on {after}: the input decides the rate, so a difference "
        "may be the input's; give both the same --input"
        for name, after in others
        if after != before
    ]


def _input(history: History) -> str:
    named = history.header.get("batches")
    if not isinstance(named, list) or not named:
        return "probes"
    return str(named[0]) if len(named) == 1 else f"{len(named)} batches from {named[0]} on"


def _of_trainings(runs: Mapping[str, History]) -> Comparison:
    found = differences(runs)
    tables = [history.frame("layers") for history in runs.values()]
    for name, table in zip(runs, tables, strict=True):
        table.insert(0, "run", name)
    rows = pd.DataFrame([asdict(one) for one in found])
    sentences = [one.sentence for one in found] or [
        "Nothing is compared: no layer of one training is in another, and they are paired by name."
    ]
    return Comparison(
        runs=runs,
        table=pd.concat(tables, ignore_index=True),
        changes=rows.reindex(columns=list(Difference.__dataclass_fields__)),
        sentences=(*sentences, *alone(runs)),
        notes=(),
        numbers=reporter.of_histories(runs),
        drawn=lambda: reporter.plot_histories(list(runs.values()), names=list(runs)),
    )
