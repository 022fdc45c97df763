"""Singular values of P: how many directions survive, over the span and against the lag.

Letters: M sequences, S the state's width, k lag, σ_i the singular values of P(t+k←t). The product is
kept as Q e^d R with Q orthogonal, d logarithms and R of unit size, so that small singular values
survive beside large ones.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradflow.analyzer.jacobians import HostOperator, operator_of, state_size
from gradflow.analyzer.plan import Maps
from gradflow.analyzer.spread import each
from gradflow.analyzer.timeline import cuts_before
from gradflow.limits import (
    GONE,
    GROWTH_FLOAT32,
    GROWTH_FLOAT64,
    RANK_STARTS,
    RANK_TRUNCATION,
    SEED,
    SNAPSHOT,
    TRUNCATE_ROWS,
)
from gradflow.recording.source import Operator
from gradflow.recording.track import Track

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


@dataclass(frozen=True)
class Ranks:
    """Singular values over the span, and what they say at the lags 1, 2, 4, …"""

    singular: np.ndarray  # (M, S) ln σ over `reach` steps from the first start
    reach: int  # the span, or as much of it as the longest stretch without a cut holds
    lags: np.ndarray  # (K,) 1, 2, 4, … and the reach
    effective: np.ndarray  # (K,) exp of the entropy of σ/Σσ, median over starts and sequences
    surviving: np.ndarray  # (K,) how many σ are at least GONE, median likewise


def measure_ranks(
    track: Track,
    mapped: Sequence[int],
    span: int,
    most_work: float,
    executor: Executor | None = None,
) -> Ranks:
    """Singular values of the mapped sequences within a number of operations, NaN beyond it.

    The first start of a sequence may use its whole share; the later ones together a quarter of what
    it leaves.
    """
    size = state_size(track)
    stretches = [longest_stretch(track, b) for b in mapped]
    # a sequence too short for it says nothing about it, and is NaN there
    reach = min(span, max(last - first for first, last in stretches))
    if reach < 1:
        nothing = np.zeros(0)
        return Ranks(np.full((len(mapped), size), np.nan), 0, nothing, nothing, nothing)
    dtype, most = torch.float64, most_work / len(mapped)
    if 2.0 * size**3 * reach > most / 4:
        dtype, most = torch.float32, most * 2
    parts = (
        (operator_of(track, dtype, [b]), first, last, reach, most)
        for b, (first, last) in zip(mapped, stretches, strict=True)
    )
    found = list(each(executor, track.name, _of_sequence, parts))
    every = np.concatenate(found)  # (M·starts, K, S)
    return Ranks(
        np.stack([values[0, -1] for values in found]),
        reach,
        np.array(dyadic(reach)),
        medians(every, effective_rank),
        medians(every, survivors),
    )


def _of_sequence(
    operator: HostOperator, first: int, last: int, reach: int, left: float
) -> np.ndarray:
    """(starts, K, S): ln σ of one sequence from each of its starts, the first one first."""
    found = []
    for start in starts(first, last):
        steps = range(start + 1, min(start + reach, last) + 1)
        values, work = log_singular_along(operator, steps, dyadic(reach), most_work=left)
        found.append(values)
        left -= work
        left = left / 4 if start == first else left
    return np.stack(found)


def dyadic(reach: int) -> list[int]:
    """Lags 1, 2, 4, … up to the reach, and the reach itself.

    >>> dyadic(9), dyadic(8), dyadic(1)
    ([1, 2, 4, 8, 9], [1, 2, 4, 8], [1])
    """
    return [1 << power for power in range(reach.bit_length()) if 1 << power < reach] + [reach]


def starts(first: int, last: int) -> list[int]:
    """Evenly spread states of a stretch, the first and the last among them."""
    return sorted({first + place * (last - first) // RANK_STARTS for place in range(RANK_STARTS)})


def longest_stretch(track: Track, sequence: int) -> tuple[int, int]:
    """First and last processed step of the longest run of steps without a cut."""
    segments = cuts_before(track)[: int(track.lengths[sequence]), sequence]
    counts = torch.unique_consecutive(segments, return_counts=True)[1]
    longest = int(counts.argmax())
    first = int(counts[:longest].sum())
    return first, first + int(counts[longest]) - 1


def effective_rank(log_singular: np.ndarray) -> float:
    """exp(−Σ p_i ln p_i), p_i = σ_i/Σσ (Roy & Vetterli 2007); NaN where all σ are 0.

    Singular values that are not known lie far below the largest and count as 0.

    >>> round(effective_rank(np.log([1.0, 1.0, 1.0])), 9), effective_rank(np.array([5.0, -np.inf]))
    (3.0, 1.0)
    """
    known = log_singular[np.isfinite(log_singular)]
    if len(known) == 0:
        return math.nan
    share = np.exp(known - known.max())
    share = share / share.sum()
    share = share[share > 0]  # what is too small beside the largest has none
    return float(np.exp(-(share * np.log(share)).sum()))


def medians(every: np.ndarray, rank: Callable[[np.ndarray], float]) -> np.ndarray:
    """Median of a rank over the starts whose singular values are known at each lag."""
    result = []
    for rows in every.transpose(1, 0, 2):
        known = [float(rank(row)) for row in rows if not np.isnan(row).all()]
        known = [value for value in known if not math.isnan(value)]
        result.append(float(np.median(known)) if known else math.nan)
    return np.array(result)


def stable_rank(maps: Maps, lags: np.ndarray, size: int) -> np.ndarray:
    """Median over sources and sequences of ‖P‖_F²/‖P‖₂² at each lag, (K,); NaN where P is 0."""
    with np.errstate(invalid="ignore"):  # an exact zero has no rank
        ratio = size * np.exp(2 * (maps.log_gain["rms"] - maps.log_gain["spectral"]))
    result = []
    for lag in lags.astype(int):
        inside = np.flatnonzero(maps.sources + lag < ratio.shape[-1])
        values = ratio[:, inside, maps.sources[inside] + lag]
        values = values[np.isfinite(values)]
        result.append(float(np.median(values)) if len(values) else math.nan)
    return np.array(result)
