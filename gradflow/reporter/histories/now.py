"""Where a training stands: the last numbers of every layer in words, for page, summary and terminal."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from gradflow.analysis import Rate
from gradflow.reporter.histories.course import Course
from gradflow.reporter.histories.story import far_words, reach, sentence
from gradflow.reporter.numbers import rate_words, steps_words

WORST = ("dead", "exploding", "vanishing", "inconclusive", "stable", "")


@dataclass(frozen=True)
class Now:
    """One layer at the last probe that measured it."""

    course: Course  # its whole training
    place: int  # of that probe
    verdict: str  # "" without one
    sentence: str  # what happened to it
    rate: str  # nats per step, with its interval, in words
    half_life: str  # steps, in words
    horizon: str  # steps, in words
    share: float  # how much of the distance of interest is reached, in percent
    reached: str  # the same in words


def now(course: Course) -> Now:
    """The last numbers of a layer."""
    place = _last(course)
    numbers = {name: float(values[place]) for name, values in course.numbers.items()}
    told = numbers["rate_settled"] != 0
    rate = Rate(*(numbers[name] for name in ("rate", "rate_low", "rate_high")))
    way = reach(course)
    share, reached = 0.0, "not measured"
    if way is not None and way.last >= place:
        every = _span(course)
        share = 100 * min(1.0, float(way.steps[way.last]) / every) if every else 0.0
        reached = f"reaches {far_words(course, way.last, float(way.steps[way.last]))}"
    return Now(
        course=course,
        place=place,
        verdict=str(course.verdict[place]),
        sentence=sentence(course),
        rate=rate_words(rate) if told else "not settled",
        half_life=steps_words(numbers["half_life"]) if told else "none",
        horizon=horizon_words(numbers["horizon"], numbers["searched"]),
        share=round(share, 1),
        reached=reached,
    )


def _last(course: Course) -> int:
    """The place of the last probe that tells anything of the layer."""
    known = (course.verdict != "") | ~np.isnan(course.profile).all(axis=1) | course.bad
    places = np.flatnonzero(known)
    return int(places[-1]) if len(places) else len(course.step) - 1


def _span(course: Course) -> float:
    spans = course.numbers["span"]
    known = spans[~np.isnan(spans)]
    if len(known):
        return max(1.0, float(known[-1]) - 1)
    lags = course.lag[~np.isnan(course.profile).all(axis=0)]
    return float(lags[-1]) if len(lags) else 0.0


def horizon_words(horizon: float, searched: float) -> str:
    """Steps until the gain is gone; beyond what was searched, or never.

    >>> horizon_words(84.0, 99.0), horizon_words(math.inf, 99.0), horizon_words(math.nan, 99.0)
    ('84', 'never', '> 99')
    """
    if math.isnan(horizon):
        return f"> {searched:.0f}" if searched > 0 else "none"
    return steps_words(horizon if math.isinf(horizon) else int(horizon))


def worst_first(layers: list[Now]) -> list[Now]:
    """Dead and exploding ones first, stable ones last, else in the order in which they ran.

    Of several runs the one that reaches least comes first.
    """
    return sorted(
        layers, key=lambda one: (WORST.index(one.verdict), one.share * bool(one.course.run))
    )
