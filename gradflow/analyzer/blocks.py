"""Blocks of pushed vectors, all of one rank, carried as (matrix, log-scale).

Letters: B sequences, n starts, r rows (the rank kept), S columns. The rows of a block span what its
start can still send on: singular values of the block are those of the product P(t'←t).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gradflow.analyzer.norms import (
    EXACT_ROWS,
    WIDTH,
    frobenius,
    spectral_by_gram,
    spectral_by_iteration,
)

ROOM = {torch.float64: 32, torch.float32: 8}  # powers of two a norm may leave 1 before rescaling


class Blocks:
    """Every start whose block has the same rank, in one buffer so that a step is one product."""

    def __init__(self, batch: int, rank: int, size: int, dtype: torch.dtype, capacity: int) -> None:
        self.rank, self.size = rank, size
        self.count = 0
        self._now = torch.empty(batch, capacity, rank, size, dtype=dtype)
        self._next = torch.empty_like(self._now)
        self.exponent = torch.zeros(batch, 0, dtype=torch.float64)  # (B, n) powers of two taken out
        self.start = torch.zeros(0, dtype=torch.long)  # (n,) which start
        self.retry = torch.zeros(0, dtype=torch.long)  # (n,) step t of the next truncation
        self.norm = torch.zeros(batch, 0, dtype=dtype)  # (B, n) ‖V‖_F after the last rescaling
        self.guess = torch.empty(batch, 0, rank, WIDTH, dtype=dtype)  # of the spectral iteration

    @property
    def values(self) -> Tensor:
        """The live blocks, (B, n, r, S)."""
        return self._now[:, : self.count]

    @property
    def soonest(self) -> int:
        """The step at which some block is due for truncation."""
        return int(self.retry.min()) if self.count else 2**62

    def add(
        self, values: Tensor, exponent: Tensor, start: Tensor, retry: Tensor, guess: Tensor
    ) -> None:
        """Append blocks (B, m, r, S)."""
        needed = self.count + values.shape[1]
        if needed > self._now.shape[1]:
            grown = self._now.new_empty(
                len(values), max(needed, 2 * self.count), self.rank, self.size
            )
            grown[:, : self.count] = self.values
            self._now, self._next = grown, torch.empty_like(grown)
        self._now[:, self.count : needed] = values
        self.count = needed
        self.exponent = torch.cat([self.exponent, exponent], 1)
        self.start, self.retry = torch.cat([self.start, start]), torch.cat([self.retry, retry])
        self.guess = torch.cat([self.guess, guess], 1)

    def keep(self, chosen: Tensor) -> None:
        """Forget all blocks but the chosen (n,) ones."""
        kept = self.values[:, chosen]
        self.count = int(chosen.sum())
        self._now[:, : self.count] = kept
        self.exponent, self.guess = self.exponent[:, chosen], self.guess[:, chosen]
        self.start, self.retry = self.start[chosen], self.retry[chosen]

    def advance(self, step: Tensor) -> None:
        """Push every row through one step, given as A_tᵀ (B, S, S)."""
        rows = self.count * self.rank
        for b in range(len(step)):
            torch.mm(
                self._now[b, : self.count].view(rows, self.size),
                step[b],
                out=self._next[b, : self.count].view(rows, self.size),
            )
        self._now, self._next = self._next, self._now

    @property
    def rows(self) -> Tensor:
        """All rows of all live blocks, (B, n·r, S)."""
        return self.values.reshape(len(self._now), -1, self.size)

    def replace(self, rows: Tensor) -> None:
        """Put pushed rows (B, n·r, S) in place of the old ones."""
        self._now[:, : self.count] = rows.view_as(self.values)

    def rescale(self) -> Tensor:
        """Take powers of two out where a norm left the room; return ln ‖V‖_F with them, (B, n)."""
        norm = frobenius(self.values)
        power = torch.frexp(norm)[1]
        far = (power.abs() > ROOM[norm.dtype]) & torch.isfinite(norm) & (norm > 0)
        if bool(far.any()):
            b, n = far.nonzero(as_tuple=True)
            shift = -power[far]
            half = shift // 2  # in two halves: 2^shift itself may not be representable
            factor = torch.ldexp(torch.ones_like(norm[far]), half)[:, None, None]
            rest = torch.ldexp(torch.ones_like(norm[far]), shift - half)[:, None, None]
            self._now[b, n] = self._now[b, n] * factor * rest
            self.exponent[far] -= shift.double()
            norm = torch.where(far, torch.ldexp(norm, -(power // 2)), norm)
            norm = torch.where(far, torch.ldexp(norm, (power // 2) - power), norm)
        self.norm = norm
        return self._logarithm(norm)

    def spectral(self, generator: torch.Generator) -> Tensor:
        """ln ‖V‖₂, (B, n), after `rescale`; exact up to 64 rows, beyond iterated to 1e-4."""
        if self.rank == 1:
            return self._logarithm(self.norm)
        good = torch.isfinite(self.norm) & (self.norm > 0)
        result = self.norm.clone()  # zero, infinite and NaN stand for themselves
        chosen = self.values if bool(good.all()) else self.values[good]
        blocks = chosen.reshape(-1, self.rank, self.size)
        if len(blocks) == 0:
            return self._logarithm(result)
        if self.rank <= EXACT_ROWS:
            result[good] = spectral_by_gram(blocks)
        else:
            guess = self.guess[good]
            # the weakest vector gets a fresh part: the best direction may change at any step
            guess[..., 0] += torch.randn(
                guess.shape[:-1], generator=generator, dtype=guess.dtype
            ) / math.sqrt(self.rank)
            result[good], self.guess[good] = spectral_by_iteration(blocks, guess)
        return self._logarithm(result)

    def _logarithm(self, norm: Tensor) -> Tensor:
        return norm.double().log() + self.exponent * math.log(2)
