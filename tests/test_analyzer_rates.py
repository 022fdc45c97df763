"""Intervals that cover what they promise, the verdict's equivalence test, and the lag curve."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import signal
from seam import (
    Verdict,
    band,
    correlation_time,
    decays_as_power,
    judge,
    rate_of_one,
    rate_over_sequences,
)
from seam import curve_lag_curve as lag_curve

from gradflow.analysis import Rate

TRUTH = -0.05


def walk(random: np.random.Generator, shape: tuple[int, int], rho: float) -> np.ndarray:
    """Growth per step around −0.05, correlated from step to step."""
    noise = random.normal(0, 0.5 * math.sqrt(1 - rho**2), (shape[0], shape[1] + 60))
    return signal.lfilter([1], [1, -rho], noise, axis=1)[:, 60:] + TRUTH


def over(rate: Rate, span: int = 100) -> Rate:
    """What a rate and its interval make over a span."""
    return Rate(rate.value * span, rate.low * span, rate.high * span)


def covered(rates: list[Rate], truth: float = TRUTH) -> float:
    """Share of intervals that hold the truth."""
    return float(np.mean([rate.low <= truth <= rate.high for rate in rates]))


@pytest.mark.parametrize("kind", ["independent", "AR(0.8)", "varying mean", "skewed"])
@pytest.mark.parametrize(
    ("sequences", "steps"), [(2, 50), (3, 50), (4, 50), (8, 50), (32, 50), (2, 1000), (8, 200)]
)
def test_interval_over_sequences_covers_the_truth(sequences: int, steps: int, kind: str) -> None:
    repeats = min(2000, 2_000_000 // (sequences * steps))
    random = np.random.default_rng(sequences * steps)
    shape = (repeats * sequences, steps)
    growth = walk(random, shape, 0.8 if kind == "AR(0.8)" else 0.0)
    if kind == "varying mean":  # the same in every sequence, as a common input makes it
        growth += 0.3 * np.sin(np.linspace(0, 2 * np.pi, steps, endpoint=False))
    if kind == "skewed":
        growth = TRUTH + 0.5 - random.exponential(0.5, shape)
    rates = growth.mean(1).reshape(repeats, sequences)
    assert 0.92 <= covered([rate_over_sequences(row) for row in rates]) <= 0.97


@pytest.mark.parametrize("lengths", [(20, 1000), (10, 200, 400), (50, 60, 70, 200, 400, 30)])
def test_unequal_lengths_only_widen_the_interval(lengths: tuple[int, ...]) -> None:
    random = np.random.default_rng(9)
    rates = np.stack([walk(random, (1500, n), 0.5).mean(1) for n in lengths], axis=1)
    assert covered([rate_over_sequences(row) for row in rates]) >= 0.93


@pytest.mark.parametrize("rho", [0.5, 0.8, 0.9])
@pytest.mark.parametrize("steps", [80, 160, 400])
def test_few_single_sequences_get_a_wrong_interval(steps: int, rho: float) -> None:
    """Where the rule of 60 autocorrelation times is not met, it is seldom thought to be."""
    rates = [rate_of_one(row) for row in walk(np.random.default_rng(steps), (1000, steps), rho)]
    known = [rate for rate in rates if not math.isnan(rate.low)]
    assert len(known) * (1 - covered(known)) <= 0.05 * 1000 if known else True


@pytest.mark.parametrize("rho", [0.0, 0.6])
def test_interval_of_one_sequence_covers_the_truth(rho: float) -> None:
    growth = walk(np.random.default_rng(2), (400, 1200), rho)
    rates = [rate_of_one(row) for row in growth]
    known = [rate for rate in rates if not math.isnan(rate.low)]
    assert len(known) > 380
    assert 0.90 <= covered(known) <= 0.98


def test_one_short_or_correlated_sequence_has_no_interval() -> None:
    random = np.random.default_rng(3)
    assert math.isnan(rate_of_one(random.normal(size=40)).low)
    assert math.isnan(rate_of_one(walk(random, (1, 200), 0.95)[0]).low)


def test_equal_steps_or_sequences_make_a_point() -> None:
    one = rate_of_one(np.full(20, -0.125))
    assert one == Rate(-0.125, -0.125, -0.125)
    rate = rate_over_sequences(np.full(5, -0.1))
    assert rate.low == rate.value == rate.high
    assert judge(over(rate), 5, 80).name == "vanishing"


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
    assert judge(over(Rate(*rate)), 8, 80).name == expected


def test_band_is_one_decade_over_the_span() -> None:
    assert band(200) * 200 == pytest.approx(math.log(10))


def test_the_number_of_sequences_asked_for_does_decide() -> None:
    random = np.random.default_rng(4)
    spread, truth = 0.02, -0.035  # beyond the band ±0.023 of 100 steps
    few = random.normal(truth, spread, 6)
    few += truth - few.mean()
    verdict = judge(over(rate_over_sequences(few)), 6, 80)
    assert verdict.name == "inconclusive"
    needed = int(verdict.needed.split()[1])
    more = np.resize(few - truth, needed)
    more = truth + (more - more.mean()) * few.std(ddof=1) / more.std(ddof=1)
    assert judge(over(rate_over_sequences(more)), needed, 80).name == "vanishing"


@pytest.mark.parametrize("sequences", [2, 3, 8])
@pytest.mark.parametrize("edge", [-1, 1])
def test_on_the_very_edge_a_verdict_is_given_one_time_in_twenty(sequences: int, edge: int) -> None:
    random = np.random.default_rng(14)
    rates = random.normal(edge * band(100), 0.004, (3000, sequences))
    names = [judge(over(rate_over_sequences(row)), sequences, 80).name for row in rates]
    wrong = {-1: ("vanishing", "exploding"), 1: ("exploding", "vanishing")}[edge]
    assert names.count(wrong[1]) == 0
    assert 0.01 <= names.count(wrong[0]) / 3000 <= 0.04
    assert names.count("stable") / 3000 <= 0.04


def test_the_surer_the_mean_the_sooner_a_verdict() -> None:
    random = np.random.default_rng(15)
    for truth, expected in ((-0.05, "vanishing"), (0.0, "stable"), (0.05, "exploding")):
        shares = []
        for sequences in (2, 4, 8, 32):
            rates = random.normal(truth, 0.02, (300, sequences))
            names = [judge(over(rate_over_sequences(row)), sequences, 80).name for row in rates]
            wrong = [name for name in names if name not in (expected, "inconclusive")]
            assert len(wrong) <= 0.025 * 300
            shares.append(names.count(expected))
        assert shares == sorted(shares) and shares[-1] == 300


def said(verdict: Verdict) -> int:
    """The number in "about 63 sequences"."""
    assert verdict.name == "inconclusive"
    return int(verdict.needed.split()[1])


def decided(random: np.random.Generator, times: int, repeats: int = 300) -> float:
    """How often a fresh sample of `times` the advised number of sequences decides."""
    outcomes = []
    for truth in (-0.06, -0.035, -0.01, 0.0, 0.015):
        for _ in range(repeats // 5):
            verdict = judge(over(rate_over_sequences(random.normal(truth, 0.02, 6))), 6, 80)
            if verdict.name != "inconclusive" or not verdict.needed.startswith("about"):
                continue
            count = min(times * said(verdict), 20_000)
            rate = rate_over_sequences(random.normal(truth, 0.02, count))
            outcomes.append(judge(over(rate), count, 80).name != "inconclusive")
    assert len(outcomes) > repeats / 3
    return float(np.mean(outcomes))


def test_following_the_advice_decides_as_often_as_is_said() -> None:
    random = np.random.default_rng(11)
    assert 0.55 <= decided(random, 1) <= 0.8
    assert 0.84 <= decided(random, 3) <= 0.97


def test_steps_asked_for_include_the_burn_in() -> None:
    # 80 counted steps give ±0.02; ±0.003 is needed, so 80 (20/3)² / 0.8 of which four fifths count
    verdict = judge(over(Rate(-0.02, -0.04, 0.0)), 1, 80)
    room = band(100) - 0.02
    assert said(verdict) == pytest.approx(80 * (0.02 / room) ** 2 / 0.8, rel=0.1)
    assert "steps, or ten sequences" in verdict.needed


def test_no_number_can_be_asked_for_on_the_very_edge() -> None:
    edge = -band(100)
    assert "on the edge of it" in judge(over(Rate(edge, edge - 0.01, edge + 0.01)), 8, 80).needed
    assert "on the edge of it" in judge(over(Rate(edge, edge, edge)), 8, 80).needed
    near = judge(over(Rate(edge * (1 + 1e-6), edge - 0.01, edge + 0.01)), 8, 80)
    assert "on the edge of it" in near.needed


def test_large_numbers_are_rounded() -> None:
    verdict = judge(over(Rate(-0.0225, -0.0325, -0.0125)), 8, 80)
    assert said(verdict) % 100 == 0
    exact = (1.96 * 0.01 / 2.3646 * 8**0.5 / (band(100) - 0.0225)) ** 2
    assert exact <= said(verdict) <= 1.1 * exact


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


@pytest.mark.parametrize("rho", [0.0, 0.8])
@pytest.mark.parametrize("sequences", [1, 2, 8])
def test_noisy_exponentials_are_seldom_called_power_laws(sequences: int, rho: float) -> None:
    random = np.random.default_rng(12)
    for steps in (50, 200):
        growth = walk(random, (200 * sequences, steps), rho).cumsum(1) * 0.6
        called = [decays_as_power(rows) for rows in growth.reshape(200, sequences, steps)]
        assert np.mean(called) <= 0.13


@pytest.mark.parametrize("power", [1.0, 1.5, 3.0])
@pytest.mark.parametrize("sequences", [1, 2, 8])
def test_power_laws_with_little_noise_are_found(sequences: int, power: float) -> None:
    random = np.random.default_rng(13)
    lags = np.arange(1, 101)
    noise = random.normal(0, 0.02, (100, sequences, 100)).cumsum(2)
    assert np.mean([decays_as_power(rows - power * np.log1p(lags)) for rows in noise]) >= 0.9


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


@pytest.mark.parametrize("factor", [0.5, 0.93, 0.99, 0.999])
def test_horizon_and_half_life_are_censored_where_the_search_ends(factor: float) -> None:
    steps = 200
    curve = lag_curve(square(math.log(factor) * np.arange(steps)), np.arange(steps))
    first = math.floor(math.log(1e-3) / math.log(factor)) + 1
    assert curve.horizon == (first if first < steps else None)
    half = math.log(0.5) / math.log(factor)
    assert curve.half_life == pytest.approx(half if half <= steps - 1 else math.inf)
    assert curve.searched == 199


def test_a_curve_that_comes_back_counts_when_it_is_first_below() -> None:
    lags = np.arange(60)
    curve = lag_curve(square(-8 * np.sin(lags / 12) ** 2), lags)
    assert curve.horizon == int(np.flatnonzero(8 * np.sin(lags / 12) ** 2 > math.log(1e3))[0])
    assert curve.half_life < 5


def test_horizon_is_below_a_thousandth_not_at_it() -> None:
    gains = np.array([0.0, math.log(1e-3), math.log(1e-3) - 1e-12])
    assert lag_curve(square(gains), np.arange(3)).horizon == 2
