"""Sum rules: what a whole Lyapunov spectrum must add up to, whatever the iteration found.

Letters: T steps, B sequences, S the state's width. Σ_j λ_j is the mean of ln |det A_t|, which for an
RNN and an LSTM follows from gates, states and one determinant of the weights, without any product
of Jacobians.
"""

from __future__ import annotations

import math
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from gradflow.analyzer.jacobians import operator_of, state_size
from gradflow.analyzer.lyapunov import Growth
from gradflow.limits import CERTIFIED
from gradflow.recording import Track

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

    Args:
        track: one layer in one direction.
        growth: what the QR iteration yielded for it.
        alive: (B,) which sequences have a rate.

    Returns:
        (2,) nats per step, as in `SIDES`; both NaN where not all S exponents were measured, the
        closed form NaN where there is none (a GRU, a loop marked with `gradflow.tap`).
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
