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
from gradflow.recording import Track

SIDES = ("measured", "exact")
TOLERANCE = 1e-4  # relative; rounding makes 1e-6 of it where gates are saturated


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
    U_o)|. Both sides count the same steps. The closed form rests on gates, states and weights, not
    on pushed directions, so that what rounding does to those shows: a measured −∞ beside a finite
    closed form is an exponent that shrinks by more than rounding at some step, no exact zero.

    Args:
        track: one layer in one direction.
        growth: what the QR iteration yielded for it.
        alive: (B,) which sequences have a rate.

    Returns:
        (2,) nats per step, as in `SIDES`; both NaN where not all S exponents were measured, the
        closed form NaN where there is none (a GRU, a loop marked with `gradflow.tap`).
    """
    if growth.log_growth.shape[2] < state_size(track) or not alive.any():
        return np.full(2, math.nan)
    chosen = np.flatnonzero(alive)
    measured = growth.exponents[torch.from_numpy(alive)].sum(1)
    operator = operator_of(track, torch.float64, chosen.tolist()).inner
    volume = operator.log_volume() if isinstance(operator, HasVolume) else None
    if volume is None:
        return np.array([float(measured.mean()), math.nan])
    counted = growth.counted[:, torch.from_numpy(alive)]
    exact = torch.where(counted, volume.cpu()[: len(counted)], 0.0).sum(0) / counted.sum(0)
    return np.array([float(measured.mean()), float(exact.mean())])


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
    return not abs(measured - exact) <= TOLERANCE * max(1.0, abs(exact))
