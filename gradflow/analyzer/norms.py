"""Norms of many blocks at once: of rows without overflow, spectral by Gram matrix or iteration.

Letters: N blocks, r rows, S columns.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

EXACT_ROWS = 64  # up to here the largest eigenvalue of the Gram matrix gives the spectral norm
TOLERANCE = 1e-4  # beyond: relative error at which block Lanczos iteration stops
WIDTH = 4  # vectors that every step of the iteration adds
DEPTH = 6  # steps until the basis is cut back to 4 vectors
RESTARTS = 6  # then the Gram matrix after all
SMALL = 24  # rows below which eigenvalues are cheaper than trying without
POWERS = 4  # products with the Gram matrix between two looks at what they found
LOOKS = 4  # then the eigenvalues


def row_norms(rows: Tensor) -> Tensor:
    """‖v‖₂ of rows (..., S), also where the squares leave the dtype's range."""
    norm = torch.linalg.vector_norm(rows, dim=-1)
    tiny = math.sqrt(torch.finfo(rows.dtype).tiny) * 1e3
    doubtful = ~((norm >= tiny) & (norm < math.inf))  # NaN too
    if bool(doubtful.any()):
        hard = rows[doubtful]
        peak = hard.abs().amax(dim=-1)
        safe = torch.where(torch.isfinite(peak) & (peak > 0), peak, torch.ones_like(peak))
        norm[doubtful] = torch.linalg.vector_norm(hard / safe[:, None], dim=-1) * safe
    return norm


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
    for _ in range(LOOKS):
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
    for _ in range(POWERS):
        vector = (gram * vector[:, None, :]).sum(-1)
    length = torch.linalg.vector_norm(vector, dim=-1, keepdim=True)
    vector = torch.where(length > 0, vector / length, vector.shape[-1] ** -0.5)
    image = (gram * vector[:, None, :]).sum(-1)
    theta = (image * vector).sum(-1)
    error = (image - theta[:, None] * vector).square().sum(-1)  # e²
    gap = 2 * theta - 1  # θ − ρ
    return theta, vector, (gap > 0) & (error <= torch.finfo(gram.dtype).eps * theta * gap)


def spectral_by_iteration(blocks: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """Largest singular value of finite blocks (N, r, S) to 1e-4, and the basis to start from next.

    Block Lanczos on V Vᵀ (Golub & Underwood 1977): every step adds 4 vectors to the basis, the
    Rayleigh–Ritz values rise to ‖V‖₂, and what is still missing is foretold from the last two
    rises (Aitken). `start` is (N, r, 4), the basis found at the previous lag.
    """
    value = blocks.new_zeros(len(blocks))
    basis = start.clone()
    left = torch.arange(len(blocks))  # the blocks not yet done
    part = blocks
    for restart in range(RESTARTS):
        # most need two steps from their last basis, and none should wait for the few that do not
        top, rows, done = _lanczos(part, basis[left], 2 if restart == 0 else DEPTH)
        value[left], basis[left] = top, rows
        if bool(done.all()):
            return value, basis
        keep = (~done).nonzero()[:, 0]
        left, part = left[keep], part[keep]
    value[left] = spectral_by_gram(part)
    return value, basis


def _lanczos(blocks: Tensor, start: Tensor, depth: int) -> tuple[Tensor, Tensor, Tensor]:
    """Up to `depth` block steps; the value, the 4 best row vectors, and which blocks settled."""
    basis = torch.linalg.qr(start)[0]
    images = blocks.mT @ basis
    newest = images
    values = [_top(images)]
    settled = torch.zeros(len(blocks), dtype=torch.bool)
    for _ in range(depth):
        rows = blocks @ newest
        for _again in range(2):  # orthogonalise twice, or rounding lets old directions back in
            rows = rows - basis @ (basis.mT @ rows)
        rows = torch.linalg.qr(rows)[0]
        newest = blocks.mT @ rows
        basis, images = torch.cat([basis, rows], -1), torch.cat([images, newest], -1)
        values.append(_top(images))
        settled = _settled(values)
        if bool(settled.all()):
            break
    best = torch.linalg.eigh(images.mT @ images)[1][..., -WIDTH:]
    return values[-1], basis @ best, settled


def _top(images: Tensor) -> Tensor:
    return torch.linalg.eigvalsh(images.mT @ images)[..., -1].clamp_min(0).sqrt()


def _settled(values: list[Tensor]) -> Tensor:
    """Whether what is still missing, foretold from the last rises, is far below the tolerance."""
    now = (values[-1] - values[-2]).clamp_min(0) / values[-1]
    at_once = now <= TOLERANCE / 50
    if len(values) < 3:
        return at_once
    before = (values[-2] - values[-3]).clamp_min(0) / values[-1]
    ratio = torch.where(before > 0, now / before, torch.zeros_like(now))
    ratio = ratio.clamp(0.5, 0.999)  # a sudden fall of the rises foretells nothing
    return at_once | (now * ratio / (1 - ratio) <= TOLERANCE / 10)
