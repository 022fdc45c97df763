"""Which method and which sources: the gain map that fits a budget, and what was chosen in words.

Letters: S the state's width, L a sequence's steps. Costs are predicted from operation counts
and never measured by a clock, so that the same input always gives the same map.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gradflow.analyzer.jacobians import operator_of, state_size
from gradflow.analyzer.products import CALLS, NORMS, SPEED, TRUNCATION, log_gains, spectral_work
from gradflow.recording import Track

WIDE = 384  # states wider than this are sketched in float32


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
    size = state_size(track)
    predicted = sum(exact_seconds(size, length) for length in lengths)
    chosen = method
    if method == "auto":
        chosen = "exact" if predicted <= seconds else "sketch"
    dtype = torch.float32 if chosen == "sketch" and size > WIDE else torch.float64
    making = _Making(track, sequences, chosen == "sketch", dtype, seed)
    if method == "auto" and stride is None and chosen == "sketch":
        stride = making.fit(seconds, progress)
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
    return work / SPEED[torch.float64] + length * 5e-4


class _OverBudget(Exception):
    """A map turned out dearer than foretold."""


class _Making:
    """A map under way, and what it has cost so far."""

    def __init__(
        self, track: Track, sequences: Sequence[int], sketch: bool, dtype: torch.dtype, seed: int
    ) -> None:
        self.track, self.sequences = track, sequences
        self.sketch, self.seed = sketch, seed
        self.operators = [operator_of(track, dtype, [b]) for b in sequences]
        self.spent: list[float] = []  # predicted seconds of each step so far
        self.limit = math.inf
        self.tell: Callable[[float], None] = lambda share: None
        shape = (len(sequences), track.steps, track.steps)
        self.log_gain = {norm: np.full(shape, np.nan) for norm in NORMS}

    def add(self, sources: range) -> None:
        """Fill in these sources."""
        for place, operator in enumerate(self.operators):
            inside = [t for t in sources if t < operator.length]
            if not inside:
                continue
            gains = log_gains(
                operator, inside, sketch=self.sketch, seed=self.seed, spend=self._spend
            )
            for norm, values in gains.items():
                self.log_gain[norm][place, inside, : operator.length] = values[0].numpy()

    def _spend(self, seconds: float) -> None:
        self.spent.append(seconds)
        total = sum(self.spent)
        self.tell(min(1.0, total / self.limit))
        if total > self.limit:
            raise _OverBudget

    def fit(self, seconds: float, progress: Callable[[float], None]) -> int:
        """Follow the first step as a pilot, and choose the stride that its cost by lag allows."""
        longest = max(operator.length for operator in self.operators)
        pilots = []
        for operator in self.operators:
            self.spent = []
            log_gains(operator, [0], sketch=self.sketch, seed=self.seed, spend=self._spend)
            pilots.append(np.array(self.spent))
        piloted = float(sum(pilot.sum() for pilot in pilots))
        stride = 1
        while stride < longest and _foretold(pilots, stride) > seconds - piloted:
            stride *= 2
        self.tell = progress
        while True:
            self.spent, self.limit = [], 1.5 * seconds if stride < longest else math.inf
            try:
                self.add(range(0, longest, stride))
            except _OverBudget:
                # ranks that fell along the pilot stay high later on
                stride = min(4 * stride, 1 << longest.bit_length())
                for values in self.log_gain.values():
                    values.fill(np.nan)
                continue
            return stride


def _foretold(pilots: list[np.ndarray], stride: int) -> float:
    """Seconds of all sources: what lag k cost the pilot, times how many sources reach lag k."""
    total = 0.0
    for pilot in pilots:
        length = len(pilot)
        reached = np.ceil((length - np.arange(length)) / stride)
        calls = 8 * CALLS  # of each step, shared by all sources
        total += float(((pilot - calls).clip(CALLS / 8) * reached).sum()) + length * calls
    return total


def _words(method: str, stride: int, dtype: torch.dtype, size: int, predicted: float | None) -> str:
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
    return f"{round(math.ceil(seconds), -digits)}"


def ordinal(number: int) -> str:
    """A number with its English ending.

    >>> [ordinal(n) for n in (1, 2, 3, 4, 11, 22)]
    ['1st', '2nd', '3rd', '4th', '11th', '22nd']
    """
    if number % 100 in (11, 12, 13):
        return f"{number}th"
    return f"{number}{ {1: 'st', 2: 'nd', 3: 'rd'}.get(number % 10, 'th') }"
