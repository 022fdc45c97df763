"""Spectral norms of wide blocks, followed from lag to lag by block Lanczos iteration.

Letters: N blocks V, r rows, S columns, m directions. G = V Vᵀ, whose largest eigenvalue λ₁ is ‖V‖₂².
A basis X (r × m, orthonormal) comes with its images Xᵀ V; while V is pushed from lag to lag the images
are pushed with it, so that every lag begins with Ritz values of its own G.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gradflow.analyzer.norms import spectral_by_gram

TOLERANCE = 1e-4  # relative error of a norm
SAFETY = 10.0  # how far below it the estimated error has to be
KEPT = 12  # directions that go on to the next lag
CARRIED = KEPT + 1  # and a random one, of no basis, that stays what it is
NEW = 4  # directions that a step of the iteration adds
STEPS = 8  # then the eigenvalues of G, about as dear as that many steps


def spectral_by_iteration(
    blocks: Tensor,
    carried: Tensor,
    images: Tensor | None = None,
    scale: Tensor | None = None,
    frobenius: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Largest singular values of finite blocks ≠ 0 to 1e-4, by block Lanczos (Golub & Underwood 1977).

    With Ritz values θ₁ ≥ θ₂ ≥ … of G in the basis, and E_q what G makes of the first q Ritz vectors
    outside it, λ₁ − θ₁ ≤ ‖E_q‖²/(θ₁ − λ_{q+1}) (Temple 1928, Kato 1949), with θ_{q+1} in place of
    λ_{q+1}, which is not known. E is added to the basis until the least of these bounds is small. What
    the basis leaves of ‖V‖_F² is ρ = ‖V‖_F² − Σθ: if ρ < θ₁ no direction was missed. Elsewhere one step
    is taken in any case, from the Ritz vectors and from a random direction.

    Args:
        blocks: (N, r, S), more rows than directions: r ≥ 32.
        carried: (N, r, 13): 12 orthonormal columns and a random one.
        images: (N, 13, S), carriedᵀ V; None computes them.
        scale: (N, r) factors of the rows of the blocks; None for 1.
        frobenius: (N,) ‖V‖_F with these factors; None computes them.

    Returns:
        The norms (N,), and what to carry to the next lag, with its images.
    """
    factors = _Factors(blocks, scale, frobenius)
    value, left = blocks.new_empty(len(blocks)), torch.arange(len(blocks))
    if images is None:
        images = factors.down(left, carried)
    ritz = _Ritz.with_random(carried, images)
    carried, images = carried.clone(), images.clone()
    for step in range(STEPS):
        moved = factors.up(left, ritz.leading(explore=step == 0))
        outside = moved - ritz.basis @ (ritz.basis.mT @ moved)
        done = ritz.settled(outside[..., : NEW - 1], factors.square[left])
        if step == 0:
            done &= factors.square[left] - ritz.values.sum(-1) < ritz.values[:, 0]
        value[left] = ritz.values[:, 0].sqrt()
        carried[left, :, :KEPT] = ritz.basis[..., :KEPT]
        images[left, :KEPT] = ritz.images[:, :KEPT]
        if bool(done.all()):
            return value, carried, images
        left, ritz, outside = left[~done], ritz.of(~done), outside[~done]
        new = torch.linalg.qr(torch.cat([ritz.basis, outside], -1))[0][..., -NEW:]
        ritz = ritz.wider(new, factors.down(left, new))
    value[left] = spectral_by_gram(factors.blocks[left] * factors.scale[left])
    return value, carried, images


