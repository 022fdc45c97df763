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

from gradflow.analyzer.norms import row_norms, spectral_by_gram

TOLERANCE = 1e-4  # relative error of a norm, unless told otherwise
SAFETY = 10.0  # how far below it the estimated error has to be
KEPT = 12  # directions that go on to the next lag
CARRIED = KEPT + 1  # and one that explores what the basis leaves out
STAYS = 0.5  # share of itself that the exploring direction keeps when it moves on
NEW = 4  # directions that a step of the iteration adds
STEPS = 8  # then the eigenvalues of G, about as dear as that many steps


def spectral_by_iteration(
    blocks: Tensor,
    carried: Tensor,
    images: Tensor | None = None,
    scale: Tensor | None = None,
    frobenius: Tensor | None = None,
    tolerance: float = TOLERANCE,
) -> tuple[Tensor, Tensor, Tensor]:
    """Largest singular values of finite blocks ≠ 0, by block Lanczos (Golub & Underwood 1977).

    With Ritz values θ₁ ≥ θ₂ ≥ … of G in the basis, and E_q what G makes of the first q Ritz vectors
    outside it, λ₁ − θ₁ ≤ ‖E_q‖²/(θ₁ − λ_{q+1}) (Temple 1928, Kato 1949), with θ_{q+1} in place of
    λ_{q+1}, which is not known. E is added to the basis until the least of these bounds is small. What
    the basis leaves of ‖V‖_F² is ρ = ‖V‖_F² − Σθ: if ρ < θ₁ no direction was missed. Elsewhere one step
    is taken in any case, also from a direction outside the basis, random at first, that moves on to
    what G makes of it, so that over the lags it turns to the largest singular vector left out; and
    a Cholesky factorisation of (1 + 2 tolerance) θ₁ − G tells whether any larger one was missed, for
    which the eigenvalues of G are taken.

    Args:
        blocks: (N, r, S), more rows than directions: r ≥ 32.
        carried: (N, r, 13): 12 orthonormal columns and the exploring one.
        images: (N, 13, S), carriedᵀ V; None computes them.
        scale: (N, r) factors of the rows of the blocks; None for 1.
        frobenius: (N,) ‖V‖_F with these factors; None computes them.
        tolerance: relative error of the norms.

    Returns:
        The norms (N,), and what to carry to the next lag, with its images.
    """
    if frobenius is None:
        rows = row_norms(blocks)
        frobenius = row_norms(rows if scale is None else rows * scale)
    one = 1 / frobenius[:, None, None]
    factors = _Factors(blocks, one if scale is None else scale[..., None] * one)
    value, left = blocks.new_empty(len(blocks)), torch.arange(len(blocks))
    carried = carried.clone()
    images = factors.down(left, carried) if images is None else images * one
    ritz = _Ritz.exploring(carried, images)
    doubtful = []
    for step in range(STEPS):
        moved = factors.up(left, ritz.leading(explore=step == 0))
        outside = moved - ritz.basis @ (ritz.basis.mT @ moved)
        done = ritz.settled(outside[..., : NEW - 1], tolerance)
        sure = 1 - ritz.values.sum(-1) < ritz.values[:, 0]  # ρ < θ₁; ‖V‖_F is 1 here
        if step == 0:
            done &= sure
        doubtful += left[done & ~sure].tolist()
        value[left] = ritz.values[:, 0].sqrt()
        carried[left, :, :KEPT] = ritz.basis[..., :KEPT]
        images[left, :KEPT] = ritz.images[:, :KEPT]
        if bool(done.all()):
            break
        left, ritz, outside = left[~done], ritz.of(~done), outside[~done]
        new = torch.linalg.qr(torch.cat([ritz.basis, outside], -1))[0][..., -NEW:]
        pushed = factors.down(left, new)
        if step == 0:
            carried[left, :, KEPT] = new[..., -1] + STAYS * carried[left, :, KEPT]
            images[left, KEPT] = pushed[:, -1] + STAYS * images[left, KEPT]
        ritz = ritz.wider(new, pushed)
    else:
        value[left] = spectral_by_gram(factors.blocks[left] * factors.scale[left])
    for i in doubtful:
        block = factors.blocks[i] * factors.scale[i]
        if not _bounded(block, value[i] * (1 + tolerance)):
            value[i] = spectral_by_gram(block[None])[0]
    return value * frobenius, carried, images / one


