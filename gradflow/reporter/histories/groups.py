"""Groups of runs that differ in one thing, a seed: their curves, the mean over them, a row for each group.

The runs of one group are the unit of every interval: a seed counts once, however many sequences it was
measured on.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from gradflow.analysis import Rate
from gradflow.analysis.results import mean_interval
from gradflow.errors import InputError, must_be
from gradflow.history import History
from gradflow.reporter.histories.across import Shared
from gradflow.reporter.histories.course import Course, courses
from gradflow.reporter.histories.lines import Curve, Lines, Panel
from gradflow.reporter.histories.story import farthest, updates
from gradflow.reporter.numbers import count_words, rate_words
from gradflow.reporter.scale import SERIES


@dataclass(frozen=True)
class RunGroup:
    """Runs of one layer that differ in one label of their folders, and in nothing else."""

    name: str  # what their folders have in common; "" where there is one group
    layer: str  # its name
    by: str  # the label that they differ in
    runs: tuple[Course, ...]  # one of each value of it

    @property
    def said(self) -> str:
        """The group with how many runs it has, in words."""
        return f"{self.name or 'all'} ({count_words(len(self.runs), self.by)})"


def groups_of(shown: Sequence[Course], by: str = "seed") -> list[RunGroup]:
    """The groups of some runs, layer by layer.

    Args:
        shown: courses of runs.
        by: the label that the runs of one group differ in, as in the folder "lstm/seed=3"; where no run
            has it, all runs are one group.

    Raises:
        InputError: no run has the label, and it is not the usual one.
    """
    if not isinstance(by, str) or not by.isidentifier():
        raise InputError(must_be("by", "a word such as 'seed'", repr(by), "leave it out for seed"))
    value = r"(\d+(\.\d+)?(?![A-Za-z0-9])|(?<=[=/])[^/_]+)"
    label = re.compile(rf"(?<![A-Za-z0-9]){by}[=_/-]?{value}", re.IGNORECASE)
    if not any(label.search(one.run) for one in shown):
        if by not in ("seed", "run"):
            known = ", ".join(dict.fromkeys(one.run for one in shown)) or "no run"
            advice = "the folders of a sweep name it, as in 'width=8/seed=0'"
            raise InputError(must_be("by", f"a label of the runs {known}", repr(by), advice))
        label, by = re.compile(r".+"), "run"
    found: dict[tuple[str, str], list[Course]] = {}
    for one in shown:
        rest = re.sub(r"[/_\- ]{2,}", "/", label.sub("", one.run)).strip("/_- ")
        found.setdefault((one.layer, rest), []).append(one)
    return [RunGroup(name, layer, by, tuple(runs)) for (layer, name), runs in found.items()]


# ------------------------------------------------------------------------------------- the rows


@dataclass(frozen=True)
class GroupRow:
    """Where a group of runs stands at the last checkpoint of each."""

    group: RunGroup  # its runs
    verdicts: dict[str, int]  # verdict -> how many of them have it
    rates: np.ndarray  # (n,) nats per step, of the runs whose rate may be told
    reaches: np.ndarray  # (n,) log10 of the steps that each reaches
    most: float  # log10 of all the steps that there are to reach
    settling: float = 0.0  # nats per step that these rates may be off alike

    @property
    def verdict(self) -> str:
        """What most of them are."""
        return max(self.verdicts, key=lambda one: self.verdicts[one]) if self.verdicts else ""

    @property
    def verdict_words(self) -> str:
        """The verdicts of all, the most frequent first."""
        count = len(self.group.runs)
        return ", ".join(f"{one or 'none'} {n} of {count}" for one, n in self.verdicts.items())

    @property
    def rate(self) -> Rate:
        """Mean over the runs, with its interval over them; NaN where no rate may be told."""
        if not len(self.rates):
            return Rate(math.nan, math.nan, math.nan)
        return mean_interval(self.rates).wider(self.settling)

    @property
    def reach(self) -> Rate:
        """Steps: geometric mean over the runs, with its interval over them."""
        if not len(self.reaches):
            return Rate(math.nan, math.nan, math.nan)
        found = mean_interval(self.reaches)
        return Rate(*(10.0 ** np.clip(end, 0.0, self.most) for end in vars(found).values()))

    @property
    def numbers(self) -> dict[str, object]:
        """All of it, for tables and scripts."""
        ends = {"rate": self.rate, "reach": self.reach}
        return {
            "group": self.group.name,
            "layer": self.group.layer,
            "by": self.group.by,
            "runs": len(self.group.runs),
            "verdicts": self.verdict_words,
            **{f"{name}{end}": getattr(one, end.strip("_") or "value")
               for name, one in ends.items() for end in ("", "_low", "_high")},
        }  # fmt: skip


def reach_words(reach: Rate) -> str:
    """Steps that a group reaches, with their interval.

    >>> reach_words(Rate(12.4, 10.1, 15.2)), reach_words(Rate(3.0, math.nan, math.nan))
    ('12 [10, 15]', '3')
    """
    if math.isnan(reach.value):
        return "not measured"
    ends = f" [{reach.low:.0f}, {reach.high:.0f}]" if math.isfinite(reach.low) else ""
    return f"{reach.value:.0f}{ends}"


GROUP_COLUMNS: dict[str, Callable[[GroupRow], str]] = {  # heading -> what stands below it
    "group": lambda row: row.group.said,
    "layer": lambda row: row.group.layer,
    "verdict at the\nlast checkpoint": lambda row: row.verdict_words,
    "rate ± 95 %\nnats per step": lambda row: rate_words(row.rate),
    "steps reached\n[95 %]": lambda row: reach_words(row.reach),
}


def rows_of(history: History, by: str = "seed") -> list[GroupRow]:
    """A row for every group and layer, the one that reaches least first.

    Args:
        history: of a sweep.
        by: the label that the runs of one group differ in.
    """
    rows = [row_of(group) for group in groups_of(courses([history]), by)]
    return sorted(
        rows, key=lambda row: math.inf if math.isnan(row.reach.value) else row.reach.value
    )


def row_of(group: RunGroup) -> GroupRow:
    """Where a group stands at the last checkpoint of each of its runs."""
    lasts = [(one, at) for one in group.runs if (at := _last(one)) is not None]
    verdicts = Counter(str(one.verdict[at]) for one, at in lasts)
    rates, off, reaches = (
        np.array([values(one)[at] for one, at in lasts]) for values in (_rates, _off, _reaches)
    )
    known = np.isfinite(rates)
    return GroupRow(
        group=group,
        verdicts=dict(verdicts.most_common()),
        rates=rates[known],
        reaches=reaches[np.isfinite(reaches)],
        most=_most(group),
        settling=float(off[known].mean()) if known.any() else 0.0,
    )


def _last(one: Course) -> int | None:
    """The place of the last checkpoint that was measured."""
    places = np.flatnonzero((one.verdict != "") | ~np.isnan(_reaches(one)))
    return int(places[-1]) if len(places) else None


def _rates(one: Course) -> np.ndarray:
    """(N,) the rates that may be told."""
    told = one.numbers["rate_settled"] != 0
    return np.where(told & np.isfinite(one.numbers["rate"]), one.numbers["rate"], np.nan)


def _off(one: Course) -> np.ndarray:
    """(N,) nats per step that these may be off, alike in all sequences; 0 where it is not known."""
    return np.nan_to_num(one.numbers["rate_settling"])


def _most(group: RunGroup) -> float:
    """log10 of all the steps that there are to reach."""
    return math.log10(max([1.0, *(float(farthest(one).max()) for one in group.runs)]))


def _reaches(one: Course) -> np.ndarray:
    """(N,) log10 of the steps that are reached, of all that there are at most."""
    steps = np.minimum(one.reach, farthest(one))  # NaN stays
    return np.log10(np.maximum(steps, 1.0))


# ------------------------------------------------------------------------------------ the picture


def prepare(group: Sequence[RunGroup], shared: Shared) -> Lines:
    """Rate and reach of all runs of a layer against the training step, with the mean of each group."""
    rates, reaches = (
        [
            curve
            for place, one in enumerate(group)
            for curve in _curves(one, values, SERIES[place % len(SERIES)])
        ]
        for values in (_rates, _reaches)
    )
    spans = np.concatenate([one.numbers["span"] for part in group for one in part.runs])
    span = float(np.nanmax(spans)) if np.isfinite(spans).any() else math.nan
    levels = () if math.isnan(span) else ((math.log10(span), f"span {span:.0f}"),)
    panels = (
        _panel("rate,\nnats per step", rates, ((0.0, ""),), 0.02),
        replace(_panel("steps reached", reaches, levels, 0.3), steps=True),
    )
    known = any(np.isfinite(curve.values).any() for panel in panels for curve in panel.curves)
    units = group[0].by
    return Lines(
        message=_message(group) if known else "",
        reading=(
            f"A thin line is one {units}; a thick one the mean of a group at each training step that two or "
            f"more of its {units}s have, with its 95 % interval over {units}s: a {units} is the unit, not a "
            "sequence; of rates it holds what so few steps leave open. Steps reached are those after which "
            "the gain of the best direction is gone, at most as many as were searched; their mean is that of "
            "the logarithm."
        ),
        note="" if known else "No run was measured.",
        course=group[0].runs[0],
        shared=shared,
        strips=(),
        panels=panels,
        changes=False,
    )


def _panel(
    what: str, curves: Sequence[Curve], levels: tuple[tuple[float, str], ...], least: float
) -> Panel:
    """A panel as high as what is drawn needs; a level that would leave half of it empty is left out.

    Intervals of few runs are wide: at either end they get no more room than the curves themselves.
    """
    values, ends = (
        np.concatenate([some[np.isfinite(some)] for some in every if some is not None] or [np.zeros(1)])
        for every in ([one.values for one in curves],
                      [end for one in curves for end in (one.low, one.high)])
    )  # fmt: skip
    values = values if len(values) else np.zeros(1)
    low, high = float(values.min()), float(values.max())
    room = max(high - low, least)
    low = max(low - room, float(min([low, *ends])))
    high = min(high + room, float(max([high, *ends])))
    near = tuple(one for one in levels if low - room <= one[0] <= high + room)
    low, high = min([low, *(at for at, _ in near)]), max([high, *(at for at, _ in near)])
    margin = 0.08 * max(high - low, least)
    return Panel(what, tuple(curves), (low - margin, high + margin), near, high=1.7)


def _curves(group: RunGroup, values: Callable[[Course], np.ndarray], colour: str) -> list[Curve]:
    """The runs of a group, and their mean where there are several."""
    each = [(one.step, values(one)) for one in group.runs]
    if len(each) == 1:
        return [Curve(group.said, each[0][1], colour, step=each[0][0])]
    thin = [Curve("", found, colour, step=step, faint=True) for step, found in each]
    steps = np.unique(np.concatenate([step for step, _ in each]))
    rows = np.full((2, len(each), len(steps)), np.nan)  # the values of each run, and what is off
    for place, one in enumerate(group.runs):
        both = values(one), _off(one) * (values is _rates)
        rows[:, place, np.searchsorted(steps, one.step)] = both
    means = [_mean(found, off) for found, off in rows.transpose(2, 0, 1)]
    mean, low, high = np.array([(one.value, one.low, one.high) for one in means]).T
    if values is _reaches:  # no interval reaches further than there are steps
        low, high = np.clip([low, high], 0.0, _most(group))
    return [*thin, Curve(group.said, mean, colour, step=steps, low=low, high=high)]


def _mean(values: np.ndarray, off: np.ndarray) -> Rate:
    """Mean over the runs that have a value, two or more, wider by what these are off alike."""
    known = np.isfinite(values)
    if known.sum() < 2:
        return Rate(math.nan, math.nan, math.nan)
    return mean_interval(values[known]).wider(float(off[known].mean()))


def _message(groups: Sequence[RunGroup]) -> str:
    """How far each group reaches at the end, the farthest first."""
    rows = sorted((row_of(one) for one in groups), key=lambda row: -np.nan_to_num(row.reach.value))
    said = [" ".join(filter(None, [row.group.name, f"{row.reach.value:.0f}"])) for row in rows[:3]]
    more = f" and {len(rows) - 3} more" if len(rows) > 3 else ""
    counts = {len(one.runs) for one in groups}
    over = f" (means of {count_words(max(counts), groups[0].by)})" if counts != {1} else ""
    over = over if len(counts) == 1 else over.replace("of ", "of up to ")
    return f"steps reached at {_when(groups)}{over}: {', '.join(said)}{more}"


def _when(groups: Sequence[RunGroup]) -> str:
    """The training step of the last checkpoint that was measured, where it is that of all runs."""
    runs = [one for group in groups for one in group.runs]
    last = {int(one.step[at]) for one in runs if (at := _last(one)) is not None}
    kinds = {one.counted_in for one in runs}
    if len(last) == len(kinds) == 1:
        return f"{kinds.pop()} {updates(last.pop())}"
    return "the last checkpoint of each run"
