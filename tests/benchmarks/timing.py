"""Timing in pairs: two things in turn, A B A B …, and the ratio pair by pair.

A shared machine drifts by tens of percent within a minute; the ratio of neighbours does not.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Work = Callable[[], object]


@dataclass(frozen=True)
class Ratio:
    """Seconds of two things and their ratio, medians with quartiles over the pairs."""

    median: float
    low: float  # quartile
    high: float
    seconds: float  # median of the first
    against: float  # median of the second
    pairs: int


def seconds(work: Work) -> float:
    """Wall-clock seconds of one run, without a garbage collection in between."""
    gc.disable()
    try:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    finally:
        gc.enable()


def in_pairs(work: Work, against: Work, *, pairs: int, warm_up: bool = True) -> Ratio:
    """Run both in turn and compare them pair by pair; which goes first alternates."""
    if warm_up:
        work()
        against()
    gc.collect()
    first, second = [], []
    for number in range(pairs):
        if number % 2:
            second.append(seconds(against))
            first.append(seconds(work))
        else:
            first.append(seconds(work))
            second.append(seconds(against))
    ratios = np.array(first) / np.array(second)
    low, median, high = np.quantile(ratios, [0.25, 0.5, 0.75])
    return Ratio(
        float(median),
        float(low),
        float(high),
        float(np.median(first)),
        float(np.median(second)),
        pairs,
    )


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The slope of ln value against ln size: time grows as size to this power.

    >>> round(exponent([1, 2, 4], [3, 12, 48]), 6)
    2.0
    """
    x, y = np.log(np.asarray(sizes, float)), np.log(np.asarray(values, float))
    return float(np.polyfit(x, y, 1)[0]) if len(sizes) > 1 else math.nan