class _Factors:
    """Products with some of the blocks, without copies of them."""

    def __init__(self, blocks: Tensor, scale: Tensor | None, frobenius: Tensor | None) -> None:
        self.blocks = blocks
        self.scale = blocks.new_ones(len(blocks), 1, 1) if scale is None else scale[..., None]
        if frobenius is None:
            rows = torch.linalg.vector_norm(blocks, dim=-1, keepdim=True) * self.scale
            frobenius = torch.linalg.vector_norm(rows, dim=(-2, -1))
        self.square = frobenius.square()

    def up(self, which: Tensor, rows: Tensor) -> Tensor:
        """V rowsᵀ, (N, r, m), of rows (N, m, S)."""
        return self._each(which, rows.mT) * self._of(which)

    def down(self, which: Tensor, columns: Tensor) -> Tensor:
        """columnsᵀ V, (N, m, S), of columns (N, r, m)."""
        scaled = (columns * self._of(which)).mT
        if len(which) == len(self.blocks):
            return scaled @ self.blocks
        return torch.stack([part @ self.blocks[i] for i, part in zip(which.tolist(), scaled)])

    def _each(self, which: Tensor, columns: Tensor) -> Tensor:
        columns = columns.contiguous()
        if len(which) == len(self.blocks):
            return self.blocks @ columns
        return torch.stack([self.blocks[i] @ part for i, part in zip(which.tolist(), columns)])

    def _of(self, which: Tensor) -> Tensor:
        return self.scale if len(self.scale) == 1 else self.scale[which]


@dataclass
class _Ritz:
    """Ritz values (N, m), largest first, the vectors as basis (N, r, m), and its images (N, m, S)."""

    values: Tensor
    basis: Tensor
    images: Tensor
    random: Tensor  # (N, 1, m): the random direction in the basis
    rank: int

    @classmethod
    def make(cls, basis: Tensor, images: Tensor, rank: int) -> _Ritz:
        values, turn = torch.linalg.eigh(images @ images.mT)
        values, turn = values.flip(-1), turn.flip(-1)
        return cls(values, basis @ turn, turn.mT @ images, turn[:, -1:], rank)

    @classmethod
    def with_random(cls, carried: Tensor, images: Tensor) -> _Ritz:
        """Of the basis and what the random direction has outside it."""
        basis, random = carried[..., :KEPT], carried[..., KEPT:]
        share = basis.mT @ random
        outside = random - basis @ share
        length = torch.linalg.vector_norm(outside, dim=1, keepdim=True)
        image = (images[:, KEPT:] - share.mT @ images[:, :KEPT]) / length
        both = torch.cat([basis, outside / length], -1)
        return cls.make(both, torch.cat([images[:, :KEPT], image], 1), basis.shape[1])

    def of(self, chosen: Tensor) -> _Ritz:
        """Those of some of the blocks."""
        return _Ritz(
            self.values[chosen],
            self.basis[chosen],
            self.images[chosen],
            self.random[chosen],
            self.rank,
        )

    def wider(self, new: Tensor, images: Tensor) -> _Ritz:
        """Of the 12 best vectors and some more."""
        basis = torch.cat([self.basis[..., :KEPT], new], -1)
        return _Ritz.make(basis, torch.cat([self.images[:, :KEPT], images], 1), self.rank)

    def leading(self, *, explore: bool) -> Tensor:
        """Images (N, 4, S) of the vectors to go on from: the leading ones, or 3 and the random one."""
        if not explore:
            return self.images[:, :NEW]
        return torch.cat([self.images[:, : NEW - 1], self.random @ self.images], 1)

    def settled(self, outside: Tensor, square: Tensor) -> Tensor:
        """Whether λ₁ can be hardly more than θ₁, from G X outside the basis for the leading X."""
        top = self.values[:, :1]
        sizes = outside.square().sum(1).cumsum(-1)  # ‖E_q‖²
        gap = top - self.values[:, 1 : 1 + outside.shape[-1]]
        bound = torch.where(gap > 0, sizes / gap, math.inf).amin(-1)
        bound = torch.minimum(bound, sizes[:, 0].sqrt())  # some eigenvalue is as near as this
        top = top[:, 0]
        possible = top >= square / self.rank * (1 - TOLERANCE)  # the largest is not below the mean
        return possible & (bound <= 2 * TOLERANCE / SAFETY * top)
