"""Blocks of pushed vectors, all of one rank, carried as (matrix, log-scale of every row), and their sweep.

Letters: B sequences, n starts, T timesteps, r rows (the rank kept), S columns, k states with their own
columns. The rows of a block span what its start can still send on: singular values of the block are
those of the product P(t'←t), and as long as nothing was truncated row i is P e_i, for the source's
unit i. A `Sweep` carries the blocks of all starts over the steps.

The sketch truncates blocks that lost rank. A block V then stands for Pᵀ ≈ Q V with Q orthonormal;
Δ = Pᵀ − Q V is what all truncations dropped, pushed on. Q and Δ have orthogonal columns, so that
‖P‖_F² = ‖V‖_F² + ‖Δ‖_F² and ‖V‖₂² ≤ ‖P‖₂² ≤ ‖V‖₂² + ‖Δ‖_F²: a sketch is never too large. ‖Δ‖_F is
estimated by two random vectors gᵀ Δ, E ‖gᵀ Δ‖² = ‖Δ‖_F² (Hutchinson 1989), pushed with the blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gradflow.analyzer.norms import (
    row_norms,
    spectral_by_gram,
    spectral_by_iteration,
    spectral_from,
)
from gradflow.limits import (
    EXACT_ROWS,
    IMAGE_DRIFT,
    LADDER,
    NORM_KEPT,
    NORM_TOLERANCE,
    PRODUCT_FLOAT32,
    PRODUCT_FLOAT64,
    RANK_CALL_SECONDS,
    RESCALE_FLOAT32,
    RESCALE_FLOAT64,
    ROW_DEPTH,
    SKETCH_PROBES,
    SKETCH_SPOILED,
    SKETCH_TRUNCATION,
    SKETCHED,
    SMALL_ROWS,
)
from gradflow.recording.source import Operator

RESCALED = {torch.float64: RESCALE_FLOAT64, torch.float32: RESCALE_FLOAT32}


class Blocks:
    """Every start whose block has the same rank, in one buffer so that a step is one product."""

    def __init__(
        self,
        batch: int,
        rank: int,
        size: int,
        dtype: torch.dtype,
        capacity: int,
        widths: Sequence[int] = (),
        *,
        tolerance: float = 0.0,
    ) -> None:
        self.rank, self.size = rank, size
        self.tolerance = tolerance  # of the spectral norms, 0 where they are not asked for
        # what the iteration carries is pushed with the rows of every block
        self._followed = tolerance > 0 and rank > EXACT_ROWS
        self.height = rank + (NORM_KEPT if self._followed else 0)
        self.widths = list(widths) or [size]  # of the states, side by side in the columns
        self.count = 0
        self._now = torch.empty(batch, capacity, self.height, size, dtype=dtype)
        self._next = torch.empty_like(self._now)
        self.exponent = torch.zeros(batch, 0, rank, dtype=torch.float64)  # powers of two taken out
        self.start = torch.zeros(0, dtype=torch.long)  # (n,) which start
        self.retry = torch.zeros(0, dtype=torch.long)  # (n,) step t of the next truncation
        # of the spectral norm at the last lag: the leading vector, or all that is carried
        self.guess = torch.empty(batch, 0, rank, NORM_KEPT if self._followed else 1, dtype=dtype)
        self._held = torch.zeros(batch, 0, dtype=torch.float64)  # (B, n) powers of the images
        k = len(self.widths)
        # (B, n, k, r, r): Q_aᵀ Q_a of the source's states a, where rows are Qᵀ Pᵀ after a truncation
        self.gram = torch.empty(batch, 0, k, rank, rank, dtype=dtype)
        self._parts = torch.empty(batch, 0, rank, k, dtype=dtype)  # row norms within each state
        self._even = True  # whether all rows of a block have the same power of two
        self._shift: Tensor | None = None  # (B, n, r) powers below the block's, None if even
        self.top = torch.zeros(batch, 0, dtype=torch.float64)  # (B, n) powers of the block
        self.norm = torch.zeros(batch, 0, dtype=dtype)  # (B, n) ‖V‖_F / 2^top

    @property
    def mixed(self) -> bool:
        """Whether rows no longer belong to single units of the source."""
        return self.rank < self.size

    @property
    def _live(self) -> Tensor:
        """(B, n, height, S): the rows of every block, and below them what the iteration carries."""
        return self._now[:, : self.count]

    @property
    def values(self) -> Tensor:
        """The live blocks, (B, n, r, S), rows without their powers of two."""
        return self._live[:, :, : self.rank]

    @property
    def bytes(self) -> int:
        """What its buffers take."""
        return 2 * self._now.numel() * self._now.element_size()

    @property
    def soonest(self) -> int:
        """The step at which some block is due for truncation."""
        return int(self.retry.min()) if self.count else 2**62

    def add(
        self,
        values: Tensor,
        exponent: Tensor,
        start: Tensor,
        retry: Tensor,
        guess: Tensor | None = None,
        gram: Tensor | None = None,
    ) -> None:
        """Append blocks (B, m, r, S) with the powers of two of their rows, (B, m, r)."""
        needed = self.count + values.shape[1]
        if needed > self._now.shape[1]:
            grown = self._now.new_empty(
                len(values), max(needed, 2 * self.count), self.height, self.size
            )
            grown[:, : self.count] = self._live
            self._now, self._next = grown, torch.empty_like(grown)
        self._now[:, self.count : needed, : self.rank] = values
        if self._followed and guess is not None:
            guess = torch.linalg.qr(guess)[0]
            self._now[:, self.count : needed, self.rank :] = guess.mT @ values
        self.count = needed
        self.exponent = torch.cat([self.exponent, exponent], 1)
        self._even &= bool((exponent == exponent[..., :1]).all())
        self.start, self.retry = torch.cat([self.start, start]), torch.cat([self.retry, retry])
        if guess is not None:
            self.guess = torch.cat([self.guess, guess[..., : self.guess.shape[-1]]], 1)
        self._held = torch.cat([self._held, exponent[..., 0]], 1)
        if gram is not None:
            self.gram = torch.cat([self.gram, gram], 1)

    def keep(self, chosen: Tensor) -> None:
        """Forget all blocks but the chosen (n,) ones."""
        kept = self._live[:, chosen]
        self.count = int(chosen.sum())
        self._now[:, : self.count] = kept
        self.exponent, self._held = self.exponent[:, chosen], self._held[:, chosen]
        self.guess = self.guess[:, chosen]
        self.start, self.retry = self.start[chosen], self.retry[chosen]
        if self.gram.shape[1]:
            self.gram = self.gram[:, chosen]

    def advance(self, step: Tensor) -> None:
        """Push every row through one step, given as A_tᵀ (B, S, S)."""
        rows = self.count * self.height
        for b in range(len(step)):
            torch.mm(
                self._now[b, : self.count].view(rows, self.size),
                step[b],
                out=self._next[b, : self.count].view(rows, self.size),
            )
        self._now, self._next = self._next, self._now

    @property
    def rows(self) -> Tensor:
        """All that is pushed: the rows of all live blocks, (B, n·height, S)."""
        return self._live.reshape(len(self._now), -1, self.size)

    def replace(self, rows: Tensor) -> None:
        """Put pushed rows (B, n·height, S) in place of the old ones."""
        self._live[...] = rows.view_as(self._live)

    def rescale(self) -> Tensor:
        """Take powers of two out of rows that left the room; return ln ‖V‖_F with them, (B, n)."""
        if len(self.widths) == 1:
            rows = row_norms(self.values)
            parts = rows[..., None]
        else:
            parts = torch.stack([row_norms(v) for v in self.values.split(self.widths, -1)], -1)
            rows = row_norms(parts)
        power = torch.frexp(rows)[1]
        far = (power.abs() > RESCALED[rows.dtype]) & torch.isfinite(rows) & (rows > 0)
        if bool(far.any()):
            b, n, r = far.nonzero(as_tuple=True)
            shift = -power[far]
            half = shift // 2  # in two halves: 2^shift itself may not be representable
            factor = torch.ldexp(torch.ones_like(rows[far]), half)[:, None]
            rest = torch.ldexp(torch.ones_like(rows[far]), shift - half)[:, None]
            self._now[b, n, r] = self._now[b, n, r] * factor * rest
            parts[far] = parts[far] * factor * rest
            self.exponent[far] -= shift.double()
            self._even = bool((self.exponent == self.exponent[..., :1]).all())
        self.top, self._shift = self.exponent[..., 0], None
        if not self._even:
            self.top, shift = _highest(self.exponent, rows > 0)
            self._shift = shift.to(rows.dtype)
        self._parts = parts
        relative = parts if self._shift is None else parts * self._shift.exp2()[..., None]
        self.norm = row_norms(relative.flatten(2))
        return self._logarithm(self.norm)

    def spectral(self) -> Tensor:
        """ln ‖V‖₂, (B, n), after `rescale`; exact up to 64 rows, beyond iterated."""
        if self.rank == 1:
            return self._logarithm(self.norm)
        good = torch.isfinite(self.norm) & (self.norm > 0)
        result = self.norm.clone()  # zero, infinite and NaN stand for themselves
        for b in range(len(result)):
            if bool(good[b].any()):
                which = slice(None) if bool(good[b].all()) else good[b]
                make = self._iterated if self._followed else self._exact
                result[b, which] = make(b, which)
        return self._logarithm(result)

    def _exact(self, b: int, which: slice | Tensor) -> Tensor:
        blocks = self._aligned(b)[which]
        if self.rank < SMALL_ROWS:
            return spectral_by_gram(blocks)
        norms, self.guess[b, which, :, 0] = spectral_from(blocks, self.guess[b, which, :, 0])
        return norms

    def _iterated(self, b: int, which: slice | Tensor) -> Tensor:
        scale = None if self._shift is None else self._shift[b, which].exp2()
        images = self._images(b)[which]
        drift = (self._held - self.top)[b, which]  # a row may have died or overtaken the others
        near = bool((drift.abs() <= IMAGE_DRIFT).all())
        images *= drift.to(images.dtype).exp2()[:, None, None]
        norms, self.guess[b, which], new = spectral_by_iteration(
            self.values[b, which],
            self.guess[b, which],
            images if near else None,
            scale,
            self.norm[b, which],
            self.tolerance,
        )
        self._images(b)[which] = new
        self._held[b, which] = self.top[b, which]
        return norms

    def _images(self, b: int) -> Tensor:
        return self._live[b, :, self.rank :]

    def between_states(self) -> Tensor:
        """ln ‖P_ba‖_F for states b of the target (first), a of the source, (k, k, B, n).

        After `rescale`. The blocks are those of the product: P_ba = ∂b_t'/∂a_t.
        """
        # (B, n, k source, k target)
        logs = self._mixed_parts() if self.mixed else self._row_parts()
        return logs.permute(3, 2, 0, 1)

    def _row_parts(self) -> Tensor:
        """Sums over the rows of each state of the source, each with powers of two of its own."""
        found, alive = [], (self._parts > 0).any(-1)
        groups = zip(
            self._parts.split(self.widths, 2),
            self.exponent.split(self.widths, 2),
            alive.split(self.widths, 2),
            strict=True,
        )
        for parts, exponent, living in groups:
            top = self.top
            if not self._even:
                top, shift = _highest(exponent, living)
                parts = parts * shift.to(parts.dtype).exp2()[..., None]
            norms = row_norms(parts.mT)
            found.append(norms.double().log() + top[..., None] * math.log(2))
        return torch.stack(found, 2)

    def _mixed_parts(self) -> Tensor:
        """‖Q_a V_b‖_F² = tr(Q_aᵀQ_a V_b V_bᵀ): what truncated rows still say of each state."""
        squares = [(part @ part.mT).flatten(-2) for part in self._aligned().split(self.widths, -1)]
        traces = self.gram.flatten(-2) @ torch.stack(squares, -1)  # (B, n, k source, k target)
        return traces.clamp_min(0).sqrt().double().log() + self.top[..., None, None] * math.log(2)

    def align(self) -> None:
        """Give all rows of a block the same power of two, after `rescale`."""
        if self._shift is not None:
            self.values[...] = self._aligned()
        self.exponent = self.top[..., None].expand_as(self.exponent).clone()
        self._even, self._shift = True, None

    def _aligned(self, b: int | slice = slice(None)) -> Tensor:
        if self._shift is None:
            return self.values[b]
        return self.values[b] * self._shift[b].exp2()[..., None]

    def _logarithm(self, norm: Tensor) -> Tensor:
        return norm.double().log() + self.top * math.log(2)


def _highest(exponent: Tensor, alive: Tensor) -> tuple[Tensor, Tensor]:
    """The power of two of the largest living row, (B, n), and how far the rows lie below it."""
    top = torch.where(alive, exponent, -math.inf).amax(-1)
    top = torch.where(torch.isfinite(top), top, torch.zeros_like(top))
    return top, (exponent - top[..., None]).clamp(-ROW_DEPTH, 0)


SPEED = {torch.float64: PRODUCT_FLOAT64, torch.float32: PRODUCT_FLOAT32}


@dataclass
class Sweep:
    """The sources of one sweep, their blocks by rank, and what was written so far."""

    operator: Operator
    sources: Tensor  # (n,) steps t, ascending
    sketch: bool
    generator: torch.Generator
    result: dict[str, Tensor]  # norm -> (B, n, T), "blocks" -> (k·k, B, n, T)
    widths: tuple[int, ...]  # of the states, none where blocks are not asked for
    levels: dict[int, Blocks] = field(default_factory=dict)
    dropped: Blocks | None = None  # random vectors through what a sketch dropped of each start
    spent: float = 0.0  # predicted seconds so far

    @property
    def ladder(self) -> list[int]:
        """The ranks that a block may have, largest first."""
        ranks = [self.operator.size]
        while self.sketch and ranks[-1] > 1:
            ranks.append(max(1, int(ranks[-1] * LADDER)))
        return ranks

    def level(self, rank: int, capacity: int) -> Blocks:
        """The blocks of that rank."""
        if rank not in self.levels:
            self.levels[rank] = self.blocks(rank, capacity)
        return self.levels[rank]

    def blocks(self, rank: int, capacity: int) -> Blocks:
        """No blocks yet."""
        batch, size = self.operator.batch, self.operator.size
        tolerance = SKETCHED if self.sketch else NORM_TOLERANCE
        if "spectral" not in self.result:
            tolerance = 0.0
        return Blocks(
            batch, rank, size, self.operator.dtype, capacity, self.widths, tolerance=tolerance
        )

    @property
    def live(self) -> list[Blocks]:
        """All that a step pushes."""
        every = [*self.levels.values(), *([] if self.dropped is None else [self.dropped])]
        return [level for level in every if level.count]


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
