"""The gain over the span, of every sequence, from the largest gains of windows: what a verdict judges.

Letters: T steps, B sequences, S the state's width, N windows, K parts, m rows of a block, n the steps
that gains are taken over. A window is a run of steps of one sequence, its gain ln ‖P‖₂ with
P = A_last … A_first. The windows of one part are disjoint, so one sweep over the steps pushes a block
of each part of each sequence, and starts anew where a window begins.

g_b = ln ‖P(t+n←t)‖₂, the median over disjoint windows of a sequence, never across a cut. n is the same
for all that a verdict rests on: the span, or, where too few stretches are that long, what enough of
them are, a whole sequence of T states being T − 1 steps. A sequence that is shorter has the gain over
what it is, and no vote: a few steps tell nothing of many.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from gradflow.limits import (
    EXACT_WIDTH,
    SEED,
    STEPS_ALIKE,
    WINDOW_ROUNDS,
    WINDOW_ROWS,
    WINDOW_TOLERANCE,
)
from gradflow.recording.source import Operator


@dataclass(frozen=True)
class Window:
    """The steps first … last − 1 of a sequence, in processing order."""

    sequence: int
    first: int
    last: int
    part: int = 0

    @property
    def steps(self) -> int:
        """How many steps it holds."""
        return self.last - self.first


@dataclass(frozen=True)
class Norms:
    """What the windows keep; −inf where P is exactly 0, NaN where a step holds NaN or Inf."""

    spectral: Tensor  # (N,) ln ‖P‖₂
    frobenius: Tensor  # (N,) ln ‖P‖_F, of the directions searched: all of them up to S = EXACT
    leading: Tensor  # (N, S) the direction that keeps most, of length 1: P's right singular vector
    missing: float  # what the last round still added to the worst of them, nats; 0 if all is exact

    def after(self, count: int) -> Norms:
        """Those of all windows but the first so many."""
        spectral, frobenius = self.spectral[count:], self.frobenius[count:]
        return Norms(spectral, frobenius, self.leading[count:], self.missing)


def log_norms(
    operator: Operator,
    windows: list[Window],
    *,
    rows: int = WINDOW_ROWS,
    rounds: int = WINDOW_ROUNDS,
    tolerance: float = WINDOW_TOLERANCE,
    progress: Callable[[float], None] | None = None,
) -> Norms:
    """ln ‖P‖₂ of every window by pushes and pulls alone.

    Up to S = 32 the unit vectors are pushed. Above, a block Krylov iteration on PᵀP: the rows are
    pulled back, made orthogonal to all earlier ones, pushed forward, and the largest singular value
    over everything pushed is taken, until a round adds less than the tolerance to any ln ‖P‖₂ (Golub &
    Kahan 1965; Musco & Musco 2015). Each estimate is a lower bound.

    Args:
        operator: A_t of B sequences.
        windows: those of one part of a sequence disjoint; at least one step each.
        rows: of the block that goes to and fro.
        rounds: at most so many.
        tolerance: what one more round may still add, nats.
        progress: called with the share of the rounds done.

    >>> from gradflow.analyzer.jacobians import DenseOperator
    >>> halving = DenseOperator(torch.full((9, 1, 1, 1), 0.5, dtype=torch.float64))
    >>> found = log_norms(halving, [Window(0, 0, 3), Window(0, 5, 9)])
    >>> [round(gain, 9) for gain in found.spectral.exp().tolist()]
    [0.125, 0.0625]
    """
    size = operator.size
    if not windows:
        nothing = torch.zeros(0, dtype=torch.float64)
        return Norms(nothing, nothing, torch.zeros(0, size, dtype=torch.float64), 0.0)
    sweep = WindowSweep(operator, windows)
    if size <= EXACT_WIDTH:
        return _exact(sweep, size)
    tell = progress or (lambda share: None)
    return _iterated(sweep, min(rows, size), rounds, tolerance, tell)


def _exact(sweep: WindowSweep, size: int) -> Norms:
    eye = torch.eye(size, dtype=sweep.operator.dtype).expand(len(sweep.windows), -1, -1)
    pushed, scale = sweep.push(eye)
    return _norms(eye.double(), pushed, scale, 0.0)


def _iterated(
    sweep: WindowSweep, rows: int, rounds: int, tolerance: float, progress: Callable[[float], None]
) -> Norms:
    """Everything pulled back so far spans a space; its image is kept beside it."""
    count, size, dtype = len(sweep.windows), sweep.operator.size, sweep.operator.dtype
    generator = torch.Generator().manual_seed(SEED)
    mixed = torch.randn(size, rows, generator=generator, dtype=torch.float64)
    heads = torch.linalg.qr(mixed)[0].T.to(dtype).expand(count, -1, -1)
    basis = torch.zeros(count, 0, size, dtype=torch.float64)
    images, scales = basis, torch.full((count,), -torch.inf, dtype=torch.float64)
    before, missing = scales, 0.0
    for turn in range(rounds):
        pulled, _ = sweep.pull(heads)
        fresh = _beside(pulled, basis, size)
        if fresh.shape[1] == 0:
            break
        pushed, scale = sweep.push(fresh.to(dtype))
        shared = torch.maximum(scales, scale)
        both = [_rescaled(images, scales - shared), _rescaled(pushed, scale - shared)]
        basis, images, scales = torch.cat([basis, fresh], 1), torch.cat(both, 1), shared
        found = _largest(images) + scales
        added = torch.where(found == before, 0.0, found - before)  # −inf stays −inf
        missing = float(added.nan_to_num(0.0).max())
        progress((turn + 1) / rounds)
        if turn and missing <= tolerance:
            break
        before = found
        heads = torch.linalg.qr(pushed.nan_to_num(0.0).mT)[0].mT.to(dtype)
    return _norms(basis, images, scales, missing)


def _beside(pulled: Tensor, basis: Tensor, size: int) -> Tensor:
    """Orthonormal rows for what was pulled back, orthogonal to the basis: (N, ≤ m, S)."""
    rows = min(pulled.shape[1], size - basis.shape[1])
    fresh = torch.linalg.qr(pulled.nan_to_num(0.0).mT)[0].mT[:, :rows]
    for _ in range(2):  # once more for what rounding left of the basis
        fresh = fresh - (fresh @ basis.mT) @ basis
        fresh = torch.linalg.qr(fresh.mT)[0].mT
    return fresh


def _rescaled(rows: Tensor, log_factor: Tensor) -> Tensor:
    return rows * log_factor.nan_to_num(0.0, posinf=0.0).exp()[:, None, None]


def _largest(images: Tensor) -> Tensor:
    values = torch.linalg.svdvals(images.nan_to_num(0.0))[:, 0].log()
    return torch.where(_bad(images), torch.nan, values)


def _bad(images: Tensor) -> Tensor:
    return ~torch.isfinite(images).flatten(1).all(1)


def _norms(basis: Tensor, images: Tensor, scales: Tensor, missing: float) -> Norms:
    """Norms of the images of an orthonormal basis, and the direction that keeps most."""
    turn, values, _ = torch.linalg.svd(images.double().nan_to_num(0.0), full_matrices=False)
    bad = _bad(images)
    scales = torch.where(torch.isneginf(scales), 0.0, scales)
    spectral = torch.where(bad, torch.nan, values[:, 0].log() + scales)
    frobenius = torch.where(bad, torch.nan, torch.linalg.vector_norm(values, dim=1).log() + scales)
    leading = (turn[:, None, :, 0] @ basis)[:, 0]
    return Norms(spectral, frobenius, leading, missing)


class WindowSweep:
    """Pushes a block through each window, or pulls one back through it, all in one run over time."""

    def __init__(self, operator: Operator, windows: list[Window]) -> None:
        self.operator, self.windows = operator, windows
        self.parts = 1 + max(window.part for window in windows)
        self.starts: dict[int, list[int]] = {}
        self.ends: dict[int, list[int]] = {}
        live = torch.zeros(operator.length, operator.batch, self.parts, dtype=torch.bool)
        for number, window in enumerate(windows):
            self.starts.setdefault(window.first, []).append(number)
            self.ends.setdefault(window.last - 1, []).append(number)
            live[window.first : window.last, window.sequence, window.part] = True
        self.live, self.whole = live, live.flatten(1).all(1).tolist()
        self.some = live.flatten(1).any(1).tolist()
        self.sequence = torch.tensor([window.sequence for window in windows])
        self.part = torch.tensor([window.part for window in windows])

    def push(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """P V of every window's rows (N, m, S), in float64, and the ln taken out of them (N,)."""
        steps = range(self.operator.length)
        return self._run(blocks, steps, self.operator.push, self.starts, self.ends)

    def pull(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Pᵀ U of every window's rows, likewise."""
        steps = range(self.operator.length - 1, -1, -1)
        return self._run(blocks, steps, self.operator.pull, self.ends, self.starts)

    def _run(
        self,
        blocks: Tensor,
        steps: range,
        step: Callable[[int, Tensor], Tensor],
        begins: dict[int, list[int]],
        ends: dict[int, list[int]],
    ) -> tuple[Tensor, Tensor]:
        batch, (_, rows, size) = self.operator.batch, blocks.shape
        state = torch.zeros(batch, self.parts, rows, size, dtype=blocks.dtype)
        scale = torch.zeros(batch, self.parts, dtype=torch.float64)
        result = torch.zeros(blocks.shape, dtype=torch.float64)
        logs = torch.zeros(len(blocks), dtype=torch.float64)
        for t in steps:
            if not self.some[t]:
                continue
            if t in begins:
                chosen = torch.tensor(begins[t])
                place = self.sequence[chosen], self.part[chosen]
                state[place], scale[place] = blocks[chosen], 0.0
            moved = step(t, state.view(batch, self.parts * rows, size))
            state = moved.reshape(batch, self.parts, rows, size)
            if not self.whole[t]:  # what padding or a cut makes of a block is not used
                state = torch.where(self.live[t][..., None, None], state, 0.0)
            peak = state.abs().amax((2, 3))
            safe = torch.where(torch.isfinite(peak) & (peak > 0), peak, 1.0)
            state = state / safe[..., None, None]
            scale += safe.double().log()
            if t in ends:
                chosen = torch.tensor(ends[t])
                place = self.sequence[chosen], self.part[chosen]
                result[chosen], logs[chosen] = state[place].double(), scale[place]
        return result, logs


@dataclass(frozen=True)
class SpanGains:
    """What each sequence keeps over the span."""

    values: np.ndarray  # (B,) nats; −inf where zeros or cuts leave nothing, NaN if not measured
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
