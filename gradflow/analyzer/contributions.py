"""How far back: ∂L/∂W lag by lag and what truncation costs; where each loss step t' is felt, ‖∂L_t'/∂s_t‖.

Letters: C_k the part of ∂L/∂W that every loss step brings through the step k before it, T
timesteps, B sequences, K steps that a truncated gradient may see, K = k + 1, m mapped sequences,
n loss steps, t' loss step, t step, both in input time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from gradflow.analyzer.norms import row_norms
from gradflow.analyzer.plan import seconds_words
from gradflow.analyzer.timeline import cuts_before, in_processing_order, input_time
from gradflow.limits import (
    ELEMENT_SECONDS,
    LAG_BYTES,
    LAG_CALL_SECONDS,
    LAG_FEW_ROWS,
    LAG_SPEED,
    LAG_TOLERANCES,
    LAG_WEIGHT_SECONDS,
    LOSS_STEPS,
    THIN_SPEED,
    TRIANGLE_BYTES,
)
from gradflow.recording.source import Backward, Contributions, Outer
from gradflow.recording.track import Track

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
            f"{note}: all of it would take about {seconds_words(price)} s"
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


@dataclass(frozen=True)
class Triangle:
    """log10 of the norms; NaN where t' cannot reach t, −inf where its gradient is exactly 0."""

    log10_norm: np.ndarray  # (state, sequence, loss_step, step)
    loss_steps: np.ndarray  # (n,)


def triangle(track: Track, mapped: Sequence[int], withheld: bool, seconds: float) -> Triangle:
    """log10 ‖∂L_t'/∂s_t‖₂ of the mapped sequences, in float64 whatever the model's dtype.

    Each row is the gradient of one loss step pulled back, so it tells the truth where the total,
    Σ_t' ∂L_t'/∂s_t, need not fade (Werbos 1990). In processing order t' reaches itself and what
    lies before it, back to a cut; in a layer below a bidirectional one both sides. All steps are
    loss steps while there are at most 256, else those at which the loss arrives; where that is too
    many for the budget, every so-manieth of them, counted from the last.

    Args:
        track: one layer in one direction.
        mapped: the sequences.
        withheld: whether what rests on the loss is not to be shown: all NaN.
        seconds: predicted, that it may take.

    >>> import torch, gradflow
    >>> rnn = torch.nn.RNN(1, 1, nonlinearity="relu", bias=False).double()
    >>> for weight in rnn.parameters():
    ...     _ = torch.nn.init.constant_(weight, 0.1)
    >>> with gradflow.record(rnn) as recording:
    ...     rnn(torch.ones(3, 1, 1).double())[0].sum().backward()
    >>> triangle(recording["l0"], [0], False, 1.0).log10_norm[0, 0].round(6).tolist()
    [[0.0, nan, nan], [-1.0, 0.0, nan], [-2.0, -1.0, 0.0]]
    """
    reached = None if withheld else track.reached
    if reached is None:
        steps = _strided(np.arange(track.steps), LOSS_STEPS)
        shape = (len(track.states), len(mapped), len(steps), track.steps)
        return Triangle(np.full(shape, np.nan), steps)
    arrives = reached.cpu()[:, list(mapped)].any(1).numpy()
    steps = np.arange(track.steps)
    if track.steps > LOSS_STEPS:
        steps = steps[arrives] if arrives.any() else steps[-1:]
    most = int(seconds / (_seconds_each(track) * len(mapped)))
    if int(arrives.sum()) > most:
        steps = _strided(steps, most)
    steps = _strided(steps, LOSS_STEPS)
    logs = _logs(track, mapped, steps, arrives[steps])
    _blank(track, mapped, steps, logs)
    return Triangle(logs, steps)


def _strided(steps: np.ndarray, most: int) -> np.ndarray:
    """At most so many of the steps, evenly, the last one among them."""
    stride = -(-len(steps) // max(1, most))
    return steps[::-1][::stride][::-1]


def _seconds_each(track: Track) -> float:
    """Predicted seconds of one loss step of one sequence."""
    width = sum(int(state.shape[2]) for state in track.states.values())
    found = track.contributions()
    if found is not None:
        work = found.work
    elif "weight_hh" in track.weights:  # below a bidirectional layer: both directions of both
        work = 4 * (track.weights["weight_hh"].numel() + track.weights["weight_ih"].numel())
    else:
        work = width**2 if not track.state_shape else 4 * math.prod(track.state_shape)
    return track.steps * (2 * work / THIN_SPEED + 20 * width * ELEMENT_SECONDS)


def _logs(
    track: Track, mapped: Sequence[int], steps: np.ndarray, arrives: np.ndarray
) -> np.ndarray:
    """(state, m, n, T), −inf throughout where nothing arrives."""
    logs = np.full((len(track.states), len(mapped), len(steps), track.steps), -np.inf)
    width = sum(int(state.shape[2]) for state in track.states.values())
    each = max(1, TRIANGLE_BYTES // (8 * 10 * width * track.steps * len(mapped)))
    places = np.flatnonzero(arrives)
    for start in range(0, len(places), each):
        chunk = places[start : start + each]
        found = track.loss_steps(steps[chunk].tolist(), list(mapped))
        assert isinstance(found, Backward)
        for number, state in enumerate(track.states):
            norms = row_norms(found.grads[state]).log10()  # (n, T, m)
            logs[number][:, chunk] = norms.permute(2, 0, 1).cpu().numpy()
    return logs


def _blank(track: Track, mapped: Sequence[int], steps: np.ndarray, logs: np.ndarray) -> None:
    """NaN where a loss step cannot reach: ahead of it in processing order, past a cut, on padding."""
    order, cuts = input_time(track).numpy(), cuts_before(track).numpy()
    lengths = track.lengths.cpu().numpy()
    for place, b in enumerate(mapped):
        when = np.full(track.steps, track.steps)  # when a step is processed
        segment = np.full(track.steps, -1)
        real = order[: lengths[b], b]
        when[real], segment[real] = np.arange(lengths[b]), cuts[: lengths[b], b]
        ahead = when[None, :] > when[steps][:, None]
        both_sides = bool(np.isfinite(logs[:, place][:, ahead]).any())
        out = segment[None, :] != segment[steps][:, None]
        out |= (segment[None, :] < 0) | (segment[steps][:, None] < 0)
        logs[:, place][:, out if both_sides else out | ahead] = math.nan
