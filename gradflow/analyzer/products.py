"""ln gain of the products P(t'←t) = A_t' … A_{t+1} for many starts at once.

Letters: T timesteps, B sequences, S the state's width, t source, t' target, k = t' − t lag, all in
processing order. All starts advance together: at step t' one matrix product pushes the blocks of
every start t < t'. A block is carried as (matrix, log-scale), so nothing under- or overflows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from gradflow.analyzer.blocks import Blocks
from gradflow.analyzer.jacobians import DenseOperator, transposed_step
from gradflow.analyzer.norms import EXACT_ROWS
from gradflow.errors import InputError, must_be
from gradflow.recording import Operator

NORMS = ("spectral", "rms")
TRUNCATION = 1e-3  # of a block's Frobenius norm, the most one truncation drops
LADDER = 0.7  # each rank a sketch may have, as a share of the one above
CHUNK = 768 * 2**20  # bytes of blocks at a time
SPEED = {torch.float64: 30e9, torch.float32: 100e9}  # operations a second on two cores
FIRST = 4  # lag of the first truncation
CALLS = 2e-4  # seconds that the calls for one step of one rank take, however small
SEED = 0


@dataclass
class Sweep:
    """What one sweep over the steps needs to know and where it writes."""

    operator: Operator
    sources: Tensor  # (n,) steps t, ascending
    norms: tuple[str, ...]
    sketch: bool
    generator: torch.Generator
    result: dict[str, Tensor]  # norm -> (B, n, T)
    levels: dict[int, Blocks]
    ladder: list[int]
    spent: float = 0.0  # predicted seconds so far


def log_gain_map(jacobians: Tensor, norm: str = "spectral") -> Tensor:
    """ln gain of every product P(t'←t) = A_t' … A_{t+1}.

    Spectral is ln ‖P‖₂, exact for S ≤ 64 and beyond within 1e-4; rms is ln ‖P‖_F/√S, exact.
    The map is not ∂h_t'/∂h_t of an LSTM unless the Jacobians are those of the joint state (h, c).

    Args:
        jacobians: (T, B, S, S), A_t in processing order; padded steps are NaN matrices.
        norm: "spectral" or "rms".

    Returns:
        (B, T, T) float64 nats: [b, t, t'] is 0 at t' = t, NaN where t' < t or at padding, −inf
        where the product is exactly 0. A at index 0 leads into s_0 and takes part in none.

    Raises:
        InputError: another shape or another norm.

    >>> decay = torch.full((4, 1, 1, 1), 0.5, dtype=torch.float64)
    >>> log_gain_map(decay)[0, 0].div(math.log(2)).round(decimals=9).tolist()
    [0.0, -1.0, -2.0, -3.0]
    """
    if norm not in NORMS:
        raise InputError(must_be("norm", "'spectral' or 'rms'", repr(norm), "choose one of them"))
    operator = _computable(DenseOperator(jacobians))
    result = log_gains(operator, range(operator.length), (norm,))[norm]
    padded = jacobians.isnan().flatten(2).any(-1).T  # (B, T)
    result.diagonal(dim1=1, dim2=2)[padded] = torch.nan
    return result


def _computable(operator: DenseOperator) -> DenseOperator:
    if operator.dtype in (torch.float32, torch.float64):
        return operator
    return DenseOperator(operator.jacobians.float())  # no half-precision decompositions on a CPU


def log_gains(
    operator: Operator,
    sources: Iterable[int],
    norms: tuple[str, ...] = NORMS,
    *,
    sketch: bool = False,
    seed: int = SEED,
    spend: Callable[[float], None] | None = None,
) -> dict[str, Tensor]:
    """ln gain from each source to every target: norm -> (B, n, T) float64.

    With `sketch` a block is truncated as it loses rank, dropping at most 1e-3 of its norm a time.
    `spend` is told the predicted seconds of each step.
    """
    starts = torch.as_tensor(list(sources), dtype=torch.long)
    steps = {
        norm: torch.full(
            (operator.batch, len(starts), operator.length), torch.nan, dtype=torch.float64
        )
        for norm in norms
    }
    size = operator.size
    each = operator.batch * size**2 * torch.finfo(operator.dtype).bits // 8 * 2
    many = len(starts) if sketch else max(1, CHUNK // each)
    for first in range(0, len(starts), many):
        chosen = slice(first, first + many)
        sweep = Sweep(
            operator,
            starts[chosen],
            norms,
            sketch,
            torch.Generator().manual_seed(seed),
            {norm: values[:, chosen] for norm, values in steps.items()},
            {},
            _ladder(size) if sketch else [size],
        )
        _run(sweep, spend)
    return steps


def _ladder(size: int) -> list[int]:
    ranks = [size]
    while ranks[-1] > 1:
        ranks.append(max(1, int(ranks[-1] * LADDER)))
    return ranks


def _run(sweep: Sweep, spend: Callable[[float], None] | None) -> None:
    operator, sources = sweep.operator, sweep.sources
    places = {int(t): place for place, t in enumerate(sources)}
    for t in range(int(sources[0]), operator.length):
        before = sweep.spent
        _advance(sweep, t, places.get(t - 1))
        if t in places:
            for values in sweep.result.values():
                values[:, places[t], t] = 0.0
        for level in sweep.levels.values():
            _write(sweep, level, t)
        if sweep.sketch:
            _truncate(sweep, t)
        if spend is not None:
            spend(sweep.spent - before)


def _advance(sweep: Sweep, t: int, begun: int | None) -> None:
    """Push every block through A_t; the block of a start one step back is A_tᵀ itself."""
    operator = sweep.operator
    live = [level for level in sweep.levels.values() if level.count]
    rows = sum(level.count * level.rank for level in live)
    if begun is None and rows < operator.size:  # cheaper than to write A_t out
        if live:
            pushed = operator.push(t, torch.cat([level.rows for level in live], 1))
            shares = pushed.split([level.count * level.rank for level in live], 1)
            for level, share in zip(live, shares, strict=True):
                level.replace(share)
    else:
        step = transposed_step(operator, t)
        rows += operator.size
        for level in live:
            level.advance(step)
        if begun is not None:
            _begin(sweep, begun, step)
    work = 2.0 * rows * operator.size**2 * operator.batch
    sweep.spent += work / SPEED[operator.dtype] + CALLS


def _begin(sweep: Sweep, place: int, step: Tensor) -> None:
    batch, size = sweep.operator.batch, sweep.operator.size
    if size not in sweep.levels:
        capacity = 4 if sweep.sketch else len(sweep.sources)
        sweep.levels[size] = Blocks(batch, size, size, step.dtype, capacity)
    guess = torch.randn(batch, 1, size, 4, generator=sweep.generator, dtype=step.dtype)
    sweep.levels[size].add(
        step[:, None],
        torch.zeros(batch, 1, dtype=torch.float64),
        torch.tensor([place]),
        sweep.sources[place : place + 1] + FIRST,
        guess,
    )


def _write(sweep: Sweep, level: Blocks, t: int) -> None:
    if level.count == 0:
        return
    sweep.spent += CALLS
    total = level.rescale()
    if "rms" in sweep.result:
        sweep.result["rms"][:, level.start, t] = total - math.log(sweep.operator.size) / 2
    if "spectral" in sweep.result:
        sweep.result["spectral"][:, level.start, t] = level.spectral(sweep.generator)
        work = spectral_work(level.rank, level.size) * level.count * sweep.operator.batch
        sweep.spent += work / SPEED[sweep.operator.dtype]


def spectral_work(rank: int, size: int) -> float:
    """Operations that one spectral norm of a (rank, size) block is worth."""
    if rank == 1:
        return 0.0
    if rank <= EXACT_ROWS:
        return 2.0 * rank**2 * size + 14.0 * rank**3 + 2e5
    return 900.0 * rank * size + 5e6


def _truncate(sweep: Sweep, t: int) -> None:
    """Move every block whose time has come to the rank it still needs."""
    moved: list[tuple[int, tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]] = []
    for rank, level in list(sweep.levels.items()):
        if rank == 1 or t < level.soonest:
            continue
        due = level.retry <= t
        lag = (t - sweep.sources[level.start])[due]
        target = sweep.ladder[sweep.ladder.index(rank) + 1]
        values, guess = level.values[:, due], level.guess[:, due]
        work = 6.0 * rank * target * level.size * values.shape[0] * values.shape[1]
        sweep.spent += 4 * CALLS + 2 * work / SPEED[level.norm.dtype]
        smaller, basis, needed = _compress(values, target, sweep.generator)
        level.retry[due] = t + 2 + lag // 2
        gone = due.clone()
        gone[due] = needed <= target
        if not bool(gone.any()):
            continue
        inside = needed <= target
        for fits in sorted({_fitting(sweep.ladder, int(n)) for n in needed[inside]}):
            part = inside & torch.tensor([_fitting(sweep.ladder, int(n)) == fits for n in needed])
            piece = torch.zeros_like(due)
            piece[due] = part
            moved.append(
                (
                    fits,
                    (
                        smaller[:, part, :fits],
                        level.exponent[:, piece],
                        level.start[piece],
                        level.retry[piece],
                        (basis.mT @ guess)[:, part, :fits],
                    ),
                )
            )
        level.keep(~gone)
    for fits, fields in moved:
        if fits not in sweep.levels:
            batch, size = sweep.operator.batch, sweep.operator.size
            sweep.levels[fits] = Blocks(batch, fits, size, sweep.operator.dtype, 4)
        sweep.levels[fits].add(*fields)


def _fitting(ladder: list[int], needed: int) -> int:
    return min(rank for rank in ladder if rank >= needed)


def _compress(
    values: Tensor, target: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows that keep all but 1e-3 of ‖V‖_F, by a random range finder (Halko et al. 2011).

    Returns the (B, n, target, S) rows Qᵀ V, the basis Q, and how many of them are needed, (n,).
    """
    probe = torch.randn(values.shape[-1], target, generator=generator, dtype=values.dtype)
    finite = torch.isfinite(values).all(-1).all(-1)
    clean = torch.where(finite[..., None, None], values, torch.zeros_like(values))
    basis = torch.linalg.qr(clean @ probe)[0]
    rows = basis.mT @ clean
    whole = torch.linalg.vector_norm(clean, dim=(-2, -1))
    lost = torch.linalg.vector_norm(clean - basis @ rows, dim=(-2, -1))
    each = rows.double().square().sum(-1)  # (B, n, target)
    # what is lost by keeping the first j rows, j = 0 … target
    tail = each.flip(-1).cumsum(-1).flip(-1)
    tail = (
        torch.cat([tail, torch.zeros_like(tail[..., :1])], -1) + lost.double().square()[..., None]
    )
    allowed = (TRUNCATION * whole.double()).square()[..., None]
    needed = (tail > allowed).sum(-1)  # target + 1 where even all rows lose too much
    unfit = ~finite  # a block with NaN or Inf stays as it is
    needed = torch.where(unfit, torch.full_like(needed, target + 1), needed)
    return rows, basis, needed.amax(0).clamp_min(1)
