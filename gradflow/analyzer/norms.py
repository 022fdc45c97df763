"""Norms of many blocks at once: of rows without overflow, spectral by the Gram matrix or by iteration.

Letters: N blocks V, r rows, S columns, m directions. G = V Vᵀ, whose largest eigenvalue λ₁ is ‖V‖₂².
Wide blocks are followed from lag to lag by block Lanczos iteration: a basis X (r × m, orthonormal)
comes with its images Xᵀ V; while V is pushed from lag to lag the images are pushed with it, so that
every lag begins with Ritz values of its own G.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gradflow.limits import (
    GRAM_LOOKS,
    GRAM_POWERS,
    NORM_KEPT,
    NORM_LEADS,
    NORM_NEW,
    NORM_SAFETY,
    NORM_STEPS,
    NORM_TOLERANCE,
)


def row_norms(rows: Tensor) -> Tensor:
    """‖v‖₂ of rows (..., S), also where the squares leave the dtype's range."""
    norm = torch.linalg.vector_norm(rows, dim=-1)
    tiny = math.sqrt(torch.finfo(rows.dtype).tiny) * 1e3
    if not within(norm, tiny, math.inf):
        doubtful = ~((norm >= tiny) & (norm < math.inf))  # NaN too
        hard = rows[doubtful]
        peak = hard.abs().amax(dim=-1)
        safe = torch.where(torch.isfinite(peak) & (peak > 0), peak, torch.ones_like(peak))
        norm[doubtful] = torch.linalg.vector_norm(hard / safe[:, None], dim=-1) * safe
    return norm


def within(values: Tensor, low: float, high: float) -> bool:
    """Whether low ≤ v < high of every value; not where one is NaN. One pass instead of four."""
    if values.numel() == 0:
        return True
    least, most = torch.aminmax(values)
    return low <= float(least) and float(most) < high


def spectral_by_gram(blocks: Tensor) -> Tensor:
    """Largest singular value of finite blocks (N, r, S), r ≤ S, to a few units of rounding.

    The largest eigenvalue of V Vᵀ has a relative error of the order of the rounding unit; only the
    small ones lose half the digits.
    """
    top = torch.linalg.eigvalsh(blocks @ blocks.mT)[..., -1]
    return top.clamp_min(0).sqrt()


