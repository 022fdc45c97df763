"""Which method and which sources: the gain map that fits a budget, and what was chosen in words.

Letters: S the state's width, L a sequence's steps. Costs are counted in floating point operations
and never measured by a clock, so that the same input always gives the same map.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gradflow.analyzer.jacobians import operator_of
from gradflow.analyzer.products import NORMS, TRUNCATION, log_gains, spectral_work
from gradflow.recording import Track

SPEED = {torch.float64: 25e9, torch.float32: 80e9}  # operations a second on two cores
WIDE = 384  # states wider than this are sketched in float32
BYTES = 256 * 2**20  # of one map


@dataclass(frozen=True)
class Maps:
    """ln gain of the mapped sequences: norm -> (sequence, source, target), and how it was made."""

    log_gain: dict[str, np.ndarray]
    sources: np.ndarray
    method: str  # "exact" or "sketch"
    stride: int
    dtype: torch.dtype
    words: str


def make_maps(
    track: Track,
    sequences: Sequence[int],
    *,
    method: str,
    stride: int | None,
    seed: int,
    seconds: float,
    progress: Callable[[float], None],
) -> Maps:
    """ln gain from every chosen source to every later step of the mapped sequences."""
    lengths = [int(track.lengths[b]) for b in sequences]
    size = operator_of(track, sequences=list(sequences)[:1]).size
    predicted = sum(exact_seconds(size, length) for length in lengths)
    chosen = method
    if method == "auto":
        chosen = "exact" if predicted <= seconds else "sketch"
    dtype = torch.float32 if chosen == "sketch" and size > WIDE else torch.float64
    making = _Making(track, sequences, chosen == "sketch", dtype, seed)
    if method == "auto" and stride is None and chosen == "sketch":
        stride = making.refine(seconds, progress)
    else:
        stride = stride or 1
        making.add(range(0, max(lengths), stride))
    return Maps(
        {norm: values[:, ::stride] for norm, values in making.log_gain.items()},
        np.arange(0, track.steps, stride),
        chosen,
        stride,
        dtype,
        _words(chosen, stride, dtype, size, predicted if method == "auto" else None),
    )


def exact_seconds(size: int, length: int) -> float:
    """Predicted seconds of an exact map with every step a source, in float64."""
    pairs = length * (length - 1) / 2
    work = pairs * (2.0 * size**3 + spectral_work(size, size))
    return work / SPEED[torch.float64] + length * 1e-4


class _Making:
    """A map under way: groups of sources are added until the budget is spent."""

    def __init__(
        self, track: Track, sequences: Sequence[int], sketch: bool, dtype: torch.dtype, seed: int
    ) -> None:
        self.track, self.sequences = track, sequences
        self.sketch, self.dtype, self.seed = sketch, dtype, seed
        self.work = 0.0
        shape = (len(sequences), track.steps, track.steps)
        self.log_gain = {norm: np.full(shape, np.nan) for norm in NORMS}

    def add(self, sources: range) -> float:
        """Fill in these sources; return the operations it took."""
        before = self.work
        for place, b in enumerate(self.sequences):
            operator = operator_of(self.track, self.dtype, [b])
            inside = [t for t in sources if t < operator.length]
            if not inside:
                continue
            gains = log_gains(
                operator, inside, sketch=self.sketch, seed=self.seed, spend=self._spend
            )
            for norm, values in gains.items():
                self.log_gain[norm][place, inside, : operator.length] = values[0].numpy()
        return self.work - before

    def _spend(self, work: float) -> None:
        self.work += work + 2.5e6 * (not math.isnan(work))  # a step costs some calls besides

    def refine(self, seconds: float, progress: Callable[[float], None]) -> int:
        """Add sources between those there are as long as the next group is sure to fit."""
        steps = self.track.steps
        budget = seconds * SPEED[self.dtype]
        stride = 1 << max(0, (steps - 1).bit_length())
        cost = self.add(range(0, steps, stride))
        while stride > 1:
            group = range(stride // 2, steps, stride)
            count = max(1, len(range(0, steps, stride)) // 2)  # of the group just made
            if self.work + 1.3 * cost * max(1, len(group)) / count > budget:
                break
            cost = self.add(group)
            stride //= 2
            progress(min(1.0, self.work / budget))
        return stride


def _words(
    method: str, stride: int, dtype: torch.dtype, size: int, predicted: float | None
) -> str:
    every = "every step a source" if stride == 1 else f"every {ordinal(stride)} step a source"
    words = f"{method}, {every}"
    if method == "sketch":
        words += f", at most {TRUNCATION:g} of a block dropped at a time"
    if size > 64:
        words += ", spectral norms iterated to 1e-4"
    if dtype == torch.float32:
        words += ", products in float32"
    if method == "sketch" and predicted is not None:
        words += f": the exact map would take about {_rounded(predicted)} s"
    return words


def _rounded(seconds: float) -> str:
    digits = max(0, len(str(int(seconds))) - 2)
    return f"{round(int(math.ceil(seconds)), -digits)}"


def ordinal(number: int) -> str:
    """A number with its English ending.

    >>> [ordinal(n) for n in (1, 2, 3, 4, 11, 22)]
    ['1st', '2nd', '3rd', '4th', '11th', '22nd']
    """
    if number % 100 in (11, 12, 13):
        return f"{number}th"
    return f"{number}{ {1: 'st', 2: 'nd', 3: 'rd'}.get(number % 10, 'th')}"
