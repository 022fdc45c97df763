"""Where the loss acts: how strongly each loss step t' is felt at each step t, ‖∂L_t'/∂s_t‖.

Letters: T timesteps, m mapped sequences, n loss steps, t' loss step, t step, both in input time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gradflow.analyzer.norms import row_norms
from gradflow.analyzer.order import cuts_before, input_time
from gradflow.limits import ELEMENT_SECONDS, LOSS_STEPS, THIN_SPEED, TRIANGLE_BYTES
from gradflow.recording import Backward, Track


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
