"""ln gain along the loss, ‖P(t'←t)ᵀ a_t'‖/‖a_t'‖, and along the cell path, for every pair of steps.

Letters: T timesteps, M sequences, H units, S the state's width, n sources, t source, t' target, a_t'
the state-partial gradient of the loss at t', all in processing order. One sweep backward in time pulls
the vectors of all targets together; each is carried as (vector, log-scale), so nothing underflows.
The cell path is the product of the forget gates alone, which the joint product holds among others.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gradflow.analyzer.blocks import SPEED, Blocks
from gradflow.analyzer.jacobians import HostOperator, operator_of, vector_seconds
from gradflow.analyzer.timeline import in_processing_order
from gradflow.recording.source import Operator
from gradflow.recording.track import Track


def loss_map(
    track: Track,
    sequences: Sequence[int],
    sources: np.ndarray,
    dtype: torch.dtype,
    seconds: float,
    withheld: bool,
) -> tuple[np.ndarray, int]:
    """The map of some sequences, (M, n, T), and of every how many steps the targets are in it.

    The stride of the targets, counted from the last step, is the least power of two at which the
    sweep is predicted to take no longer than `seconds`. All NaN where the gradient is withheld or
    unknown.
    """
    result = np.full((len(sequences), len(sources), track.steps), np.nan)
    vectors = None if withheld else loss_vectors(track, sequences)
    if vectors is None:
        return result, 1
    operator = operator_of(track, dtype, sequences)
    stride = 1
    while stride < operator.length and _seconds(operator, stride) > seconds:
        stride *= 2
    inside = sources[sources < operator.length]
    targets = range(operator.length - 1, -1, -stride)
    gains = log_loss_gains(operator, vectors, inside.tolist(), targets)
    result[:, : len(inside), : operator.length] = gains.numpy()
    return result, stride


def _seconds(operator: HostOperator, stride: int) -> float:
    """Predicted for the pulls of all targets; what the calls of a step take is the same for any."""
    pulls = operator.length * (operator.length / stride) / 2
    if operator.thin:
        return pulls * vector_seconds(operator)
    return 2.0 * pulls * operator.batch * operator.size**2 / SPEED[operator.dtype]


def loss_vectors(track: Track, sequences: Sequence[int]) -> Tensor | None:
    """a_t of some sequences, (T, M, S) float64 in processing order; None where it is not known.

    The part of ∂L/∂s_t that reaches each state with the others of its step held fixed:
    (∂L/∂h_t, ∂L/∂c_t − o_t ⊙ (1 − tanh² c_t) ⊙ W_hrᵀ ∂L/∂h_t) for an LSTM. Padding is NaN.
    """
    grads = track.partial_grads
    if grads is None:
        return None
    parts = [in_processing_order(track, grads[name]) for name in track.states]
    return torch.cat([part[:, list(sequences)].double() for part in parts], dim=-1)


def log_loss_gains(
    operator: Operator, vectors: Tensor, sources: Sequence[int], targets: Sequence[int]
) -> Tensor:
    """ln (‖P(t'←t)ᵀ a_t'‖ / ‖a_t'‖) from each source to each target, (M, n, T) float64.

    0 at t' = t, −inf where the product sends a_t' to exactly 0, NaN where a_t' is 0 or unknown, where
    t' < t, and at targets that were not asked for.

    Args:
        operator: A_t of the M sequences.
        vectors: a_t, (T, M, S).
        sources: steps t.
        targets: steps t'.

    >>> from gradflow.analyzer.jacobians import DenseOperator
    >>> steps = DenseOperator(torch.full((4, 1, 1, 1), 0.5, dtype=torch.float64))
    >>> loss = torch.tensor([0.0, 0.0, 3.0, 1e-200], dtype=torch.float64).view(4, 1, 1)
    >>> log_loss_gains(steps, loss, [0], range(4))[0, 0].exp().round(decimals=9).tolist()
    [nan, nan, 0.25, 0.125]
    """
    batch, length = operator.batch, operator.length
    result = torch.full((batch, len(sources), length), torch.nan, dtype=torch.float64)
    places = {int(t): place for place, t in enumerate(sources)}
    wanted = set(targets)
    level = Blocks(batch, 1, operator.size, operator.dtype, max(1, len(wanted)))
    for t in reversed(range(length)):
        if t in wanted:
            unit = _unit(vectors[t]).to(level.values.dtype)[:, None, None]
            none = torch.zeros(batch, 1, 1, dtype=torch.float64)
            level.add(unit, none, torch.tensor([t]))
        if level.count == 0:
            continue
        gains = level.rescale()
        if t in places:
            result[:, places[t], level.start] = gains
            if t in wanted:  # 0 exactly (never −0), but NaN where there is no direction
                result[:, places[t], t] = 0.0 * result[:, places[t], t].abs()
        if t:
            level.replace(operator.pull(t, level.rows))
    return result


def _unit(vectors: Tensor) -> Tensor:
    """a/‖a‖ of every row, (M, S); NaN where a is 0 or not finite."""
    peak = vectors.abs().amax(-1, keepdim=True)
    scaled = vectors / peak  # 0/0 and inf/inf are NaN
    return scaled / torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)


def log_cell_path(track: Track, sequences: Sequence[int], sources: np.ndarray) -> np.ndarray:
    """ln (‖diag(f_t' ⊙ … ⊙ f_{t+1})‖_F/√H), (M, n, T) float64; all NaN for a cell without it.

    The constant error carrousel of Hochreiter & Schmidhuber 1997: what of ∂c_t'/∂c_t does not pass
    through any gate or h.
    """
    shape = (len(sequences), len(sources), track.steps)
    if track.spec is None or track.spec.paths is None or track.spec.keeper is None:
        return np.full(shape, np.nan)
    gates = in_processing_order(track, track.gates[track.spec.keeper.gate])[
        :, list(sequences)
    ].double()
    return log_diagonal_gains(gates, torch.as_tensor(sources)).numpy()


def log_diagonal_gains(factors: Tensor, sources: Tensor) -> Tensor:
    """rms ln gain of products of diagonal matrices f_t (T, M, H) from each source, (M, n, T).

    Differences of the sums Σ_{τ ≤ t} ln f_τ of every unit. A factor that is exactly 0 is no part of
    the sums but counted, so that it is −∞ for the products across it and nothing for all others.

    >>> gates = torch.tensor([0.9, 0.5, 0.0, 0.5], dtype=torch.float64).view(4, 1, 1)
    >>> log_diagonal_gains(gates, torch.tensor([0, 2]))[0].exp().round(decimals=9).tolist()
    [[1.0, 0.5, 0.0, 0.0], [nan, nan, 1.0, 0.5]]
    """
    factors = factors.transpose(0, 1)  # (M, T, H)
    regular = torch.isfinite(factors) & (factors != 0)
    sums = torch.where(regular, factors, 1.0).abs().log().cumsum(1)
    zeros = (factors == 0).int().cumsum(1)
    bad = (~torch.isfinite(factors)).any(-1)  # NaN, padding too
    broken = bad.int().cumsum(1)
    batch, steps, units = factors.shape
    result = torch.full((batch, len(sources), steps), torch.nan, dtype=torch.float64)
    for t in range(steps):
        begun = int((sources <= t).sum())
        start = sources[:begun]
        logs = sums[:, t, None] - sums[:, start]
        logs = logs.masked_fill(zeros[:, t, None] != zeros[:, start], -torch.inf)
        gains = (logs * 2).logsumexp(-1).div(2) - np.log(units) / 2
        unknown = (broken[:, t, None] != broken[:, start]) | bad[:, t, None]
        result[:, :begun, t] = gains.masked_fill(unknown, torch.nan)
    return result
