"""Norms of many blocks at once: of rows without overflow, spectral by the Gram matrix.

Letters: N blocks, r rows, S columns.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gradflow.limits import GRAM_LOOKS, GRAM_POWERS


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
