"""Intervals that cover what they promise, the verdict's equivalence test, and the lag curve."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gradflow.analysis import Rate
from gradflow.analyzer.curve import lag_curve
from gradflow.analyzer.rates import (
    band,
    correlation_time,
    decays_as_power,
    judge,
    rate_of_one,
    rate_over_sequences,
)


def walk(random: np.random.Generator, shape: tuple[int, int], rho: float) -> np.ndarray:
    """Growth per step around −0.05, correlated from step to step."""
    noise = random.normal(0, 0.5, shape)
    for t in range(1, shape[1]):
        noise[:, t] = rho * noise[:, t - 1] + math.sqrt(1 - rho**2) * noise[:, t]
    return noise - 0.05


@pytest.mark.parametrize("rho", [0.0, 0.8])
@pytest.mark.parametrize("sequences", [2, 8])
def test_interval_over_sequences_covers_the_truth(rho: float, sequences: int) -> None:
    random = np.random.default_rng(1)
    growth = walk(random, (1200 * sequences, 100), rho).mean(1).reshape(1200, sequences)
    rates = [rate_over_sequences(row) for row in growth]
    covered = np.mean([rate.low <= -0.05 <= rate.high for rate in rates])
    assert 0.93 <= covered <= 0.97


@pytest.mark.parametrize("rho", [0.0, 0.6])
def test_interval_of_one_sequence_covers_the_truth(rho: float) -> None:
    growth = walk(np.random.default_rng(2), (400, 1200), rho)
    rates = [rate_of_one(row) for row in growth]
    known = [rate for rate in rates if not math.isnan(rate.low)]
    assert len(known) > 380
    assert 0.88 <= np.mean([rate.low <= -0.05 <= rate.high for rate in known]) <= 0.98


def test_one_short_or_correlated_sequence_has_no_interval() -> None:
    random = np.random.default_rng(3)
    assert math.isnan(rate_of_one(random.normal(size=40)).low)
    assert math.isnan(rate_of_one(walk(random, (1, 200), 0.95)[0]).low)


def test_equal_steps_or_sequences_make_a_point() -> None:
    one = rate_of_one(np.full(20, -0.125))
    assert one == Rate(-0.125, -0.125, -0.125)
    rate = rate_over_sequences(np.full(5, -0.1))
    assert rate.low == rate.value == rate.high
    assert judge(rate, 100, 5, 80).name == "vanishing"


def test_dead_and_unknown_sequences() -> None:
    assert rate_over_sequences(np.array([-math.inf, -math.inf, -0.1])).value == -math.inf
    assert rate_over_sequences(np.array([-math.inf, -0.1, -0.1])).value == -0.1
    assert rate_over_sequences(np.array([math.nan, -0.2, -0.2])).value == -0.2
    assert math.isnan(rate_over_sequences(np.array([math.nan])).value)
    assert rate_of_one(np.array([-0.1, -math.inf])).value == -math.inf


@pytest.mark.parametrize(
    ("rate", "expected"),
    [
        ((-0.10, -0.12, -0.08), "vanishing"),
        ((0.10, 0.08, 0.12), "exploding"),
        ((0.00, -0.02, 0.02), "stable"),
        ((-0.02, -0.03, -0.01), "inconclusive"),
        ((0.0, -0.1, 0.1), "inconclusive"),
        ((-math.inf,) * 3, "dead"),
        ((math.nan,) * 3, "inconclusive"),
        ((-0.5, math.nan, math.nan), "inconclusive"),
    ],
)
def test_verdict(rate: tuple[float, float, float], expected: str) -> None:
    assert judge(Rate(*rate), 100, 8, 80).name == expected


def test_band_is_one_decade_over_the_span() -> None:
    assert band(200) * 200 == pytest.approx(math.log(10))


def test_the_number_of_sequences_asked_for_does_decide() -> None:
    random = np.random.default_rng(4)
    spread, truth = 0.02, -0.035  # beyond the band ±0.023 of 100 steps
    few = random.normal(truth, spread, 6)
    few += truth - few.mean()
    verdict = judge(rate_over_sequences(few), 100, 6, 80)
    assert verdict.name == "inconclusive"
    needed = int(verdict.needed.split()[1])
    more = np.resize(few - truth, needed)
    more = truth + (more - more.mean()) * few.std(ddof=1) / more.std(ddof=1)
    assert judge(rate_over_sequences(more), 100, needed, 80).name == "vanishing"


def test_correlation_time_of_an_autoregression() -> None:
    series = walk(np.random.default_rng(5), (1, 50_000), 0.8)[0]
    assert correlation_time(series) == pytest.approx((1 + 0.8) / (1 - 0.8), rel=0.15)


def test_power_laws_are_told_from_exponentials() -> None:
    random = np.random.default_rng(6)
    lags = np.arange(1, 200)
    noise = np.cumsum(random.normal(0, 0.02, (8, 199)), axis=1)
    assert decays_as_power(-1.5 * np.log1p(lags) + noise)
    assert not decays_as_power(-0.05 * lags + noise)
    assert not decays_as_power(0.2 * noise)  # too little change to have a shape
    assert decays_as_power((-1.5 * np.log1p(lags))[None])
    assert not decays_as_power((-0.05 * lags)[None])


# ---------------------------------------------------------------------------------- lag curve


def square(curve: np.ndarray, sequences: int = 1) -> np.ndarray:
    """A map whose gain depends on the lag alone."""
    steps = len(curve)
    gap = np.arange(steps)[None, :] - np.arange(steps)[:, None]
    one = np.where(gap >= 0, curve[np.abs(gap)], np.nan)
    return np.repeat(one[None], sequences, axis=0)


def test_curve_of_an_exponential() -> None:
    curve = lag_curve(square(-0.1053605 * np.arange(100)), np.arange(100))
    assert curve.horizon == 66
    assert curve.half_life == pytest.approx(6.578813, rel=1e-6)
    assert curve.searched == 99
    assert curve.count.tolist() == list(range(100, 0, -1))
    assert curve.slope[1:] == pytest.approx(-0.1053605)
    assert not curve.transient_growth


def test_exact_zeros_count_as_minus_infinity() -> None:
    gains = np.zeros((1, 12))
    gains[0, 8:] = -np.inf
    curve = lag_curve(square(gains[0]), np.arange(12))
    assert curve.horizon == 8
    assert curve.half_life == 8.0
    assert curve.zero_share[[7, 8]].tolist() == [0.0, 1.0]
    some = np.repeat(square(np.zeros(4)), 3, axis=0)
    some[0, :, 2:] = np.where(np.isnan(some[0, :, 2:]), np.nan, -np.inf)
    assert lag_curve(some, np.arange(4)).median[2] == 0.0
    assert lag_curve(some, np.arange(4)).zero_share[2] == pytest.approx(1 / 3)


def test_undefined_pairs_are_no_pairs() -> None:
    gains = square(-np.arange(6.0))
    gains[:, :, 4:] = np.nan  # padding
    curve = lag_curve(gains, np.arange(6))
    assert curve.searched == 3
    assert curve.count.tolist() == [4, 3, 2, 1, 0, 0]
    assert np.isnan(curve.median[4:]).all()


def test_strided_sources_and_never() -> None:
    curve = lag_curve(square(np.zeros(10))[:, ::4], np.arange(0, 10, 4))
    assert curve.horizon is None
    assert curve.half_life == math.inf
    assert curve.count[:3].tolist() == [3, 3, 2]


def test_transient_growth_is_more_than_a_decade_above_the_start() -> None:
    lags = np.arange(60)
    assert lag_curve(square(3 * np.sin(lags / 10)), lags).transient_growth
    assert not lag_curve(square(2 * np.sin(lags / 10)), lags).transient_growth
    assert not lag_curve(square(np.where(lags > 0, 3.0, 0.0)), lags).transient_growth


def test_the_line_has_the_rates_slope() -> None:
    curve = lag_curve(square(-0.2 * np.arange(30.0)), np.arange(30))
    assert curve.line(-0.2) == pytest.approx(-0.2 * np.arange(30), abs=1e-12)
    assert np.isnan(curve.line(math.nan)).all()
