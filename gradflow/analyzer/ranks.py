"""How many directions a product keeps, over the span and against the lag.

Letters: M sequences, S the state's width, k lag, σ_i the singular values of P(t+k←t).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np
import torch

from gradflow.analyzer.jacobians import HostOperator, operator_of, state_size
from gradflow.analyzer.order import cuts_before
from gradflow.analyzer.plan import Maps
from gradflow.analyzer.singular import log_singular_along, survivors
from gradflow.analyzer.spread import each
from gradflow.limits import RANK_STARTS
from gradflow.recording import Track


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
