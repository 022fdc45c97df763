"""The rate free of the bias of its start, and how far it has settled.

Letters: T steps, B sequences, n counted steps of a sequence, W₁, W₂, W₄ the sums of ln ‖P‖₂ over all
of them, over their halves and over their quarters; F₁, F₂, F₄ the same of ln ‖P‖_F.

ln ‖P‖₂ over n steps is n λ₁ and a boundary c_n for the directions that its two ends may choose. A sum
over parts holds the same growth and a boundary for each part, so 2 W₁ − W₂ = n λ₁ + 2 (c_n − c_{n/2})
takes it out. The largest direction comes down to λ₁ from above; the mean over all, which is what
‖P‖_F sees, comes up from below: the rate lies between the two.

All this is of steps alike. A layer that starts far from where it comes to rest has other steps at
first, and its states come to rest no faster than it forgets, at the pace of λ₁ itself: over a few
steps of a slow layer no growth is that of the long run. The steps tell whether they still move:
m probes V through the mean A_t of the earlier and of the later half.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch

from gradflow.analyzer.gains import stretches
from gradflow.analyzer.rates import quantile
from gradflow.analyzer.windows import Norms, Window
from gradflow.limits import (
    BOUNDARY,
    LN_SETTLED,
    MOVES,
    MOVES_CHANCE,
    MOVES_LONG,
    MOVES_MOST,
    PROBES,
    SEED,
    SETTLED_SHARE,
    UNSETTLED,
)
from gradflow.recording import Operator

PARTS = (1, 2, 4)


@dataclass(frozen=True)
class Settled:
    """The rate of each sequence, and what all of them may have in common that is not the rate."""

    rates: np.ndarray  # (B,) nats per step; NaN where no step counts
    common: float  # half-width, nats per step: it does not shrink with more sequences


def enough(common: float, rate: float, span: int) -> bool:
    """Whether a rate may be told: off by less than half a decade over the span, or by a fifth.

    >>> enough(0.001, -0.002, 100), enough(0.05, -0.1, 100), enough(0.05, -0.5, 100)
    (True, False, True)
    """
    return common * span <= LN_SETTLED or common <= SETTLED_SHARE * abs(rate)


def parted(counted: np.ndarray, part: int) -> list[Window]:
    """Each stretch of counted steps whole, in halves and in quarters, as parts part, part + 1, …"""
    found = []
    for b, first, last in stretches(counted):
        for place, pieces in enumerate(PARTS):
            edges = [first + round((last - first) * i / pieces) for i in range(pieces + 1)]
            found += [
                Window(b, start, end, part + place)
                for start, end in itertools.pairwise(edges)
                if end > start
            ]
    return found


def settled(windows: list[Window], norms: Norms, batch: int, part: int) -> Settled:
    """Rates and their common settling from the norms of `parted` windows.

    >>> import torch
    >>> windows = parted(np.ones((8, 2), dtype=bool), 0)
    >>> logs = torch.tensor([-0.1 * window.steps for window in windows])
    >>> found = settled(windows, Norms(logs, logs, logs[:, None], 0.0), 2, 0)
    >>> found.rates.round(4).tolist(), round(found.common, 4)
    ([-0.1, -0.1], 0.0)
    """
    sums = np.zeros((2, len(PARTS), batch))
    steps, drift = np.zeros(batch), np.zeros(batch)
    middle = {(w.sequence, w.last) for w in windows if w.part == part}
    # −inf of an exact zero, and no step at all
    with np.errstate(invalid="ignore", divide="ignore"):
        for place, window in enumerate(windows):
            b, level = window.sequence, window.part - part
            pair = norms.spectral[place].item(), norms.frobenius[place].item()
            sums[:, level, b] += pair
            if level == 0:
                steps[b] += window.steps
            if level == 1:  # the later half against the earlier
                drift[b] += pair[0] if (b, window.last) in middle else -pair[0]
        whole, halves, quarters = (sums / steps).transpose(1, 0, 2)  # each (2, B)
        late, early = 2 * whole - halves, 2 * halves - quarters
        rates = late.mean(0)
        known = np.isfinite(rates)
        if not known.any():
            return Settled(rates, 0.0)
        late, early, late_half = late[:, known], early[:, known], (drift / steps)[known]
        boundary = float(np.mean((halves - whole)[0, known]))
    between = abs(float(np.mean(late[0] - late[1]))) / 2
    scales = max(beyond_noise(late[0] - early[0]), beyond_noise(late[1] - early[1]))
    trend = 2 * _significant(late_half)
    common = between + UNSETTLED * math.hypot(scales, trend) + BOUNDARY * abs(boundary)
    return Settled(rates, common)


def mean_steps(operator: Operator, counted: np.ndarray, probes: int = PROBES) -> np.ndarray:
    """What the steps make of fixed random vectors, mean over each half: (2, B, m S).

    counted (T, B) are the steps that count; NaN for a sequence of which one of the halves has none.

    >>> from gradflow.analyzer.jacobians import DenseOperator
    >>> steps = torch.tensor([0.5, 0.5, 0.7, 0.9]).double()[:, None, None, None]
    >>> found = mean_steps(DenseOperator(steps), np.ones((4, 1), dtype=bool))
    >>> (found[1] / found[0]).round(6).tolist()                                  # 0.8 and 0.5
    [[1.6]]
    """
    rows = min(probes, operator.size)
    generator = torch.Generator().manual_seed(SEED)
    mixed = torch.randn(operator.size, rows, generator=generator, dtype=torch.float64)
    vectors = torch.linalg.qr(mixed)[0].T.to(operator.dtype).expand(operator.batch, -1, -1)
    place, steps = counted.cumsum(0), counted.sum(0)
    earlier = torch.from_numpy(counted & (2 * place <= steps))
    later = torch.from_numpy(
        counted & (2 * place > steps + 1)
    )  # the middle of an odd number: neither
    sums = torch.zeros(2, operator.batch, rows * operator.size, dtype=torch.float64)
    for t in np.flatnonzero(counted.any(1)):
        images = operator.push(int(t), vectors).double().flatten(1)
        for half, inside in enumerate((earlier[t], later[t])):
            sums[half, inside] += images[inside]
    counts = torch.stack([earlier.sum(0), later.sum(0)])[..., None]
    return (sums / counts).numpy()


def unrest(seen: np.ndarray, rate: float, steps: float) -> float:
    """By how much a rate may be off as the steps still move, nats per step.

    With growth λ + a e^(−|λ| t) over n steps, x = n |λ|, the mean is off by coth(x/4)/2 times the
    difference of the two halves. That difference is told by how far the mean step moves, relative to
    its size, times a factor by simulation; a move that is less than chance would make it is none. Of
    the difference at most MOVES_LONG times is to come, and at most MOVES_MOST over all steps.

    Args:
        seen: (2, B, ·) of `mean_steps`.
        rate: λ, nats per step.
        steps: n, the mean over sequences.

    >>> alike = np.ones((2, 3, 4))
    >>> unrest(alike, -0.1, 40.0), round(unrest(alike * [[[1.0]], [[1.1]]], -0.1, 40.0), 4)
    (0.0, 0.0075)
    """
    known = seen[:, np.isfinite(seen).all((0, 2))]
    if not known.shape[1] or not steps:
        return 0.0
    each = known[1] - known[0]
    square, size = float((each.mean(0) ** 2).sum()), float(np.linalg.norm(known.mean((0, 1))))
    by_chance = float(each.var(0, ddof=1).sum()) / len(each) if len(each) > 1 else 0.0
    if not size or square <= MOVES_CHANCE * by_chance:
        return 0.0
    moved = math.sqrt(square) / size
    slowly = max(2 * math.tanh(steps * abs(rate) / 4), 1 / MOVES_LONG)
    return min(MOVES * moved / slowly, MOVES_MOST / steps)


def beyond_noise(values: np.ndarray) -> float:
    """What a mean over sequences is beyond its own standard error, in squares."""
    error = float(values.var(ddof=1)) / len(values) if len(values) > 1 else 0.0
    return math.sqrt(max(0.0, float(values.mean()) ** 2 - error))


def _significant(values: np.ndarray) -> float:
    """What a mean over sequences is beyond its 95 % interval; all of one sequence's is noise."""
    if len(values) < 2:
        return 0.0
    half = quantile(len(values) - 1) * float(values.std(ddof=1)) / math.sqrt(len(values))
    return max(0.0, abs(float(values.mean())) - half)
