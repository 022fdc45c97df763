"""Singular values of P over the span: how many directions survive.

Letters: S the state's width, k the span in steps. The product is kept as Q e^d R with Q orthogonal,
d logarithms and R of unit size, so that small singular values survive beside large ones.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from gradflow.limits import (
    GONE,
    GROWTH_FLOAT32,
    GROWTH_FLOAT64,
    RANK_TRUNCATION,
    SEED,
    SNAPSHOT,
    TRUNCATE_ROWS,
)
from gradflow.recording import Operator

GROWTH = {torch.float64: GROWTH_FLOAT64, torch.float32: GROWTH_FLOAT32}


def log_singular_along(
    operator: Operator, steps: Iterable[int], lags: Sequence[int], *, most_work: float = math.inf
) -> tuple[np.ndarray, float]:
    """ln of the singular values of A_k … A_1 of one sequence, (lags, S) float64, largest first.

    After each of the lags k (ascending) along the steps; and the operations it took. −inf where they
    are exactly 0, NaN where they lie under the rounding of the largest, or under 10⁻⁴ of it where a
    wide block was truncated; all NaN at lags that `most_work` operations or the steps do not reach.
    """
    size = operator.size
    found = np.full((len(lags), size), np.nan)
    generator = torch.Generator().manual_seed(SEED)
    mixed = torch.randn(size, size, generator=generator, dtype=torch.float64)
    graded = _Graded(torch.linalg.qr(mixed)[0].T.contiguous().to(operator.dtype))
    work = 0.0
    for done, t in enumerate(steps, start=1):
        place = bisect_left(lags, done)  # of the first lag not yet passed
        if place == len(lags):
            break
        graded.rows = operator.push(t, graded.rows[None])[0]
        graded.settle()
        work += 2.0 * len(graded.rows) * size**2
        if graded.dead:
            found[place:] = -np.inf
            break
        if not graded.finite or work > most_work:
            break
        if done >= 8 and done & (done - 1) == 0 and len(graded.rows) > TRUNCATE_ROWS:
            graded.truncate()
        if done == lags[place]:
            values = graded.logarithms()
            found[place, : len(values)] = values
            work += SNAPSHOT * len(values) ** 3
    return found, work


class _Graded:
    """Rows V (m, S) of a product Pᵀ, factored as Rᵀ e^d Qᵀ each time their norm has grown much."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows
        self.scale = torch.zeros(len(rows), dtype=torch.float64)  # d
        self.mixing = torch.eye(len(rows), dtype=torch.float64)  # R
        self.shift = 0.0  # ln taken out of all rows since the last factorisation
        self.grown = self.factored = False
        self.dead, self.finite = False, True

    def truncate(self) -> None:
        """Drop directions below 10⁻⁴ of the largest, before any factorisation."""
        if self.factored:
            return
        square, turn = torch.linalg.eigh((self.rows @ self.rows.T).double())
        kept = turn[:, square > (RANK_TRUNCATION**2) * square[-1]].to(self.rows.dtype)
        self.rows = kept.T @ self.rows
        self.scale, self.mixing = self.scale[: kept.shape[1]], torch.eye(kept.shape[1]).double()

    def settle(self) -> None:
        norm = float(torch.linalg.vector_norm(self.rows, dtype=torch.float64))
        self.dead, self.finite = norm == 0, math.isfinite(norm)
        if self.dead or not self.finite:
            return
        size = norm / math.sqrt(len(self.rows))
        if size > GROWTH[self.rows.dtype]:
            self.factor()
        elif size < 1e-30:
            self.rows = self.rows / size
            self.shift += math.log(size)

    def factor(self) -> None:
        """P = Q e^d R again: the grown rows become orthonormal, their sizes go into d."""
        basis, triangle = torch.linalg.qr((self.rows.double()).mT)
        diagonal = triangle.diagonal().abs()
        alive = diagonal > 0
        safe = torch.where(alive, diagonal, torch.ones_like(diagonal))
        new = self.scale + safe.log() + self.shift
        spread = (self.scale[None, :] - self.scale[:, None]).clamp_max(300).exp()
        unit = torch.where(alive[:, None], triangle / safe[:, None] * spread, 0.0)
        self.mixing = unit.triu() @ self.mixing
        self.scale = torch.where(alive, new, torch.full_like(new, -math.inf))
        self.rows = torch.where(alive[:, None], basis.mT, 0.0).to(self.rows.dtype)
        self.shift, self.factored = 0.0, True

    def logarithms(self) -> np.ndarray:
        if not self.factored:
            return self._at_once()
        self.factor()
        order = self.scale.argsort(descending=True, stable=True)
        scale, mixing = self.scale[order], self.mixing[order]
        living = torch.isfinite(scale)
        result = np.full(len(scale), -np.inf)
        result[: int(living.sum())] = _graded_singular(scale[living], mixing[living])
        return result

    def _at_once(self) -> np.ndarray:
        values = torch.linalg.svdvals(self.rows.double())
        floor = 4 * torch.finfo(self.rows.dtype).eps * len(values) * values[0]
        logs = torch.where(values > floor, values.log() + self.shift, math.nan)
        return logs.numpy()


def _graded_singular(scale: Tensor, mixing: Tensor, sweeps: int = 30) -> np.ndarray:
    """ln singular values of diag(e^scale) M by QR iteration on the graded triangle.

    Every sweep turns the triangle over (Rutishauser's LR step for singular values); logarithms
    keep what no floating point number could hold side by side.
    """
    for _ in range(sweeps):
        triangle = torch.linalg.qr(mixing.mT, mode="r")[1][: len(scale)]
        spread = (scale[None, :] - scale[:, None]).clamp_max(300).exp()
        turned = (triangle * spread).triu()
        size = turned.diagonal().abs().clamp_min(torch.finfo(turned.dtype).tiny)
        scale = scale + size.log()
        mixing = turned / size[:, None]
    # what the sweeps leave is close to diagonal, but for clusters, which one SVD resolves
    spread = (scale - scale.max()).clamp_min(-60).exp()
    top = torch.linalg.svdvals(spread[:, None] * mixing).log() + scale.max()
    logs = scale.sort(descending=True).values
    near = logs > logs[0] - 12
    return torch.where(near, top, logs).numpy()


def survivors(log_singular: np.ndarray) -> int:
    """How many singular values are at least GONE; NaN ones lie under the rounding of larger ones."""
    return int(np.sum(log_singular >= math.log(GONE)))
