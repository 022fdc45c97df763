"""The Lyapunov spectrum of a layer: every exponent with its interval, how it settled, what it must sum to.

Letters: T steps, B sequences, k exponents, S the state's width. Sum rule: Σ_j λ_j is the mean of
ln |det A_t|, which for an RNN and an LSTM follows from gates, states and one determinant of the
weights, without any product of Jacobians.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from gradflow.analysis.results import Rate
from gradflow.analyzer.core import Core
from gradflow.analyzer.exponents import Growth
from gradflow.analyzer.jacobians import operator_of, state_size
from gradflow.analyzer.keeping import settling_by_halves
from gradflow.analyzer.rates import rate_of_one, rate_over_sequences
from gradflow.limits import CERTIFIED, DEAD_SHARE, TRACED
from gradflow.recording.track import Track


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
    Jacobian that never changes they are the logarithms of its eigenvalues. All are NaN where there is
    no rate, −inf where the rate is.
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


SIDES = ("measured", "exact")


@runtime_checkable
class HasVolume(Protocol):
    """An operator that may know its determinants in closed form."""

    def log_volume(self) -> Tensor | None:
        """ln |det A_t| of every step, (T, B)."""
        ...


def sum_rule(track: Track, growth: Growth, alive: np.ndarray) -> np.ndarray:
    """Σ_j λ_j as measured, and the closed form; mean over the sequences that have a rate.

    RNN: ln |det W_hh| + mean Σ ln φ'(a_t). LSTM: mean of Σ ln f_t + Σ ln |tanh(c_t) o_t (1 − o_t)|
    + ln |det U_o|; with a projection the last two are ln |det(W_hr diag(tanh c_t ⊙ o_t (1 − o_t))
    U_o)|. Both sides count the same steps; a direction that an exact zero takes before the first of
    them, in the burn-in, is −∞ on both. The closed form rests on gates, states and weights, not on
    pushed directions, so that what rounding does to those shows: a measured −∞ beside a finite
    closed form is an exponent that shrinks by more than rounding at some step, no exact zero.

    In nats per step, as in `SIDES`; both NaN where not all S exponents were measured, the closed form
    NaN where there is none (a GRU, a loop marked with `gradflow.tap`).
    """
    if growth.log_growth.shape[2] < state_size(track) or not alive.any() or track.state_shape:
        return np.full(2, math.nan)
    chosen = np.flatnonzero(alive)
    measured = growth.exponents[torch.from_numpy(alive)].sum(1)
    operator = operator_of(track, torch.float64, chosen.tolist()).inner
    volume = operator.log_volume() if isinstance(operator, HasVolume) else None
    if volume is None:
        return np.array([float(measured.mean()), math.nan])
    counted = growth.counted[:, torch.from_numpy(alive)]
    volume = volume.cpu()[: len(counted)]
    exact = torch.where(counted, volume, 0.0).sum(0) / counted.sum(0)
    flat = (volume == -math.inf) & _led_in(growth, counted, chosen)
    exact = torch.where(flat.any(0), torch.full_like(exact, -math.inf), exact)
    return np.array([float(measured.mean()), float(exact.mean())])


def _led_in(growth: Growth, counted: Tensor, chosen: np.ndarray) -> Tensor:
    """(T, B): steps before the first that counts with no cut between; what a zero takes stays gone."""
    used = ~growth.log_growth[:, torch.from_numpy(chosen), 0].isnan()
    gaps = (~used).cumsum(0)
    first = counted.int().argmax(0, keepdim=True)
    return used & (gaps == gaps.gather(0, first)) & (torch.arange(len(used))[:, None] < first)


def broken(sides: np.ndarray) -> bool:
    """Whether both sides are known and differ by more than rounding.

    >>> broken(np.array([-2.0, -2.0])), broken(np.array([-math.inf, -2.0]))
    (False, True)
    >>> broken(np.array([-2.0, math.nan]))
    False
    """
    measured, exact = sides
    if np.isnan(sides).any() or measured == exact:
        return False
    return not abs(measured - exact) <= CERTIFIED * max(1.0, abs(exact))
