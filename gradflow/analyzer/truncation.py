"""The sketch: blocks that lost rank are truncated, and what was dropped is followed.

Letters: B sequences, n starts, r rows, S columns. A block V stands for Pᵀ ≈ Q V with Q orthonormal;
Δ = Pᵀ − Q V is what all truncations dropped, pushed on. Q and Δ have orthogonal columns, so that
‖P‖_F² = ‖V‖_F² + ‖Δ‖_F² and ‖V‖₂² ≤ ‖P‖₂² ≤ ‖V‖₂² + ‖Δ‖_F²: a sketch is never too large. ‖Δ‖_F is
estimated by two random vectors gᵀ Δ, E ‖gᵀ Δ‖² = ‖Δ‖_F² (Hutchinson 1989), pushed with the blocks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gradflow.analyzer.blocks import Blocks
from gradflow.analyzer.sweep import SPEED, Sweep
from gradflow.limits import RANK_CALL_SECONDS, SKETCH_PROBES, SKETCH_SPOILED, SKETCH_TRUNCATION


def truncate(sweep: Sweep, t: int) -> None:
    """Move every block whose time has come to the rank it still needs."""
    moved: list[tuple[int, tuple[Tensor, ...]]] = []
    ladder = sweep.ladder
    for rank, level in list(sweep.levels.items()):
        if rank == 1 or t < level.soonest:
            continue
        level.align()
        due = level.retry <= t
        lag = (t - sweep.sources[level.start])[due]
        target = ladder[ladder.index(rank) + 1]
        values = level.values[:, due]
        work = 6.0 * rank * target * level.size * values.shape[0] * values.shape[1]
        sweep.spent += 4 * RANK_CALL_SECONDS + 2 * work / SPEED[level.norm.dtype]
        rows, basis, needed = _compress(values, target, sweep.generator)
        level.retry[due] = t + 2 + lag // 2
        if not bool((needed <= target).any()):
            continue
        fitting = torch.tensor([_fitting(ladder, int(n)) for n in needed])
        for fits in sorted(set(fitting[needed <= target].tolist())):
            part = fitting == fits
            piece = due.clone()
            piece[due] = part
            turn = basis[:, part, :, :fits]
            _follow(sweep, level, piece, turn, rows[:, part, :fits])
            moved.append(
                (
                    fits,
                    (
                        rows[:, part, :fits],
                        level.exponent[:, piece, :fits],
                        level.start[piece],
                        level.retry[piece],
                        turn.mT @ level.guess[:, piece],
                        *([_turned_gram(level, piece, turn)] if sweep.widths else []),
                    ),
                )
            )
        gone = due.clone()
        gone[due] = needed <= target
        level.keep(~gone)
    for fits, fields in moved:
        sweep.level(fits, 4).add(*fields)


def log_dropped(sweep: Sweep) -> Tensor | None:
    """ln ‖Δ‖_F of every source, (B, n), −∞ where nothing was dropped; None if nowhere."""
    if sweep.dropped is None:
        return None
    shape = (sweep.operator.batch, len(sweep.sources))
    result = torch.full(shape, -math.inf, dtype=torch.float64)
    result[:, sweep.dropped.start] = sweep.dropped.rescale() - math.log(SKETCH_PROBES) / 2
    return result


def known(log_gain: Tensor, dropped: Tensor | None) -> Tensor:
    """The gains, NaN where what was dropped may count for more than 5 % of them."""
    if dropped is None:
        return log_gain
    return log_gain.masked_fill(dropped > log_gain + math.log(SKETCH_SPOILED), math.nan)


def _fitting(ladder: list[int], needed: int) -> int:
    return min(rank for rank in ladder if rank >= min(needed, ladder[0]))


def _follow(sweep: Sweep, level: Blocks, piece: Tensor, turn: Tensor, rows: Tensor) -> None:
    """Add gᵀ (V − B Bᵀ V) to the vectors through what was dropped of these starts."""
    values, start = level.values[:, piece], level.start[piece]
    shape = (*values.shape[:2], SKETCH_PROBES, level.rank)
    probe = torch.randn(shape, generator=sweep.generator, dtype=values.dtype)
    lost = probe @ values - (probe @ turn) @ rows
    exponent = level.exponent[:, piece, :1]
    if sweep.dropped is None:
        sweep.dropped = sweep.blocks(SKETCH_PROBES, 4)
    dropped = sweep.dropped
    new = start[~torch.isin(start, dropped.start)]
    if len(new):
        nothing = lost.new_zeros(len(lost), len(new), SKETCH_PROBES, level.size)
        least = torch.full((len(lost), len(new), SKETCH_PROBES), -math.inf, dtype=torch.float64)
        dropped.add(nothing, least, new, new)
    place = (start[:, None] == dropped.start[None, :]).int().argmax(1)
    before = dropped.exponent[:, place]
    power = torch.maximum(before, exponent)
    old = dropped.values[:, place] * (before - power).exp2().to(lost.dtype)[..., None]
    added = lost * (exponent - power).exp2().to(lost.dtype)[..., None]
    dropped.values[:, place] = old + added
    dropped.exponent[:, place] = power


def _turned_gram(level: Blocks, piece: Tensor, turn: Tensor) -> Tensor:
    """Q_aᵀ Q_a after Q is turned by the basis that is kept, (B, n, k, r, r)."""
    if level.mixed:
        return turn[:, :, None].mT @ level.gram[:, piece] @ turn[:, :, None]
    return torch.stack([part.mT @ part for part in turn.split(level.widths, 2)], 2)


def _compress(
    values: Tensor, target: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows that keep all but SKETCH_TRUNCATION of ‖V‖_F, by a random range finder (Halko et al. 2011).

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
    allowed = (SKETCH_TRUNCATION * whole.double()).square()[..., None]
    needed = (tail > allowed).sum(-1)  # target + 1 where even all rows lose too much
    unfit = ~finite  # a block with NaN or Inf stays as it is
    needed = torch.where(unfit, torch.full_like(needed, target + 1), needed)
    return rows, basis, needed.amax(0).clamp_min(1)