def spectral_from(blocks: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """The same for blocks ≠ 0, from the leading row vectors (N, r) found at the previous lag.

    Power iteration on G = V Vᵀ where that is certain to have found λ₁ to rounding, else eigenvalues.
    With u of length 1, θ = uᵀ G u, e = ‖G u − θ u‖ and ρ = tr G − θ, all that the directions beside u
    have together, θ ≤ λ₁ ≤ θ + e²/(θ − ρ) if ρ < θ: as soon as one direction outweighs all others.

    Returns the values, and the vectors to start from next.
    """
    gram = blocks @ blocks.mT
    total = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    gram /= total[:, None, None]  # so that θ + ρ = 1
    value, vectors = torch.empty_like(total), start.clone()
    # λ₁² ≤ ‖G‖_F²: where no direction can outweigh the others there is no use in trying
    hopeful = torch.linalg.vector_norm(gram, dim=(-2, -1)) > 0.5
    left = hopeful.nonzero()[:, 0]
    value[~hopeful] = _largest(gram[~hopeful])
    gram = gram[left]
    for _ in range(GRAM_LOOKS):
        theta, vector, sure = _power(gram, vectors[left])
        value[left], vectors[left] = theta, vector
        left, gram = left[~sure], gram[~sure]
        if len(left) == 0:
            break
    value[left] = _largest(gram)
    return (value * total).sqrt(), vectors


def _largest(gram: Tensor) -> Tensor:
    return torch.linalg.eigvalsh(gram)[..., -1].clamp_min(0)


def _power(gram: Tensor, vector: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """θ and u after some products, and whether θ is certain to be λ₁ to rounding; tr G = 1."""
    for _ in range(GRAM_POWERS):
        vector = (gram * vector[:, None, :]).sum(-1)
    length = torch.linalg.vector_norm(vector, dim=-1, keepdim=True)
    vector = torch.where(length > 0, vector / length, vector.shape[-1] ** -0.5)
    image = (gram * vector[:, None, :]).sum(-1)
    theta = (image * vector).sum(-1)
    error = (image - theta[:, None] * vector).square().sum(-1)  # e²
    gap = 2 * theta - 1  # θ − ρ
    return theta, vector, (gap > 0) & (error <= torch.finfo(gram.dtype).eps * theta * gap)


def spectral_by_iteration(
    blocks: Tensor,
    basis: Tensor,
    images: Tensor | None = None,
    scale: Tensor | None = None,
    frobenius: Tensor | None = None,
    tolerance: float = NORM_TOLERANCE,
) -> tuple[Tensor, Tensor, Tensor]:
    """Largest singular values of finite blocks ≠ 0, by block Lanczos (Golub & Underwood 1977).

    With Ritz values θ₁ ≥ θ₂ ≥ … of G in the basis, and E_q what G makes of the first q Ritz vectors
    outside it, λ₁ − θ₁ ≤ ‖E_q‖²/(θ₁ − λ_{q+1}) (Temple 1928, Kato 1949), with θ_{q+1} in place of
    λ_{q+1}, which is not known. E is added to the basis until the least of these bounds is small. Then
    no direction was missed if θ₁ is 0.6 ‖V‖_F² or more: all others together have 0.4, so that the true
    gap is at least a third of the one used. Or if (1 + tolerance)² θ₁ − G has a Cholesky factor; where
    it has none the eigenvectors of G are taken.

    Args:
        blocks: (N, r, S), more rows than directions: r ≥ 32.
        basis: (N, r, 12), orthonormal columns.
        images: (N, 12, S), basisᵀ V; None computes them.
        scale: (N, r) factors of the rows of the blocks; None for 1.
        frobenius: (N,) ‖V‖_F with these factors; None computes them.
        tolerance: relative error of the norms.

    Returns:
        The norms (N,), and the basis for the next lag, with its images.
    """
    if frobenius is None:
        rows = row_norms(blocks)
        frobenius = row_norms(rows if scale is None else rows * scale)
    one = 1 / frobenius[:, None, None]  # ‖V‖_F is 1 from here on
    factors = _Factors(blocks, one if scale is None else scale[..., None] * one)
    value, left = blocks.new_empty(len(blocks)), torch.arange(len(blocks))
    images = factors.down(left, basis) if images is None else images * one
    ritz, basis = _Ritz.make(basis, images), basis.clone()
    for _ in range(NORM_STEPS):
        moved = factors.up(left, ritz.images[:, :NORM_NEW])
        outside = moved - ritz.basis @ (ritz.basis.mT @ moved)
        value[left] = ritz.values[:, 0].sqrt()
        basis[left], images[left] = ritz.basis[..., :NORM_KEPT], ritz.images[:, :NORM_KEPT]
        done = ritz.settled(outside, tolerance)
        left, ritz, outside = left[~done], ritz.of(~done), outside[~done]
        if len(left) == 0:
            break
        new = torch.linalg.qr(torch.cat([ritz.basis, outside], -1))[0][..., -NORM_NEW:]
        ritz = ritz.wider(new, factors.down(left, new))
    doubtful = value.square() < NORM_LEADS
    doubtful[left] = False
    missed = [
        i
        for i in doubtful.nonzero()[:, 0].tolist()
        if not _bounded(factors, i, value[i], tolerance)
    ]
    for i in [*left.tolist(), *missed]:
        value[i], basis[i], images[i] = _by_eigenvectors(factors.of(i))
    return value * frobenius, basis, images / one


def _bounded(factors: _Factors, i: int, value: Tensor, tolerance: float) -> bool:
    """Whether no singular value is larger than that one by more than the tolerance.

    In single precision, whose rounding is far below any tolerance.
    """
    block = factors.of(i).float()
    rest = -(block @ block.mT)
    rest.diagonal().add_((value.float() * (1 + tolerance)).square())
    return int(torch.linalg.cholesky_ex(rest)[1]) == 0


def _by_eigenvectors(block: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The norm of one block, its leading left singular vectors, and their images."""
    values, vectors = torch.linalg.eigh(block @ block.mT)
    basis = vectors[:, -NORM_KEPT:].flip(-1)
    return values[-1].clamp_min(0).sqrt(), basis, basis.mT @ block


class _Factors:
    """Products with some of the blocks, without copies of them."""

    def __init__(self, blocks: Tensor, scale: Tensor) -> None:
        self.blocks, self.scale = blocks, scale

    def up(self, which: Tensor, rows: Tensor) -> Tensor:
        """V rowsᵀ, (N, r, m), of rows (N, m, S)."""
        columns = rows.mT.contiguous()
        return self._each(which, columns, torch.matmul) * self.scale[which]

    def down(self, which: Tensor, columns: Tensor) -> Tensor:
        """columnsᵀ V, (N, m, S), of columns (N, r, m)."""
        rows = (columns * self.scale[which]).mT
        return self._each(which, rows, lambda block, part: part @ block)

    def _each(
        self, which: Tensor, parts: Tensor, product: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """The product of each of these blocks with its part; all at once if they stand side by side."""
        first = int(which[0])
        if int(which[-1]) - first + 1 == len(which):
            return product(self.blocks[first : first + len(which)], parts)
        each = zip(which.tolist(), parts, strict=True)
        return torch.stack([product(self.blocks[i], part) for i, part in each])

    def of(self, i: int) -> Tensor:
        """One block, written out."""
        return self.blocks[i] * self.scale[i]


@dataclass
class _Ritz:
    """Ritz values (N, m), largest first, the vectors as basis (N, r, m), and its images (N, m, S)."""

    values: Tensor
    basis: Tensor
    images: Tensor

    @classmethod
    def make(cls, basis: Tensor, images: Tensor) -> _Ritz:
        values, turn = torch.linalg.eigh(images @ images.mT)
        values, turn = values.flip(-1), turn.flip(-1)
        return cls(values, basis @ turn, turn.mT @ images)

    def of(self, chosen: Tensor) -> _Ritz:
        """Those of some of the blocks."""
        return _Ritz(self.values[chosen], self.basis[chosen], self.images[chosen])

    def wider(self, new: Tensor, images: Tensor) -> _Ritz:
        """Of the 12 best vectors and some more."""
        basis = torch.cat([self.basis[..., :NORM_KEPT], new], -1)
        return _Ritz.make(basis, torch.cat([self.images[:, :NORM_KEPT], images], 1))

    def settled(self, outside: Tensor, tolerance: float) -> Tensor:
        """Whether λ₁ can be hardly more than θ₁, from G X outside the basis for the leading X."""
        top = self.values[:, :1]
        sizes = outside.square().sum(1).cumsum(-1)  # ‖E_q‖²
        gap = top - self.values[:, 1 : 1 + outside.shape[-1]]
        bound = torch.where(gap > 0, sizes / gap, math.inf).amin(-1)
        bound = torch.minimum(bound, sizes[:, 0].sqrt())  # some eigenvalue is as near as this
        return bound <= 2 * tolerance / NORM_SAFETY * top[:, 0]
