"""How far back the gradient of the weights is picked up: ∂L/∂W lag by lag, and what truncation costs.

Letters: C_k the part of ∂L/∂W that every loss step brings through the step k before it, T
timesteps, B sequences, K steps that a truncated gradient may see, K = k + 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from gradflow.analyzer.norms import row_norms
from gradflow.analyzer.order import in_processing_order
from gradflow.limits import (
    ELEMENT_SECONDS,
    LAG_BYTES,
    LAG_CALL_SECONDS,
    LAG_FEW_ROWS,
    LAG_SPEED,
    LAG_TOLERANCES,
    LAG_WEIGHT_SECONDS,
)
from gradflow.recording import Contributions, Outer, Track

PARAMETERS = ("weight_hh", "weight_ih")


@dataclass(frozen=True)
class Contributed:
    """‖C_k‖ of every lag and what follows from it; NaN where it is not known.

    There are no parameters for a loop whose weights were not seen.
    """

    parameters: tuple[str, ...]
    norm: np.ndarray  # (parameter, T) ‖C_k‖_F
    error: np.ndarray  # (parameter, T) ‖Σ_{j≤k} C_j − ∂L/∂W‖_F / ‖∂L/∂W‖_F
    total: np.ndarray  # (parameter,) ‖∂L/∂W‖_F of these sequences
    sequences: tuple[int, ...] = ()  # that it rests on
    note: str = ""  # what was left out for its price

    @property
    def cancellation(self) -> np.ndarray:
        """(parameter,) ‖Σ C_k‖ / Σ ‖C_k‖: 1 where all lags pull one way, 0 where they cancel."""
        with np.errstate(invalid="ignore"):
            return self.total / self.norm.sum(1)

    @property
    def depth(self) -> np.ndarray:
        """(parameter,) Σ k ‖C_k‖ / Σ ‖C_k‖, in steps."""
        lags = np.arange(self.norm.shape[1])
        with np.errstate(invalid="ignore"):
            return np.asarray((self.norm * lags).sum(1) / self.norm.sum(1))

    @property
    def window(self) -> np.ndarray:
        """(parameter, tolerance): the fewest steps K from which on the error stays within it."""
        found = [
            [_window(error, tolerance) for tolerance in LAG_TOLERANCES] for error in self.error
        ]
        return np.array(found).reshape(len(self.parameters), len(LAG_TOLERANCES))


def _window(error: np.ndarray, tolerance: float) -> float:
    if np.isnan(error).any():
        return math.nan
    above = np.flatnonzero(error > tolerance)
    return float(above[-1] + 2) if len(above) else 1.0


def contributions(
    track: Track,
    first: Sequence[int],
    withheld: bool,
    seconds: float,
    progress: Callable[[float], None] = lambda share: None,
) -> Contributed:
    """C_k = Σ_b Σ_t' δʰ_{t'→t'−k} h_{t'−k−1}ᵀ for every lag k, and with δ and x_{t'−k} for W_ih.

    Σ_k C_k = ∂L/∂W. The truncated gradient Σ_{j≤k} C_j is the one in which *every* loss step may
    look back k steps: the ideal truncation. Truncated BPTT in chunks (Williams & Peng 1990) keeps
    less: a loss step at the start of a chunk sees nothing before it.

    Loss steps at which nothing arrives cost nothing. Where all is too dear it rests on as many
    sequences as the budget allows, whole, and where one is too dear, on its first lags; the later
    ones are NaN and so is what needs them. It is all NaN in layers below a bidirectional one, where
    a loss step has no distance (see `Track.contributions`).

    Args:
        track: one layer in one direction.
        first: the sequences to be kept where not all can be.
        withheld: whether what rests on the loss is not to be shown.
        seconds: predicted, that it may take.
        progress: called with the share done.

    >>> import torch, gradflow
    >>> rnn = torch.nn.RNN(1, 1, nonlinearity="relu", bias=False).double()
    >>> _ = torch.nn.init.constant_(rnn.weight_ih_l0, 0.5)
    >>> _ = torch.nn.init.constant_(rnn.weight_hh_l0, 0.5)
    >>> with gradflow.record(rnn) as recording:                   # h_t = 1 throughout
    ...     h0 = torch.ones(1, 1, 1, dtype=torch.float64)
    ...     rnn(torch.ones(4, 1, 1).double(), h0)[0][-1].sum().backward()
    >>> found = contributions(recording["l0"], [0], False, 1.0)
    >>> found.norm[0].tolist(), found.window[0].tolist()
    ([1.0, 0.5, 0.25, 0.125], [4.0, 4.0, 3.0])
    >>> found.cancellation.tolist(), found.depth.round(4).tolist()[0]
    ([1.0, 1.0], 0.7333)
    """
    nothing = _nothing(track)
    reached = None if withheld else track.reached
    if reached is None or track.contributions() is None:
        return nothing
    chosen, lags, price = affordable(track, reached, first, seconds)
    found = track.contributions(chosen)
    assert found is not None
    note = ""
    if len(chosen) < track.batch:
        note = f"{len(chosen)} of {track.batch} sequences"
    if lags < track.steps:
        note += f"{' and ' if note else ''}the first {lags} of {track.steps} lags"
    if note:
        note = (
            f"how far back the gradient of the weights of {track.name} is picked up was measured on "
            f"{note}: all of it would take about {_rounded(price)} s"
        )
    measured = replace(nothing, sequences=tuple(chosen), note=note)
    return _measure(measured, found, lags, progress) if lags else measured


def _nothing(track: Track) -> Contributed:
    parameters = tuple(name for name in PARAMETERS if name in track.weights)
    blank = np.full((len(parameters), track.steps), np.nan)
    return Contributed(parameters, blank, blank, blank[:, 0])


def affordable(
    track: Track, reached: Tensor, first: Sequence[int], seconds: float
) -> tuple[list[int], int, float]:
    """Which sequences, how many lags of them, and the predicted seconds of all of it.

    Counted in operations and never by a clock, so that the same input gives the same numbers.
    """
    found = track.contributions()
    assert found is not None
    into = track.weights["weight_ih"]
    recurrent = track.weights.get("weight_hh", into.new_empty(0, track.hidden))
    stacked = found.work / (2 * recurrent.numel() + into.numel())  # with the layers above
    held = stacked * (4 * recurrent.shape[0] + 2 * recurrent.shape[1] + into.shape[1])
    # of one row, `held` numbers, at one lag
    each = 2 * found.work / LAG_SPEED + held * ELEMENT_SECONDS
    # how many loss steps are at work at every lag: those processed at k or later
    arrives = in_processing_order(track, reached).numpy()
    rows = arrives[::-1].cumsum(0)[::-1]  # (lag, B)
    lag = LAG_CALL_SECONDS + found.work * LAG_WEIGHT_SECONDS
    # the sum over all lags is one more pass over the steps
    prices = (rows.sum(0) + track.steps) * each
    order = [*first, *(b for b in range(track.batch) if b not in first)]
    most = int(LAG_BYTES / (8 * held * track.steps))
    fits = int((prices[order][:most].cumsum() <= seconds - track.steps * lag).sum())
    whole = track.steps * lag + float(prices.sum())
    if fits:
        return sorted(order[:fits]), track.steps, whole
    by_lag = (rows[:, order[0]] * each + lag).cumsum()
    return order[:1], int((by_lag <= seconds - track.steps * each).sum()), whole


def _measure(
    nothing: Contributed, found: Contributions, lags: int, progress: Callable[[float], None]
) -> Contributed:
    norm, error = nothing.norm.copy(), nothing.error.copy()
    left = {name: outer.matrix() for name, outer in found.total().items()}
    size = np.array([_norm(left[name]) for name in nothing.parameters])
    each = found.by_lag()
    for lag in range(lags):
        part = next(each, None)
        for place, name in enumerate(nothing.parameters):
            norm[place, lag] = 0.0 if part is None else _outer_norm(part[name])
            if part is not None:  # what is left are the lags to come
                left[name].addmm_(part[name].delta.T, part[name].vectors, alpha=-1)
            error[place, lag] = _norm(left[name])
        progress((lag + 1) / lags)
    if lags == norm.shape[1] and not np.isnan(norm).any():
        for row, sizes in zip(error, norm, strict=True):
            known = np.flatnonzero(sizes)
            row[int(known[-1]) if len(known) else lags :] = 0.0  # no lag left out, no rounding
    with np.errstate(invalid="ignore", divide="ignore"):  # lags that cancel to exactly nothing
        error = error / size[:, None]
    return replace(nothing, norm=norm, error=error, total=size)


def _outer_norm(outer: Outer) -> float:
    """‖Σ_r δ_r v_rᵀ‖_F; of few rows by two QR decompositions, ‖R_δ R_vᵀ‖_F."""
    rows = len(outer.delta)
    if LAG_FEW_ROWS * rows > min(outer.delta.shape[1], outer.vectors.shape[1]):
        return _norm(outer.matrix())
    factors = [torch.linalg.qr(side.T, mode="r").R for side in (outer.delta, outer.vectors)]
    return _norm(factors[0] @ factors[1].T)


def _norm(matrix: Tensor) -> float:
    return float(row_norms(matrix.reshape(1, -1))[0])


def _rounded(seconds: float) -> str:
    digits = max(0, len(str(int(seconds))) - 2)
    return f"{round(math.ceil(seconds), -digits)}"
