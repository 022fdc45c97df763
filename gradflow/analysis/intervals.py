"""Intervals of a mean, and of the difference of two: Student's t and Welch's."""

from __future__ import annotations

import math

import numpy as np
from scipy.special import stdtrit  # scipy.stats takes a second to import

from gradflow.analysis.results import Rate
from gradflow.limits import CONFIDENCE, RATE_ROUNDING


def quantile(freedom: float, among: int = 1) -> float:
    """How many standard errors a 95 % interval reaches, by Student's t.

    Of so many intervals all hold what they are of 95 times in 100 (Bonferroni).

    >>> round(quantile(9), 3), round(quantile(9, among=5), 3)
    (2.262, 3.25)
    """
    return float(stdtrit(freedom, 1 - (1 - CONFIDENCE) / (2 * among)))


def mean_interval(values: np.ndarray) -> Rate:
    """The mean of independent values with its t-interval; bounds NaN of fewer than two.

    >>> mean_interval(np.array([1.0, 1.0])), mean_interval(np.array([1.0]))
    (Rate(value=1.0, low=1.0, high=1.0), Rate(value=1.0, low=nan, high=nan))
    """
    mean = float(np.mean(values))
    if len(values) > 1 and float(np.ptp(values)) <= RATE_ROUNDING:
        return Rate(mean, mean, mean)  # identical sequences: a point, not an error
    if len(values) < 2:
        return Rate(mean, math.nan, math.nan)
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    half = quantile(len(values) - 1) * error
    return Rate(mean, mean - half, mean + half)


def welch(before: np.ndarray, after: np.ndarray, among: int = 1) -> tuple[float, float]:
    """Welch's interval of mean(after) − mean(before), one of so many.

    NaN with fewer than two values in one.

    >>> [round(end, 3) for end in welch(np.array([1.0, 2.0, 3.0]), np.array([4.0, 5.0, 6.0]))]
    [0.733, 5.267]
    """
    if min(len(before), len(after)) < 2:
        return math.nan, math.nan
    difference = float(after.mean() - before.mean())
    errors = [float(values.var(ddof=1)) / len(values) for values in (before, after)]
    if sum(errors) <= RATE_ROUNDING**2:
        return difference, difference
    freedom = sum(errors) ** 2 / sum(
        error**2 / (len(values) - 1) for error, values in zip(errors, (before, after), strict=True)
    )
    half = quantile(freedom, among) * math.sqrt(sum(errors))
    return difference - half, difference + half
