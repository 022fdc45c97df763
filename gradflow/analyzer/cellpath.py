"""The cell path: the product of the forget gates alone, which the joint product holds among others.

Letters: T timesteps, M sequences, H units, n sources, all in processing order.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gradflow.analyzer.order import in_processing_order
from gradflow.recording import Track


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
