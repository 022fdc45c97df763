"""The lag curve L(k): how ln gain falls with the distance, over sequences and sources.

Letters: k lag, n sources, T timesteps. L(k) is the median of the spectral ln gain(t+k←t).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from gradflow.limits import LN_BAND, LN_GONE, LN_HALF


@dataclass(frozen=True)
class LagCurve:
    """L(k) for k = 0 … K with its 10–90 % band; every array (K+1,)."""

    median: np.ndarray
    low: np.ndarray
    high: np.ndarray
    count: np.ndarray
    zero_share: np.ndarray

    @property
    def slope(self) -> np.ndarray:
        """L(k) − L(k−1), nats per step; NaN at lag 0 and from −∞ on."""
        with np.errstate(invalid="ignore"):
            return np.concatenate([[np.nan], np.diff(self.median)])

    @property
    def searched(self) -> int:
        """The largest lag at which any pair was seen."""
        seen = np.flatnonzero(self.count)
        return int(seen[-1]) if len(seen) else 0

    @property
    def horizon(self) -> int | None:
        """First lag k ≥ 1 with L(k) < ln GONE, None if not reached.

        Where the lags before it were not measured, the straight line between the nearest tells it.
        """
        gone = np.flatnonzero(self.median[1:] < LN_GONE)
        if len(gone) == 0:
            return None
        k = int(gone[0]) + 1
        return min(k, math.floor(self._reached(k, LN_GONE)) + 1)

    @property
    def half_life(self) -> float:
        """The interpolated lag at which L(k) first reaches −ln 2; inf if it never does."""
        fallen = np.flatnonzero(self.median[1:] <= LN_HALF)
        if len(fallen) == 0:
            return math.inf
        return self._reached(int(fallen[0]) + 1, LN_HALF)

    def _reached(self, k: int, level: float) -> float:
        """Where the line from the last measured lag before k to k meets a level; k if it has none."""
        known = np.flatnonzero(~np.isnan(self.median[:k]))
        earlier = int(known[-1]) if len(known) else k
        before, after = float(self.median[earlier]), float(self.median[k])
        if not math.isfinite(after) or not math.isfinite(before) or before <= after:
            return float(k)
        return earlier + (k - earlier) * (before - level) / (before - after)

    def falls_with(self, rate: float) -> bool:
        """Whether a rate < 0 tells of this curve: half-life and horizon are about where it has them.

        A half-life may be off by half or double, a horizon by half as much again, or a step or two.
        """
        half, gone = LN_HALF / rate, LN_GONE / rate
        own, reached = self.half_life, self.horizon
        if self.searched == 0:
            return True
        if math.isinf(own):
            halves = half > self.searched / 1.5
        else:
            halves = half / 2 <= own <= 2 * half or abs(own - half) <= 1
        if reached is None:
            return halves and gone > self.searched / 1.5
        return halves and (gone / 1.5 <= reached <= 1.5 * gone or abs(reached - gone) <= 2)

    @property
    def transient_growth(self) -> bool:
        """Whether L rises by more than the band above max(0, L(1))."""
        later = self.median[1:]
        if len(later) == 0 or np.isnan(later).all():
            return False
        return bool(np.nanmax(later) - max(0.0, later[0]) > LN_BAND)

    def line(self, rate: float) -> np.ndarray:
        """The straight line with that slope through the middle of the finite points, (K+1,)."""
        lags = np.arange(len(self.median))
        known = np.isfinite(self.median) & (lags > 0)
        if not math.isfinite(rate) or not known.any():
            return np.full(len(lags), np.nan)
        return rate * lags + np.median(self.median[known] - rate * lags[known])


def lag_curve(log_gain: np.ndarray, sources: np.ndarray) -> LagCurve:
    """Collect ln gain (sequence, source, target) by lag; NaN entries are not pairs.

    Exact zeros count as −∞: the median is −∞ once half of the pairs are.
    """
    steps = log_gain.shape[-1]
    columns = [_at_lag(log_gain, sources, k) for k in range(steps)]
    low, median, high = np.array([_quantiles(values) for values in columns]).T
    count = np.array([len(values) for values in columns])
    zeros = [float(np.isneginf(v).mean()) if len(v) else np.nan for v in columns]
    return LagCurve(median, low, high, count, np.array(zeros))


def _at_lag(log_gain: np.ndarray, sources: np.ndarray, lag: int) -> np.ndarray:
    inside = np.flatnonzero(sources + lag < log_gain.shape[-1])
    values = log_gain[:, inside, sources[inside] + lag].ravel()
    return values[~np.isnan(values)]


def _quantiles(values: np.ndarray) -> tuple[float, float, float]:
    """10 %, 50 % and 90 %, by linear interpolation where both neighbours are finite."""
    if len(values) == 0:
        return math.nan, math.nan, math.nan
    ordered = np.sort(values)
    return _quantile(ordered, 0.1), _quantile(ordered, 0.5), _quantile(ordered, 0.9)


def _quantile(ordered: np.ndarray, share: float) -> float:
    place = share * (len(ordered) - 1)
    lower, upper = ordered[math.floor(place)], ordered[math.ceil(place)]
    if math.isinf(lower) or math.isinf(upper) or lower == upper:
        return float(lower)  # between −∞ and a number there is no middle
    return float(lower + (place - math.floor(place)) * (upper - lower))


def finite_extremes(log_gain: np.ndarray) -> tuple[float, float]:
    """Smallest and largest finite ln gain, NaN where there is none."""
    finite = log_gain[np.isfinite(log_gain)]
    if len(finite) == 0:
        return math.nan, math.nan
    return float(finite.min()), float(finite.max())
