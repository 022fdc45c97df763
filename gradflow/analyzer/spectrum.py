"""The Lyapunov spectrum of a layer: every exponent with its interval, and how it settled.

Letters: T steps, B sequences, k exponents.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from gradflow.analysis import Rate
from gradflow.analyzer.lyapunov import Growth
from gradflow.analyzer.rates import rate_of_one, rate_over_sequences

TRACED = 8  # exponents whose settling is kept


@dataclass(frozen=True)
class Spectrum:
    """Exponents of a layer, nats per step: the rate first, then the others, largest first."""

    values: np.ndarray  # (k,)
    low: np.ndarray  # (k,) 95 % t-interval over sequences
    high: np.ndarray  # (k,)
    trace: np.ndarray  # (min(k, TRACED), T) running mean over the counted steps


def spectrum(growth: Growth, rate: Rate, rates: np.ndarray) -> Spectrum:
    """Mean exponents over the sequences that have a rate, by the rules the rate itself goes by.

    Args:
        growth: ln |R_jj| of every step.
        rate: the layer's, which is the first exponent.
        rates: (B,) of each sequence; NaN and −inf ones are left out of the other exponents too.

    Returns:
        All NaN where there is no rate, all −inf where the layer is dead.
    """
    steps, _, count = growth.log_growth.shape
    traced = min(count, TRACED)
    if math.isnan(rate.value) or math.isinf(rate.value):
        nothing = np.full(count, rate.value)
        return Spectrum(nothing, nothing, nothing, np.full((traced, steps), rate.value))
    alive = np.flatnonzero(np.isfinite(rates))
    exponents = growth.exponents.numpy()
    others = [_exponent(growth, exponents, j, alive) for j in range(1, count)]
    order = sorted(range(1, count), key=lambda j: -others[j - 1].value)
    found = [rate] + [others[j - 1] for j in order]
    trace = [_trace(growth, exponents, j, alive) for j in [0, *order][:traced]]
    return Spectrum(
        np.array([one.value for one in found]),
        np.array([one.low for one in found]),
        np.array([one.high for one in found]),
        np.stack(trace),
    )


def _exponent(growth: Growth, exponents: np.ndarray, j: int, alive: np.ndarray) -> Rate:
    if len(alive) == 1:
        b = int(alive[0])
        return rate_of_one(growth.log_growth[growth.counted[:, b], b, j].numpy())
    return rate_over_sequences(exponents[alive, j])


def _trace(growth: Growth, exponents: np.ndarray, j: int, alive: np.ndarray) -> np.ndarray:
    """(T,): running mean of each sequence, which stays what it is at the end; mean over them.

    NaN until the first step counts, and past the last step of the longest sequence. A sequence for
    which the exponent is −inf is left out as it is left out of the exponent.
    """
    ends = exponents[alive, j]
    kept = alive[np.isfinite(ends)] if np.isneginf(ends).mean() < 0.5 else alive
    counted = growth.counted[:, kept].numpy()
    logs = np.where(counted, growth.log_growth[:, kept, j].numpy(), 0.0)
    number = counted.cumsum(0)
    begun = number > 0
    running = np.where(begun, logs.cumsum(0) / np.maximum(number, 1), 0.0)
    share = begun.sum(1)
    real = np.arange(len(logs)) <= np.flatnonzero(counted.any(1)).max()
    trace = running.sum(1) / np.maximum(share, 1)
    return np.where((share > 0) & real, trace, np.nan)
