"""Rates and gains with their intervals, how far a rate has settled, and the verdict: an equivalence test.

Letters: T steps, B sequences, span the distance of interest, n counted steps of a sequence, W₁, W₂, W₄
the sums of ln ‖P‖₂ over all of them, over their halves and over their quarters; F₁, F₂, F₄ the same of
ln ‖P‖_F. A rate is the growth of ln gain per step, in nats. The verdict is on the ln gain over the
span, held against ±ln 10, one decade.

ln ‖P‖₂ over n steps is n λ₁ and a boundary c_n for the directions that its two ends may choose. A sum
over parts holds the same growth and a boundary for each part, so 2 W₁ − W₂ = n λ₁ + 2 (c_n − c_{n/2})
takes it out. The largest direction comes down to λ₁ from above; the mean over all, which is what
‖P‖_F sees, comes up from below: the rate lies between the two.

All this is of steps alike. A layer that starts far from where it comes to rest has other steps at
first, and its states come to rest no faster than it forgets, at the pace of λ₁ itself: over a few
steps of a slow layer no growth is that of the long run. The steps tell whether they still move:
m probes V through the mean A_t of the earlier and of the later half.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gradflow.analysis.results import Gain, Rate, mean_interval, quantile
from gradflow.analyzer.gains import Norms, Window, stretches
from gradflow.limits import (
    BAND_WORDS,
    BATCH_MEANS,
    BOUNDARY,
    CORRELATION_TIMES,
    COUNTED_SHARE,
    DEAD_SHARE,
    LN_BAND,
    LN_SETTLED,
    MOST_NEEDED,
    MOVES,
    MOVES_CHANCE,
    MOVES_LONG,
    MOVES_MOST,
    POWER_BETTER,
    POWER_BETTER_ONE,
    PROBES,
    RATE_ROUNDING,
    SEED,
    SETTLED_SHARE,
    SHAPE_STEPS,
    UNSETTLED,
)
from gradflow.recording.source import Operator

EDGE = f"a span further from {BAND_WORDS}: the gain lies on the edge of it"


@dataclass(frozen=True)
class Verdict:
    """The outcome of the equivalence test, and what would decide it if it is open."""

    name: str  # one of gradflow.limits.VERDICTS
    needed: str = ""  # "about 12 sequences", only for an inconclusive one


@dataclass(frozen=True)
class Vote:
    """The numbers of a verdict that several probes must agree on, or that several batches pool."""

    verdict: str  # one of gradflow.limits.VERDICTS
    gain: Gain  # over the span, mean over sequences
    rate: Rate  # nats per step, mean over sequences
    settling: float = 0.0  # nats per step that the rates of all sequences may be off alike


@dataclass(frozen=True)
class OverBatches:
    """Gain, rate and verdict of several batches; intervals are over batches."""

    gain: Gain  # nats over the span
    rate: Rate  # nats per step; its interval holds what has not settled, which more batches do not mend
    settling: float  # nats per step of that, the mean over batches
    settled: bool  # whether the rate may be told
    verdict: Verdict


def over_batches(votes: Sequence[Vote], span: int) -> OverBatches:
    """Gain, rate and verdict of several batches, each of which has one gain and one rate.

    They are the means over its sequences, which may have more in common with each other than with those
    of another batch: an interval that counted all of them as independent would be too narrow.

    Args:
        votes: of each batch; gains are all over as many steps.
        span: the distance of interest in steps.

    >>> votes = [Vote("", Gain(10.0 * r, math.nan, math.nan, 10), Rate(r, math.nan, math.nan), 0.3)
    ...          for r in (-0.4, -0.5, -0.6)]
    >>> found = over_batches(votes, 10)
    >>> round(found.gain.low, 2), round(found.gain.high, 2), found.verdict.name, found.settled
    (-7.48, -2.52, 'vanishing', False)
    >>> round(found.rate.low, 3), round(found.rate.high, 3)                     # 0.248 and 0.3 together
    (-0.889, -0.111)
    """
    steps = max(vote.gain.steps for vote in votes)
    gain = rate_over_sequences(np.array([vote.gain.value for vote in votes]))
    rate = rate_over_sequences(np.array([vote.rate.value for vote in votes]))
    known = [vote.settling for vote in votes if math.isfinite(vote.rate.value + vote.settling)]
    settling = math.fsum(known) / len(known) if known else 0.0
    return OverBatches(
        gain=Gain(gain.value, gain.low, gain.high, steps),
        rate=rate.wider(settling) if math.isfinite(rate.value) else rate,
        settling=settling,
        settled=enough(settling, rate.value, span),
        verdict=judge(gain, len(votes), steps, "batch"),
    )


def steps_in_common(steps: Mapping[str, Sequence[float]]) -> int | None:
    """The steps that all batches have, where gains of one layer are over fewer in one batch than in another.

    >>> steps_in_common({"l0": [99, 29, 29], "l1": [49, 49, 49]}), steps_in_common({"l0": [9], "l1": [4]})
    (29, None)
    """
    known = [{int(one) for one in some if one > 0} for some in steps.values()]
    return min((min(some) for some in known if len(some) > 1), default=None)


def band(span: int) -> float:
    """δ = ln(10)/span, the rate that makes the band of the verdict over the span.

    >>> round(band(100), 6)
    0.023026
    """
    return LN_BAND / span


def rate_over_sequences(rates: np.ndarray) -> Rate:
    """Mean of one rate per sequence with its t-interval over sequences.

    Args:
        rates: (B,) nats per step; NaN is left out. −inf (a dead sequence) is left out as long as
            fewer than half are dead, else the rate is −inf.

    >>> rate = rate_over_sequences(np.array([-0.1, -0.2, -0.3]))
    >>> round(rate.value, 3), round(rate.low, 3), round(rate.high, 3)
    (-0.2, -0.448, 0.048)
    """
    known = rates[~np.isnan(rates)]
    if len(known) == 0 or np.isposinf(known).any():
        return Rate(math.nan, math.nan, math.nan)
    dead = np.isneginf(known)
    if dead.mean() >= DEAD_SHARE:
        return Rate(-math.inf, -math.inf, -math.inf)
    return mean_interval(known[~dead])


def rate_of_one(growth: np.ndarray) -> Rate:
    """Rate of one sequence from ln growth (T,) of its steps, with an interval where it is long enough.

    A t-interval over 20 batch means if T is at least 60 integrated autocorrelation times, a point if
    every step is the same, else bounds NaN.
    """
    if len(growth) == 0 or np.isnan(growth).any() or np.isposinf(growth).any():
        return Rate(math.nan, math.nan, math.nan)
    if np.isneginf(growth).any():
        return Rate(-math.inf, -math.inf, -math.inf)
    mean = float(np.mean(growth))
    if float(np.ptp(growth)) <= RATE_ROUNDING * max(1.0, abs(mean)):
        return Rate(mean, mean, mean)
    if len(growth) < CORRELATION_TIMES * correlation_time(growth):
        return Rate(mean, math.nan, math.nan)
    length = len(growth) // BATCH_MEANS
    means = growth[len(growth) - length * BATCH_MEANS :].reshape(BATCH_MEANS, length).mean(1)
    spread = mean_interval(means)
    return Rate(mean, spread.low + mean - spread.value, spread.high + mean - spread.value)


def correlation_time(series: np.ndarray) -> float:
    """Integrated autocorrelation time τ = 1 + 2 Σ ρ(k), summed up to W ≥ 5 τ (Sokal 1997).

    Taking out the mean makes it too small by a share (2W + 1)/T, which is put back (Wolff 2004).

    >>> correlation_time(np.array([1.0, -1.0] * 50))
    1.0
    """
    centred = series - series.mean()
    count = len(series)
    padded = np.fft.rfft(centred, 2 * count)
    covariance = np.fft.irfft(np.abs(padded) ** 2)[:count]
    if covariance[0] <= 0:
        return 1.0
    times = 1 + 2 * np.cumsum(covariance[1:] / covariance[0])
    for window, time in enumerate(times, start=1):
        if window >= 5 * time:
            return max(1.0, float(time) * (1 + (2 * window + 1) / count))
    return float(count)


def judge(gain: Rate | Gain, sequences: int, steps: int, unit: str = "sequence") -> Verdict:
    """Vanishing, exploding or stable if the whole interval says so; else inconclusive.

    What is said to be needed is where the interval of the same mean and spread comes free of the
    edge of the band. As the mean will move, a fresh sample of that size decides two times in three,
    one of three times that size nine times in ten (simulated).

    Args:
        gain: ln of the largest gain over the span with its interval, nats.
        sequences: how many the interval rests on.
        steps: counted steps of one sequence.
        unit: what the interval is over, "sequence" or "batch".

    >>> judge(Rate(-10.0, -12.0, -8.0), 8, 80).name
    'vanishing'
    >>> judge(Rate(-2.0, -3.0, -1.0), 8, 80)
    Verdict(name='inconclusive', needed='about 63 sequences')
    """
    if math.isnan(gain.value):
        return Verdict("inconclusive")
    if gain.value == -math.inf:
        return Verdict("dead")
    if math.isnan(gain.low):
        return Verdict("inconclusive", f"a second {unit} (better ten)")
    if gain.high < -LN_BAND:
        return Verdict("vanishing")
    if gain.low > LN_BAND:
        return Verdict("exploding")
    if gain.low > -LN_BAND and gain.high < LN_BAND:
        return Verdict("stable")
    units = "batches" if unit == "batch" else "sequences"
    return Verdict("inconclusive", _needed(gain, sequences, steps, units))


def _needed(gain: Rate | Gain, sequences: int, steps: int, units: str) -> str:
    half = (gain.high - gain.low) / 2
    room = min(abs(gain.value - LN_BAND), abs(gain.value + LN_BAND))
    if room <= 0:
        return EDGE
    if sequences < 2:
        count = math.ceil(steps * (half / room) ** 2 / COUNTED_SHARE)
        steps_too = f"about {_rounded(count)} steps, or " if count < MOST_NEEDED else ""
        return f"{steps_too}ten sequences"
    spread = half / quantile(sequences - 1) * math.sqrt(sequences)
    count = max(sequences + 1, math.ceil((1.96 * spread / room) ** 2))
    while count < MOST_NEEDED and quantile(count - 1) * spread / math.sqrt(count) >= room:
        count += max(1, count // 100)
    return f"about {_rounded(count)} {units}" if count < MOST_NEEDED else EDGE


def _rounded(count: int) -> int:
    """Up to two significant digits.

    >>> _rounded(63), _rounded(874), _rounded(19_781)
    (63, 880, 20000)
    """
    unit = 10 ** max(0, len(str(count)) - 2)
    return -(-count // unit) * unit


def decays_as_power(curves: np.ndarray) -> bool:
    """Whether a − α ln(1+k) predicts held-out sequences better than a + r k.

    Args:
        curves: (B, K) ln growth along one direction up to lags 1 … K, NaN past a sequence's end.
            One sequence alone is held out by its later half.

    A curve that moves less than a decade, or in fewer than 10 steps, has no shape to tell.
    """
    usable = curves[np.isfinite(curves[:, :1]).ravel()]
    length = int(np.isfinite(usable).all(0).argmin()) if len(usable) else 0
    if len(usable) and np.isfinite(usable).all():
        length = usable.shape[1]
    usable = usable[:, :length]
    if length < SHAPE_STEPS or float(np.ptp(usable.mean(0))) < math.log(10):
        return False
    lags = np.arange(1, length + 1)
    line, power = lags.astype(float), np.log1p(lags)
    # the later half of one random walk is weak evidence: it must be far better to count
    better = POWER_BETTER if len(usable) > 1 else POWER_BETTER_ONE
    return _missed(usable, power) < better * _missed(usable, line)


def _missed(curves: np.ndarray, shape: np.ndarray) -> float:
    """Squared error on what was held out."""
    if len(curves) == 1:
        half = len(shape) // 2
        fit = np.polynomial.Polynomial.fit(shape[:half], curves[0, :half], 1)
        return float(np.sum((curves[0, half:] - fit(shape[half:])) ** 2))
    total = 0.0
    for held in (0, 1):
        inside, outside = curves[1 - held :: 2].mean(0), curves[held::2].mean(0)
        fit = np.polynomial.Polynomial.fit(shape, inside, 1)
        total += float(np.sum((outside - fit(shape)) ** 2))
    return total


PARTS = (1, 2, 4)


@dataclass(frozen=True)
class Settled:
    """The rate of each sequence, and what all of them may have in common that is not the rate."""

    rates: np.ndarray  # (B,) nats per step; NaN where no step counts
    common: float  # half-width, nats per step: it does not shrink with more sequences


def enough(common: float, rate: float, span: int) -> bool:
    """Whether a rate may be told: off by less than half a decade over the span, or by a fifth.

    >>> enough(0.001, -0.002, 100), enough(0.05, -0.1, 100), enough(0.05, -0.5, 100)
    (True, False, True)
    """
    return common * span <= LN_SETTLED or common <= SETTLED_SHARE * abs(rate)


def parted(counted: np.ndarray, part: int) -> list[Window]:
    """Each stretch of counted steps whole, in halves and in quarters, as parts part, part + 1, …"""
    found = []
    for b, first, last in stretches(counted):
        for place, pieces in enumerate(PARTS):
            edges = [first + round((last - first) * i / pieces) for i in range(pieces + 1)]
            found += [
                Window(b, start, end, part + place)
                for start, end in itertools.pairwise(edges)
                if end > start
            ]
    return found


def settled(windows: list[Window], norms: Norms, batch: int, part: int) -> Settled:
    """Rates and their common settling from the norms of `parted` windows.

    >>> import torch
    >>> windows = parted(np.ones((8, 2), dtype=bool), 0)
    >>> logs = torch.tensor([-0.1 * window.steps for window in windows])
    >>> found = settled(windows, Norms(logs, logs, logs[:, None], 0.0), 2, 0)
    >>> found.rates.round(4).tolist(), round(found.common, 4)
    ([-0.1, -0.1], 0.0)
    """
    sums = np.zeros((2, len(PARTS), batch))
    steps, drift = np.zeros(batch), np.zeros(batch)
    middle = {(w.sequence, w.last) for w in windows if w.part == part}
    # −inf of an exact zero, and no step at all
    with np.errstate(invalid="ignore", divide="ignore"):
        for place, window in enumerate(windows):
            b, level = window.sequence, window.part - part
            pair = norms.spectral[place].item(), norms.frobenius[place].item()
            sums[:, level, b] += pair
            if level == 0:
                steps[b] += window.steps
            if level == 1:  # the later half against the earlier
                drift[b] += pair[0] if (b, window.last) in middle else -pair[0]
        whole, halves, quarters = (sums / steps).transpose(1, 0, 2)  # each (2, B)
        late, early = 2 * whole - halves, 2 * halves - quarters
        rates = late.mean(0)
        known = np.isfinite(rates)
        if not known.any():
            return Settled(rates, 0.0)
        late, early, late_half = late[:, known], early[:, known], (drift / steps)[known]
        boundary = float(np.mean((halves - whole)[0, known]))
    between = abs(float(np.mean(late[0] - late[1]))) / 2
    scales = max(beyond_noise(late[0] - early[0]), beyond_noise(late[1] - early[1]))
    trend = 2 * _significant(late_half)
    common = between + UNSETTLED * math.hypot(scales, trend) + BOUNDARY * abs(boundary)
    return Settled(rates, common)


def mean_steps(operator: Operator, counted: np.ndarray, probes: int = PROBES) -> np.ndarray:
    """What the steps make of fixed random vectors, mean over each half: (2, B, m S).

    counted (T, B) are the steps that count; NaN for a sequence of which one of the halves has none.

    >>> from gradflow.analyzer.jacobians import DenseOperator
    >>> steps = torch.tensor([0.5, 0.5, 0.7, 0.9]).double()[:, None, None, None]
    >>> found = mean_steps(DenseOperator(steps), np.ones((4, 1), dtype=bool))
    >>> (found[1] / found[0]).round(6).tolist()                                  # 0.8 and 0.5
    [[1.6]]
    """
    rows = min(probes, operator.size)
    generator = torch.Generator().manual_seed(SEED)
    mixed = torch.randn(operator.size, rows, generator=generator, dtype=torch.float64)
    vectors = torch.linalg.qr(mixed)[0].T.to(operator.dtype).expand(operator.batch, -1, -1)
    place, steps = counted.cumsum(0), counted.sum(0)
    earlier = torch.from_numpy(counted & (2 * place <= steps))
    later = torch.from_numpy(
        counted & (2 * place > steps + 1)
    )  # the middle of an odd number: neither
    sums = torch.zeros(2, operator.batch, rows * operator.size, dtype=torch.float64)
    for t in np.flatnonzero(counted.any(1)):
        images = operator.push(int(t), vectors).double().flatten(1)
        for half, inside in enumerate((earlier[t], later[t])):
            sums[half, inside] += images[inside]
    counts = torch.stack([earlier.sum(0), later.sum(0)])[..., None]
    return (sums / counts).numpy()


def unrest(seen: np.ndarray, rate: float, steps: float) -> float:
    """By how much a rate may be off as the steps still move, nats per step.

    With growth λ + a e^(−|λ| t) over n steps, x = n |λ|, the mean is off by coth(x/4)/2 times the
    difference of the two halves. That difference is told by how far the mean step moves, relative to
    its size, times a factor by simulation; a move that is less than chance would make it is none. Of
    the difference at most MOVES_LONG times is to come, and at most MOVES_MOST over all steps.

    Args:
        seen: (2, B, ·) of `mean_steps`.
        rate: λ, nats per step.
        steps: n, the mean over sequences.

    >>> alike = np.ones((2, 3, 4))
    >>> unrest(alike, -0.1, 40.0), round(unrest(alike * [[[1.0]], [[1.1]]], -0.1, 40.0), 4)
    (0.0, 0.0075)
    """
    known = seen[:, np.isfinite(seen).all((0, 2))]
    if not known.shape[1] or not steps:
        return 0.0
    each = known[1] - known[0]
    square, size = float((each.mean(0) ** 2).sum()), float(np.linalg.norm(known.mean((0, 1))))
    by_chance = float(each.var(0, ddof=1).sum()) / len(each) if len(each) > 1 else 0.0
    if not size or square <= MOVES_CHANCE * by_chance:
        return 0.0
    moved = math.sqrt(square) / size
    slowly = max(2 * math.tanh(steps * abs(rate) / 4), 1 / MOVES_LONG)
    return min(MOVES * moved / slowly, MOVES_MOST / steps)


def beyond_noise(values: np.ndarray) -> float:
    """What a mean over sequences is beyond its own standard error, in squares."""
    error = float(values.var(ddof=1)) / len(values) if len(values) > 1 else 0.0
    return math.sqrt(max(0.0, float(values.mean()) ** 2 - error))


def _significant(values: np.ndarray) -> float:
    """What a mean over sequences is beyond its 95 % interval; all of one sequence's is noise."""
    if len(values) < 2:
        return 0.0
    half = quantile(len(values) - 1) * float(values.std(ddof=1)) / math.sqrt(len(values))
    return max(0.0, abs(float(values.mean())) - half)
