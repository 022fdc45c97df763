"""The gain over the span, of every sequence: what a verdict judges.

Letters: T steps, B sequences, n steps of a stretch. g_b = ln ‖P(t+span←t)‖₂ over the whole sequence
where it is no longer than the span, the median over disjoint windows where it is longer, never across
a cut.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradflow.analyzer.windows import Norms, Window, log_norms
from gradflow.limits import WINDOW_BYTES, WINDOW_ROUNDS
from gradflow.recording import Operator


@dataclass(frozen=True)
class SpanGains:
    """What each sequence keeps over the span."""

    values: (
        np.ndarray
    )  # (B,) nats; −inf where exact zeros or cuts leave nothing, NaN if not measured
    steps: np.ndarray  # (B,) how many steps that is over, the median of its windows; 0 if none


def span_gains(
    operator: Operator,
    lengths: Tensor,
    span: int,
    *,
    cuts: Tensor | None = None,
    rows: int = 4,
    rounds: int = WINDOW_ROUNDS,
) -> SpanGains:
    """ln of the largest gain of any direction over the span, of every sequence.

    Only the operator's push and pull are used, so it may be as wide as these can take. The step into
    the first state is not counted: T states have T − 1 steps between them.

    Args:
        operator: A_t of B sequences.
        lengths: (B,) real steps.
        span: steps of interest.
        cuts: (T, B) true where nothing of the past arrives, in processing order.
        rows: of the block that goes to and fro, see `log_norms`.
        rounds: of that, at most.

    >>> from gradflow.analyzer.jacobians import DenseOperator
    >>> halving = DenseOperator(torch.full((9, 1, 1, 1), 0.5, dtype=torch.float64))
    >>> found = span_gains(halving, torch.tensor([9]), 100)
    >>> round(float(np.exp(found.values[0])), 8), int(found.steps[0])             # 0.5⁸
    (0.00390625, 8)
    """
    crossed = crossing(operator.length, lengths, cuts)
    size = 16 * rows * operator.size  # bytes of a window, in float64, to and fro
    windows = span_windows(crossed, span, max(1, WINDOW_BYTES // (size * operator.batch)))
    return collected(windows, log_norms(operator, windows, rows=rows, rounds=rounds), crossed)


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


def span_windows(crossed: np.ndarray, span: int, most: int) -> list[Window]:
    """Disjoint windows of the span, counted from the end of each stretch; a shorter one is its own.

    Where a sequence has more than `most`, so many of them, evenly spread.
    """
    found: dict[int, list[Window]] = {}
    for b, first, last in stretches(crossed):
        count = max(1, (last - first) // span)
        width = min(span, last - first)
        starts = [last - width * place for place in range(count, 0, -1)]
        found.setdefault(b, []).extend(Window(b, start, start + width) for start in starts)
    chosen = []
    for own in found.values():
        every = np.unique(np.linspace(0, len(own) - 1, min(most, len(own))).round().astype(int))
        chosen += [own[place] for place in every]
    return chosen


def collected(windows: list[Window], norms: Norms, crossed: np.ndarray) -> SpanGains:
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
    return SpanGains(values, steps)


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
    return SpanGains(np.where(none, -math.inf, gains.values), gains.steps)
