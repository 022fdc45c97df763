"""The four paths of an LSTM's cell state from one step to the next, and how much each passes on.

Letters: T timesteps, M sequences, H units, P the width of h; U_• a gate's block of W_hh, W_hr the
projection (the identity without one). Processing order but for the result, which is in input time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradflow.analyzer.iteration import spectral_by_iteration
from gradflow.analyzer.jacobians import HostOperator, operator_of
from gradflow.analyzer.loss import masked_median
from gradflow.analyzer.norms import spectral_by_gram
from gradflow.analyzer.order import cuts_before, in_processing_order, input_time
from gradflow.limits import EXACT_ROWS, NORM_KEPT, PATH_SECONDS, PATHS_AGREED
from gradflow.recording import Track

PATHS = ("forget gate", "through f", "through i", "through g", "total")


@dataclass(frozen=True)
class CellPaths:
    """∂c_t/∂c_{t−1} = diag(f) + Σ over f, i, g of diag(factor) U_• W_hr diag(before)."""

    forget: Tensor  # (T, M, H): f_t
    factors: Tensor  # (T, M, 3, H): ∂c_t/∂a_f, ∂c_t/∂a_i, ∂c_t/∂a_g
    before: Tensor  # (T, M, H): o_{t−1} (1 − tanh² c_{t−1}); NaN at the first step
    recurrent: Tensor  # (3, H, H): U_f W_hr, U_i W_hr, U_g W_hr
    projection: Tensor | None  # (P, H): W_hr

    def through(self, t: int) -> Tensor:
        """The paths through f, i and g of step t, (M, 3, H, H)."""
        left = self.factors[t].unsqueeze(-1) * self.recurrent
        return left * self.before[t][:, None, None, :]

    def total(self, t: int) -> Tensor:
        """Their sum with the forget path, (M, H, H)."""
        return self.through(t).sum(1) + torch.diag_embed(self.forget[t])


def cell_paths(track: Track, sequences: Sequence[int]) -> CellPaths:
    """The factors of the four paths of an LSTM track, in float64 on the CPU.

    Graph meaning with o_{t−1} held fixed: c_{t−1} moves h_{t−1} = W_hr (o_{t−1} ⊙ tanh c_{t−1}), and
    h_{t−1} moves the gates. One step only: the product of these matrices is not ∂c_t'/∂c_t, since it
    drops the path through o.
    """
    chosen = list(sequences)

    def ordered(values: Tensor) -> Tensor:
        return in_processing_order(track, values)[:, chosen].double()

    i, f, g, o = (ordered(track.gates[name]) for name in "ifgo")
    c = ordered(track.states["c"])
    started = track.initial["c"].detach().cpu()[chosen].double()
    previous = torch.cat([started[None], c[:-1]])
    output = o * (1 - c.tanh().square())
    u_i, u_f, u_g, _ = track.weights["weight_hh"].detach().cpu().double().chunk(4)
    recurrent = torch.stack([u_f, u_i, u_g])
    projection = track.weights.get("weight_hr")
    if projection is not None:
        projection = projection.detach().cpu().double()
        recurrent = recurrent @ projection
    return CellPaths(
        forget=f,
        factors=torch.stack([previous * f * (1 - f), g * i * (1 - i), i * (1 - g.square())], dim=2),
        before=torch.cat([torch.full_like(output[:1], math.nan), output[:-1]]),
        recurrent=recurrent,
        projection=projection,
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
    if track.cell != "LSTM":
        return np.zeros((0, track.steps))
    paths, operator = cell_paths(track, sequences), operator_of(track, sequences=sequences)
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
