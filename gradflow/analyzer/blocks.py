"""Blocks of pushed vectors, carried as (matrix, log-scale of every row), and their sweep.

Letters: B sequences, n starts, T timesteps, r rows, S columns, k states with their own columns. Row i of
the block of a start is P(t'←t) e_i, for the source's unit i; a block may also be a single vector. A
`Sweep` carries the blocks of all starts over the steps.
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
    within,
)
from gradflow.limits import (
    EXACT_ROWS,
    IMAGE_DRIFT,
    NORM_KEPT,
    NORM_TOLERANCE,
    PRODUCT_FLOAT32,
    PRODUCT_FLOAT64,
    RESCALE_FLOAT32,
    RESCALE_FLOAT64,
    ROW_DEPTH,
    SMALL_ROWS,
)
from gradflow.recording.source import Operator

RESCALED = {torch.float64: RESCALE_FLOAT64, torch.float32: RESCALE_FLOAT32}


class Blocks:
    """The blocks of all starts, in one buffer so that a step is one product."""

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
        # of the spectral norm at the last lag: the leading vector, or all that is carried
        self.guess = torch.empty(batch, 0, rank, NORM_KEPT if self._followed else 1, dtype=dtype)
        self._held = torch.zeros(batch, 0, dtype=torch.float64)  # (B, n) powers of the images
        k = len(self.widths)
        self._parts = torch.empty(batch, 0, rank, k, dtype=dtype)  # row norms within each state
        self._even = True  # whether all rows of a block have the same power of two
        self._shift: Tensor | None = None  # (B, n, r) powers below the block's, None if even
        self.top = torch.zeros(batch, 0, dtype=torch.float64)  # (B, n) powers of the block
        self.norm = torch.zeros(batch, 0, dtype=dtype)  # (B, n) ‖V‖_F / 2^top

    @property
    def _live(self) -> Tensor:
        """(B, n, height, S): the rows of every block, and below them what the iteration carries."""
        return self._now[:, : self.count]

    @property
    def values(self) -> Tensor:
        """The live blocks, (B, n, r, S), rows without their powers of two."""
        return self._live[:, :, : self.rank]

    def add(
        self,
        values: Tensor,
        exponent: Tensor,
        start: Tensor,
        guess: Tensor | None = None,
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
        self.start = torch.cat([self.start, start])
        if guess is not None:
            self.guess = torch.cat([self.guess, guess[..., : self.guess.shape[-1]]], 1)
        self._held = torch.cat([self._held, exponent[..., 0]], 1)

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
        room = RESCALED[rows.dtype]
        if not within(rows, 2.0**-room, 2.0**room):
            self._take_out(rows, parts, room)
        self.top, self._shift = self.exponent[..., 0], None
        if not self._even:
            self.top, shift = _highest(self.exponent, rows > 0)
            self._shift = shift.to(rows.dtype)
        self._parts = parts
        relative = parts if self._shift is None else parts * self._shift.exp2()[..., None]
        self.norm = row_norms(relative.flatten(2))
        return self._logarithm(self.norm)

    def _take_out(self, rows: Tensor, parts: Tensor, room: int) -> None:
        power = torch.frexp(rows)[1]
        far = (power.abs() > room) & torch.isfinite(rows) & (rows > 0)
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
        # sums over the rows of each state of the source, each with powers of two of its own
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
        return torch.stack(found, 2).permute(3, 2, 0, 1)

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
    """The sources of one sweep, their blocks, and what was written so far."""

    operator: Operator
    sources: Tensor  # (n,) steps t, ascending
    generator: torch.Generator
    result: dict[str, Tensor]  # norm -> (B, n, T), "blocks" -> (k·k, B, n, T)
    widths: tuple[int, ...]  # of the states, none where blocks are not asked for
    blocks: Blocks = field(init=False)

    def __post_init__(self) -> None:
        tolerance = NORM_TOLERANCE if "spectral" in self.result else 0.0
        batch, size, capacity = self.operator.batch, self.operator.size, len(self.sources)
        self.blocks = Blocks(
            batch, size, size, self.operator.dtype, capacity, self.widths, tolerance=tolerance
        )
