"""The four paths of an LSTM's cell state from one step to the next, and how much each passes on.

Letters: T timesteps, M sequences, H units, P the width of h; U_• a gate's block of W_hh, W_hr the
projection (the identity without one). Processing order but for the result, which is in input time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gradflow.analyzer.jacobians import HostOperator, operator_of
from gradflow.analyzer.loss import masked_median
from gradflow.analyzer.norms import spectral_by_gram, spectral_by_iteration
from gradflow.analyzer.timeline import cuts_before, in_processing_order, input_time
from gradflow.cells.spec import CellPaths
from gradflow.limits import EXACT_ROWS, NORM_KEPT, PATH_SECONDS, PATHS_AGREED
from gradflow.recording.track import Track

PATHS = ("forget gate", "through f", "through i", "through g", "total")


def cell_paths(track: Track, sequences: Sequence[int]) -> CellPaths | None:
    """The factors of the four paths of a cell state, in float64 on the CPU; None without one.

    One step only: the product of these matrices is not ∂c_t'/∂c_t, since it drops the path through o.
    """
    if track.spec is None or track.spec.paths is None:
        return None
    chosen = list(sequences)

    def ordered(values: Tensor) -> Tensor:
        return in_processing_order(track, values)[:, chosen].double()

    return track.spec.paths(
        {name: ordered(gate) for name, gate in track.gates.items()},
        {name: ordered(state) for name, state in track.states.items()},
        {name: start.detach().cpu()[chosen].double() for name, start in track.initial.items()},
        {name: weight.detach().cpu().double() for name, weight in track.weights.items()},
    )


def path_gains(track: Track, sequences: Sequence[int], share: float = 1.0) -> np.ndarray:
    """‖term‖₂ of the four paths and of their sum, (path, step), median over the sequences.

    The forget path is the constant error carrousel (Hochreiter & Schmidhuber 1997); the sum may
    exceed 1. NaN at the first step (there is no o₀), across cuts, where a loop does something to the
    states between two steps, and, if the norms would take longer than 1 s, but at every n-th step.
    Spectral norms are exact up to H = 64, else to 1e-4.

    Args:
        track: one layer in one direction.
        sequences: which sequences to take.
        share: of the time budget that this layer may use.

    Returns:
        In the order of `PATHS` and in input time; (0, T) for a cell that is no LSTM.

    >>> import torch, gradflow
    >>> lstm = torch.nn.LSTM(1, 3)
    >>> for weight in lstm.parameters():  # no recurrent weights: the forget path alone is left
    ...     _ = torch.nn.init.zeros_(weight)
    >>> with gradflow.record(lstm) as recording:
    ...     lstm(torch.zeros(4, 1, 1))[0].sum().backward()
    >>> path_gains(recording["l0"], [0])[:, 1].tolist()  # σ(0) = 0.5
    [0.5, 0.0, 0.0, 0.0, 0.5]
    """
    paths = cell_paths(track, sequences)
    if paths is None:
        return np.zeros((0, track.steps))
    operator = operator_of(track, sequences=sequences)
    length, count, hidden = operator.length, len(sequences), paths.forget.shape[-1]
    stride = max(1, math.ceil(_seconds(length, count, hidden) / (PATH_SECONDS * share)))
    usable = _usable(track, sequences)
    gains = torch.full((len(PATHS), track.steps, count), math.nan, dtype=torch.float64)
    start = torch.linalg.qr(_random(count * 4, hidden).float())[0]
    for t in range(1, length, stride):
        through, total = paths.through(t), paths.total(t)
        good = usable[t] & torch.isfinite(total).all(-1).all(-1)
        good &= torch.isfinite(through).flatten(1).all(-1)
        good &= _adds_up(paths, operator, t, total)
        blocks = torch.cat([through, total[:, None]], 1)  # (M, 4, H, H)
        safe = torch.where(good[:, None, None, None], blocks, torch.zeros_like(blocks))
        norms, start = _spectral(safe.flatten(0, 1), start)
        gains[0, t, good] = paths.forget[t].amax(-1)[good]
        gains[1:, t, good] = norms.view(count, 4)[good].T
    return _median_by_input_time(track, sequences, gains.numpy())


def _usable(track: Track, sequences: Sequence[int]) -> Tensor:
    """(T, M): real steps that have a past."""
    cut = cuts_before(track).diff(dim=0, prepend=torch.zeros(1, track.batch, dtype=torch.int)) > 0
    real = torch.arange(track.steps)[:, None] < track.lengths.cpu()
    return (real & ~cut)[:, list(sequences)]


def _adds_up(paths: CellPaths, operator: HostOperator, t: int, total: Tensor) -> Tensor:
    """(M,): whether the paths do to a random change of c_{t−1} what the recorded step does."""
    change = _random(1, total.shape[-1])[0, :, :1].T.expand(len(total), 1, -1)  # (M, 1, H)
    moved = paths.before[t].unsqueeze(1) * change
    dh = moved if paths.projection is None else moved @ paths.projection.T
    joint = torch.cat([dh, change], -1).nan_to_num()
    done = operator.push(t, joint)[..., dh.shape[-1] :]
    expected = change @ total.mT
    error = torch.linalg.vector_norm(done - expected, dim=-1)
    return (error <= PATHS_AGREED * torch.linalg.vector_norm(done, dim=-1).clamp_min(1e-30))[:, 0]


def _spectral(blocks: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """Spectral norms of (N, H, H), and where the iteration of the next step starts."""
    if blocks.shape[-1] <= EXACT_ROWS:
        return spectral_by_gram(blocks), start
    alive = blocks.flatten(1).any(-1)
    norms = blocks.new_zeros(len(blocks))
    if bool(alive.any()):
        top, rows, _ = spectral_by_iteration(blocks[alive].float(), start[alive])
        start = start.clone()
        norms[alive], start[alive] = top.double(), rows
    return norms, start


def _random(count: int, hidden: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    width = min(NORM_KEPT, hidden)
    return torch.randn(count, hidden, width, generator=generator, dtype=torch.float64)


def _seconds(steps: int, count: int, hidden: int) -> float:
    """Predicted seconds for the norms of every step."""
    each = 6e-5 + 3e-10 * hidden**3 if hidden <= EXACT_ROWS else 4e-4 + 3.5e-8 * hidden**2
    return steps * (3e-4 + count * 4 * each)


def _median_by_input_time(track: Track, sequences: Sequence[int], gains: np.ndarray) -> np.ndarray:
    """(path, step) from (path, processed step, sequence)."""
    index = input_time(track)[:, list(sequences)].numpy()
    turned = np.full_like(gains, math.nan)
    columns = np.broadcast_to(np.arange(len(sequences)), index.shape)
    turned[:, index, columns] = gains
    return np.stack([masked_median(path, ~np.isnan(path)) for path in turned])
