"""The Lyapunov spectrum of a layer: every exponent with its interval, and how it settled.

Letters: T steps, B sequences, k exponents.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from gradflow.analysis import Rate
from gradflow.analyzer.core import Core
from gradflow.analyzer.keeping import settling_by_halves
from gradflow.analyzer.lyapunov import Growth
from gradflow.analyzer.rates import rate_of_one, rate_over_sequences
from gradflow.limits import DEAD_SHARE, TRACED


@dataclass(frozen=True)
class Spectrum:
    """Exponents of a layer, nats per step, largest first; the rate is the first."""

    values: np.ndarray  # (k,)
    low: np.ndarray  # (k,) 95 % interval over sequences, widened by the settling
    high: np.ndarray  # (k,)
    settling: np.ndarray  # (k,) nats per step by which its halves differ beyond their own noise
    trace: np.ndarray  # (min(k, TRACED), T) running mean over the counted steps


def spectrum(core: Core) -> Spectrum:
    """Mean exponents over the sequences that have a rate, by the rules the rate itself goes by.

    None can exceed the largest, so one whose mean does is brought down to the rate. Of a step
    Jacobian that never changes they are the logarithms of its eigenvalues.

    Args:
        core: the rate, and ln |R_jj| of every step.

    Returns:
        All NaN where there is no rate, all −inf where the rate is.
    """
    growth, rate = core.growth, core.rate
    steps, _, count = growth.log_growth.shape
    traced = min(count, TRACED)
    if math.isnan(rate.value) or math.isinf(rate.value):
        nothing = np.full(count, rate.value)
        unsettled = np.full(count, math.nan)
        every = np.full((traced, steps), rate.value)
        return Spectrum(nothing, nothing, nothing, unsettled, every)
    alive = np.flatnonzero(np.isfinite(core.sequence_rates))
    exponents = growth.exponents.numpy()
    if core.constant is not None:
        known, order = core.constant[:count], list(range(1, count))
        trace = [_trace(growth, exponents, j, alive) for j in [0, *order][:traced]]
        return Spectrum(known, known, known, np.zeros(count), np.stack(trace))
    others = [_exponent(growth, exponents, j, alive, rate.value) for j in range(1, count)]
    order = sorted(range(1, count), key=lambda j: -others[j - 1][0].value)
    found = [(rate, core.settling)] + [others[j - 1] for j in order]
    trace = [_trace(growth, exponents, j, alive) for j in [0, *order][:traced]]
    return Spectrum(
        np.array([one.value for one, _ in found]),
        np.array([one.low for one, _ in found]),
        np.array([one.high for one, _ in found]),
        np.array([settling for _, settling in found]),
        np.stack(trace),
    )


def _exponent(
    growth: Growth, exponents: np.ndarray, j: int, alive: np.ndarray, largest: float
) -> tuple[Rate, float]:
    """One exponent with its interval, and by how much its halves differ."""
    if len(alive) == 1:
        b = int(alive[0])
        found = rate_of_one(growth.log_growth[growth.counted[:, b], b, j].numpy())
    else:
        found = rate_over_sequences(exponents[alive, j])
    if not math.isfinite(found.value):
        return found, math.nan
    settling = settling_by_halves(growth, j, alive)
    value = min(found.value, largest)
    half = math.hypot((found.high - found.low) / 2, settling)
    return Rate(value, value - half, value + half), settling


def _trace(growth: Growth, exponents: np.ndarray, j: int, alive: np.ndarray) -> np.ndarray:
    """(T,): running mean of each sequence, which stays what it is at the end; mean over them.

    NaN until the first step counts, and past the last step of the longest sequence. A sequence for
    which the exponent is −inf is left out as it is left out of the exponent.
    """
    ends = exponents[alive, j]
    kept = alive[np.isfinite(ends)] if np.isneginf(ends).mean() < DEAD_SHARE else alive
    counted = growth.counted[:, kept].numpy()
    logs = np.where(counted, growth.log_growth[:, kept, j].numpy(), 0.0)
    number = counted.cumsum(0)
    begun = number > 0
    running = np.where(begun, logs.cumsum(0) / np.maximum(number, 1), 0.0)
    share = begun.sum(1)
    real = np.arange(len(logs)) <= np.flatnonzero(counted.any(1)).max()
    trace = running.sum(1) / np.maximum(share, 1)
    return np.where((share > 0) & real, trace, np.nan)