def _bounded(block: Tensor, limit: Tensor) -> bool:
    """Whether no singular value exceeds the limit: limit² − V Vᵀ is then positive definite."""
    rest = -(block @ block.mT)
    rest.diagonal().add_(limit.square())
    return int(torch.linalg.cholesky_ex(rest)[1]) == 0


class _Factors:
    """Products with some of the blocks, without copies of them."""

    def __init__(self, blocks: Tensor, scale: Tensor) -> None:
        self.blocks, self.scale = blocks, scale

    def up(self, which: Tensor, rows: Tensor) -> Tensor:
        """V rowsᵀ, (N, r, m), of rows (N, m, S)."""
        columns = rows.mT.contiguous()
        if len(which) == len(self.blocks):
            return self.blocks @ columns * self.scale
        each = zip(which.tolist(), columns, strict=True)
        return torch.stack([self.blocks[i] @ part for i, part in each]) * self.scale[which]

    def down(self, which: Tensor, columns: Tensor) -> Tensor:
        """columnsᵀ V, (N, m, S), of columns (N, r, m)."""
        if len(which) == len(self.blocks):
            return (columns * self.scale).mT @ self.blocks
        each = zip(which.tolist(), (columns * self.scale[which]).mT, strict=True)
        return torch.stack([part @ self.blocks[i] for i, part in each])


@dataclass
class _Ritz:
    """Ritz values (N, m), largest first, the vectors as basis (N, r, m), and its images (N, m, S)."""

    values: Tensor
    basis: Tensor
    images: Tensor
    last: Tensor  # (N, 1, m): coordinates of what was added last

    @classmethod
    def make(cls, basis: Tensor, images: Tensor) -> _Ritz:
        values, turn = torch.linalg.eigh(images @ images.mT)
        values, turn = values.flip(-1), turn.flip(-1)
        return cls(values, basis @ turn, turn.mT @ images, turn[:, -1:])

    @classmethod
    def exploring(cls, carried: Tensor, images: Tensor) -> _Ritz:
        """Of the basis and what the exploring direction has outside it."""
        basis, explorer = carried[..., :KEPT], carried[..., KEPT:]
        share = basis.mT @ explorer
        outside = explorer - basis @ share
        length = torch.linalg.vector_norm(outside, dim=1, keepdim=True)
        image = (images[:, KEPT:] - share.mT @ images[:, :KEPT]) / length
        both = torch.cat([basis, outside / length], -1)
        return cls.make(both, torch.cat([images[:, :KEPT], image], 1))

    def of(self, chosen: Tensor) -> _Ritz:
        """Those of some of the blocks."""
        return _Ritz(
            self.values[chosen], self.basis[chosen], self.images[chosen], self.last[chosen]
        )

    def wider(self, new: Tensor, images: Tensor) -> _Ritz:
        """Of the 12 best vectors and some more."""
        basis = torch.cat([self.basis[..., :KEPT], new], -1)
        return _Ritz.make(basis, torch.cat([self.images[:, :KEPT], images], 1))

    def leading(self, *, explore: bool) -> Tensor:
        """Images (N, 4, S) of the vectors to go on from: the leading 4, or 3 and the exploring one."""
        if not explore:
            return self.images[:, :NEW]
        return torch.cat([self.images[:, : NEW - 1], self.last @ self.images], 1)

    def settled(self, outside: Tensor, tolerance: float) -> Tensor:
        """Whether λ₁ can be hardly more than θ₁, from G X outside the basis for the leading X."""
        top = self.values[:, :1]
        sizes = outside.square().sum(1).cumsum(-1)  # ‖E_q‖²
        gap = top - self.values[:, 1 : 1 + outside.shape[-1]]
        bound = torch.where(gap > 0, sizes / gap, math.inf).amin(-1)
        bound = torch.minimum(bound, sizes[:, 0].sqrt())  # some eigenvalue is as near as this
        top = top[:, 0]
        mean = 1 / self.basis.shape[1]  # of all eigenvalues, as ‖V‖_F is 1
        return (top >= mean * (1 - tolerance)) & (bound <= 2 * tolerance / SAFETY * top)
