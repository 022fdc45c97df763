"""The gain over the span, of every sequence: what a verdict judges.

Letters: T steps, B sequences, n the steps that gains are taken over. g_b = ln ‖P(t+n←t)‖₂, the median
over disjoint windows of a sequence, never across a cut. n is the same for all that a verdict rests on:
the span, or, where too few stretches are that long, what enough of them are, a whole sequence of T
states being T − 1 steps. A sequence that is shorter has the gain over what it is, and no vote: a
few steps tell nothing of many.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from gradflow.analyzer.windows import Norms, Window
from gradflow.limits import STEPS_ALIKE


@dataclass(frozen=True)
class SpanGains:
    """What each sequence keeps over the span."""

    values: (
        np.ndarray
    )  # (B,) nats; −inf where exact zeros or cuts leave nothing, NaN if not measured
    steps: np.ndarray  # (B,) how many steps that is over, the median of its windows; 0 if none
    over: int  # n: how many steps it is over where a sequence has a vote; 0 if none has

    @property
    def voting(self) -> np.ndarray:
        """(B,) whether a sequence is long enough, or has no step at all that is not cut."""
        return (self.steps == self.over) | (self.steps == 0)

    @property
    def votes(self) -> np.ndarray:
        """(B,) the gains a verdict rests on, NaN for sequences that are too short."""
        return np.where(self.voting, self.values, np.nan)


def crossing(steps: int, lengths: Tensor, cuts: Tensor | None) -> np.ndarray:
    """(T, B): the steps that lead from a state seen to the next, past the first and no cut."""
    when = torch.arange(steps)[:, None]
    live = (when > 0) & (when < lengths.cpu())
    return (live if cuts is None else live & ~cuts[:steps]).numpy()


def stretches(live: np.ndarray) -> list[tuple[int, int, int]]:
    """(sequence, first, last + 1) of every run of steps that count, sequence by sequence.

    >>> stretches(np.array([[0], [1], [1], [0], [1]], dtype=bool))
    [(0, 1, 3), (0, 4, 5)]
    """
    edges = np.diff(live.astype(int), axis=0, prepend=0, append=0)
    return [
        (b, int(first), int(last))
        for b, column in enumerate(edges.T)
        for first, last in zip(
            np.flatnonzero(column == 1), np.flatnonzero(column == -1), strict=True
        )
    ]


def common_steps(crossed: np.ndarray, span: int) -> int:
    """n: the most steps, up to the span, that half of all steps have a stretch of, and two sequences.

    Up to a tenth fewer where that takes in stretches that are hardly shorter. 0 without any step.

    >>> lengths = np.array([39, 34, 19, 7])
    >>> crossed = np.arange(40)[:, None] < lengths
    >>> common_steps(crossed, 28), common_steps(crossed, 100), common_steps(crossed[:, :1], 100)
    (28, 34, 39)
    """
    found = stretches(crossed)
    if not found:
        return 0
    widths = np.array([min(span, last - first) for _, first, last in found])
    steps = np.array([last - first for _, first, last in found])
    order = np.argsort(-widths, kind="stable")
    half = widths[order][np.searchsorted(np.cumsum(steps[order]), steps.sum() / 2)]
    longest: dict[int, int] = {}
    for (b, _, _), width in zip(found, widths, strict=True):
        longest[b] = max(longest.get(b, 0), int(width))
    second = sorted(longest.values(), reverse=True)[:2][-1]
    most = min(int(half), second)
    return int(widths[widths >= STEPS_ALIKE * most].min())


def span_windows(crossed: np.ndarray, over: int, most: int) -> list[Window]:
    """Disjoint windows of so many steps, counted from the end of each stretch that has them.

    The stretches of a sequence that has none so long are its own. Where a sequence has more than
    `most`, so many of them, evenly spread.
    """
    found: dict[int, list[Window]] = {}
    for b, first, last in stretches(crossed):
        count = max(1, (last - first) // over)
        width = min(over, last - first)
        starts = [last - width * place for place in range(count, 0, -1)]
        found.setdefault(b, []).extend(Window(b, start, start + width) for start in starts)
    chosen = []
    for every in found.values():
        own = [window for window in every if window.steps == over] or every
        kept = np.unique(np.linspace(0, len(own) - 1, min(most, len(own))).round().astype(int))
        chosen += [own[place] for place in kept]
    return chosen


def collected(windows: list[Window], norms: Norms, crossed: np.ndarray, over: int) -> SpanGains:
    """The median of each sequence's windows, a stretch between cuts counting by its steps."""
    batch = crossed.shape[1]
    values, steps = np.full(batch, math.nan), np.zeros(batch, dtype=int)
    owner = np.array([window.sequence for window in windows], dtype=int)
    widths = np.array([window.steps for window in windows], dtype=int)
    gains = norms.spectral[: len(windows)].numpy()
    for b in np.unique(owner):
        own, weights = gains[owner == b], widths[owner == b]
        values[b] = math.nan if np.isnan(own).any() else weighted_median(own, weights)
        steps[b] = round(weighted_median(weights.astype(float), weights))
    return SpanGains(values, steps, over)


def weighted_median(values: np.ndarray, weights: np.ndarray) -> float:
    """Where half of the weight lies on either side; between two values their mean, or −∞ if one is.

    >>> weighted_median(np.array([3.0, 1.0]), np.array([1, 1]))
    2.0
    >>> weighted_median(np.array([-np.inf, -1.0]), np.array([3, 35]))
    -1.0
    """
    order = np.argsort(values, kind="stable")
    below = np.cumsum(weights[order])
    low = float(values[order][np.searchsorted(below, below[-1] / 2)])
    high = float(values[order][np.searchsorted(below, below[-1] / 2, side="right")])
    return low if math.isinf(low) else (low + high) / 2


def dead_by_cuts(gains: SpanGains, lengths: np.ndarray) -> SpanGains:
    """The same, −inf for sequences of two steps or more of which every one is cut."""
    none = (gains.steps == 0) & (lengths > 1)
    return replace(gains, values=np.where(none, -math.inf, gains.values))
