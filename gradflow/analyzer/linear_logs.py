"""Elementwise state maps: every gain of every pair of steps is a sum of logarithms.

Letters: T steps, D the distinct numbers of a state map, m the entries of the state that share each, S =
D m, s a source state, t a target state, C_t = Σ_{τ≤t} ln |a_τ|, so that ln of entry i of P(t←s) is
C_t,i − C_s,i. Over i, its maximum is ln ‖P‖₂, and its log-sum-exp of the doubles gives ‖P‖_F. Pairs
are taken in blocks [lo, mid) × [mid, hi) of sources and targets, halved again and again: from the
state r = mid − 1 between them, C_t − C_s = (C_t − C_r) + (C_r − C_s), two rows for each pair. For sums
that is a matrix product of e^{2(C_t − C_r)} and e^{2(C_r − C_s)}, each scaled to its largest entry;
for maxima, entries that are below another's in a whole block are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradflow.cells.linear import HEAD_AXES, LinearSteps
from gradflow.limits import PAIR_BLOCK, PAIR_COLUMNS, PAIR_TILE, PAIR_WIDTH
from gradflow.recording.source import moved
from gradflow.recording.track import Track

Block = Callable[[Tensor, Tensor], Tensor]  # rows (p, D) of targets, (n, D) of sources -> (n, p)
TINY = 1e-30  # a scaled sum below it may have lost terms to underflow, also in float32


@dataclass(frozen=True)
class Logs:
    """ln |a_t| of one sequence: all that the gains of an elementwise recurrence need."""

    total: Tensor  # (T, D) C_t float64; exact zeros count as 0
    zeros: Tensor | None  # (T, D) how many exact zeros lie at or before t; None: there is none
    copies: int  # m
    groups: int  # heads, whose entries lie one behind the other; 1 without heads
    inner: int  # entries of a channel, one behind the other, of which one may be above the others

    @property
    def steps(self) -> Tensor:
        """ln |a_t|, (T, D), −inf for an exact zero; its first is that of the step into s_0."""
        found = self.total.diff(dim=0, prepend=torch.zeros_like(self.total[:1]))
        if self.zeros is None:
            return found
        new = self.zeros.diff(dim=0, prepend=torch.zeros_like(self.zeros[:1]))
        return found.masked_fill(new > 0, -torch.inf)

    def between(self, sources: Tensor, targets: Tensor) -> Tensor:
        """ln of the entries of P(t←s) for pairs of states, (N, D)."""
        found = self.total[targets] - self.total[sources]
        if self.zeros is None:
            return found
        return found.masked_fill(self.zeros[targets] != self.zeros[sources], -torch.inf)

    def after(self, state: int, end: int) -> Tensor:
        """ln of the entries of P(t←state) for the states t from the next one up to end, (·, D)."""
        found = self.total[state + 1 : end] - self.total[state]
        if self.zeros is None:
            return found
        return found.masked_fill_(self.zeros[state + 1 : end] != self.zeros[state], -torch.inf)

    def until(self, sources: Tensor, state: int) -> Tensor:
        """ln of the entries of P(state←s) for earlier states s in ascending order, (·, D)."""
        first, last = int(sources[0]), int(sources[-1])
        own: Tensor | slice = sources
        if last - first + 1 == len(sources):
            own = slice(first, last + 1)  # a view instead of a copy
        found = self.total[state] - self.total[own]
        if self.zeros is None:
            return found
        return found.masked_fill_(self.zeros[own] != self.zeros[state], -torch.inf)

    def of_group(self, group: int) -> Logs:
        """The entries of one head."""
        width = self.total.shape[1] // self.groups
        columns = slice(group * width, (group + 1) * width)
        return self._of(columns, groups=1)

    def _of(self, columns: slice | Tensor, **changed: int) -> Logs:
        zeros = None if self.zeros is None else self.zeros[:, columns]
        return replace(self, total=self.total[:, columns], zeros=zeros, **changed)

    def largest_only(self) -> Logs:
        """Without entries that at no step are above another of their channel."""
        if self.inner == 1 or self.zeros is not None:
            return self
        shaped = self.total.unflatten(1, (-1, self.inner))
        best = shaped[-1].argmax(-1)
        steps = shaped.diff(dim=0, prepend=torch.zeros_like(shaped[:1]))[1:]
        own = steps.gather(2, best.expand(len(steps), -1).unsqueeze(2))
        kept = (steps > own).any(0)
        kept.scatter_(1, best.unsqueeze(1), True)
        return self._of(kept.flatten().nonzero().flatten(), inner=1)

    def maxima(self, sources: Tensor) -> Tensor:
        """ln ‖P(t←s)‖₂, (n, T): the largest entry; NaN where t < s."""
        return _pairs(self.largest_only(), sources, _largest)

    def sums(
        self, sources: Tensor, weights: Tensor | None = None, dtype: torch.dtype = torch.float64
    ) -> Tensor:
        """ln Σ_i w_t,i e^{2 (C_t,i − C_s,i)}, (n, T), over the D distinct entries; NaN where t < s.

        Without weights w = 1: then ln ‖P‖_F² is that and ln m. Sums are taken in the dtype.
        """
        logs = None if weights is None else weights.log().div_(2)
        return _pairs(self, sources, lambda up, down: _summed(up, down, dtype), logs)


def linear_steps(track: Track, sequences: Sequence[int] | None = None) -> LinearSteps:
    """A_t of some sequences in float64, on the CPU."""
    chosen = torch.arange(track.batch) if sequences is None else torch.as_tensor(sequences)
    found = track.operator(torch.float64, chosen)
    assert isinstance(found, LinearSteps)
    return moved(found, torch.device("cpu"))


@dataclass
class LogsOf:
    """Logs of the sequences of a track; the last one that was asked for is kept."""

    track: Track
    last: tuple[int, Logs] | None = None

    def __call__(self, b: int) -> Logs:
        """Of sequence b, all of its steps."""
        if self.last is None or self.last[0] != b:
            self.last = None  # before another takes its room
            self.last = (b, logs_of(linear_steps(self.track, [b])))
        return self.last[1]


def logs_of(steps: LinearSteps) -> Logs:
    """Of the elementwise recurrence of one sequence."""
    decay = steps.decay[:, 0]  # (T, ·)
    heads = steps.shape[0] if len(steps.shape) == HEAD_AXES else 1
    if len(steps.shape) == HEAD_AXES and decay.shape[1] == 1:
        decay = decay.expand(-1, heads, -1, -1)
    inner = decay.shape[-1] if len(steps.shape) > 1 and heads == 1 else 1
    distinct = decay.flatten(1)
    found = (distinct.abs() if distinct.is_complex() else distinct.abs().clone()).double()
    none = found == 0
    zeros = none.int().cumsum(0, dtype=torch.int32) if bool(none.any()) else None
    if zeros is not None:
        found.masked_fill_(none, 1.0)
    total = found.log_().cumsum_(0)
    return Logs(total, zeros, steps.size // total.shape[1], heads, inner)


# ------------------------------------------------------------------------------- pairs, in blocks


def _pairs(logs: Logs, sources: Tensor, block: Block, weights: Tensor | None = None) -> Tensor:
    """(n, T) from blocks of pairs; `weights` (T, D) are added to the rows of targets."""
    length = len(logs.total)
    found = torch.full((len(sources), length), torch.nan, dtype=torch.float64)
    waiting = [(0, length)]
    while waiting:
        low, high = waiting.pop()
        first, last = torch.searchsorted(sources, torch.tensor([low, high])).tolist()
        if first == last:
            continue
        if high - low <= PAIR_BLOCK:
            for place in range(first, last):
                _row(logs, found[place], int(sources[place]), high, block, weights)
            continue
        middle = (low + high) // 2
        waiting += [(low, middle), (middle, high)]
        end = int(torch.searchsorted(sources, middle))
        if end == first:
            continue
        up, down = logs.after(middle - 1, high), logs.until(sources[first:end], middle - 1)
        if weights is not None:
            up += weights[middle:high]
        found[first:end, middle:high] = block(up, down)
    return found


def _row(
    logs: Logs, row: Tensor, source: int, high: int, block: Block, weights: Tensor | None
) -> None:
    """The pairs of one source and the targets up to high, itself among them."""
    own = torch.zeros(1, logs.total.shape[1], dtype=torch.float64)
    up = torch.cat([own, logs.after(source, high)])
    if weights is not None:
        up += weights[source:high]
    row[source:high] = block(up, own)[0]


def _largest(up: Tensor, down: Tensor) -> Tensor:
    """max_i (down_n,i + up_p,i), (n, p)."""
    if len(down) > 1 and up.shape[1] > 1:
        kept = _above(up, down)
        up, down = up[:, kept], down[:, kept]
    found = torch.full((len(down), len(up)), -torch.inf, dtype=up.dtype)
    up, down = up.T.contiguous(), down.T.contiguous()  # (D, ·)
    for a in range(0, found.shape[0], PAIR_TILE):
        for b in range(0, found.shape[1], PAIR_TILE):
            _tile(up[:, b : b + PAIR_TILE], down[:, a : a + PAIR_TILE],
                  found[a : a + PAIR_TILE, b : b + PAIR_TILE])  # fmt: skip
    return found


def _tile(up: Tensor, down: Tensor, found: Tensor) -> None:
    if found.numel() * len(up) <= PAIR_TILE**2 or found.shape[0] == 1:
        found.copy_((down.unsqueeze(2) + up.unsqueeze(1)).amax(0))
        return
    own, term = torch.full(found.shape, -torch.inf, dtype=found.dtype), torch.empty_like(found)
    for row, column in zip(down, up, strict=True):
        torch.add(row.unsqueeze(1), column, out=term)
        torch.maximum(own, term, out=own)
    found.copy_(own)


def _above(up: Tensor, down: Tensor) -> Tensor:
    """Places of the entries that are not below another one in every pair of a block."""
    size = up.sum(0) + down.sum(0)
    size = size.nan_to_num(neginf=-1e300)
    kept = torch.ones(up.shape[1], dtype=torch.bool)
    few = size.topk(min(PAIR_COLUMNS, len(size))).indices.tolist()
    for best in few:
        above = up[:, best : best + 1], down[:, best : best + 1]
        if not bool(torch.isfinite(above[0]).all() and torch.isfinite(above[1]).all()):
            continue
        kept &= (up - above[0]).amax(0) + (down - above[1]).amax(0) > 0
    kept[few] = True
    return kept.nonzero().flatten()


def _summed(up: Tensor, down: Tensor, dtype: torch.dtype) -> Tensor:
    """ln Σ_i e^{2 (down_n,i + up_p,i)}, (n, p)."""
    high, low = _tops(up).unsqueeze(1), _tops(down).unsqueeze(1)
    product = torch.zeros(len(down), len(up), dtype=dtype)
    for first in range(0, up.shape[1], PAIR_WIDTH):
        columns = slice(first, first + PAIR_WIDTH)
        left = (down[:, columns] - low).to(dtype).mul_(2).exp_()
        right = (up[:, columns] - high).to(dtype).mul_(2).exp_()
        product.addmm_(left, right.T)
    found = product.double().log() + 2 * low + 2 * high.T
    for chunk in (product < TINY).nonzero().split(max(1, 2**22 // up.shape[1])):
        pair = down[chunk[:, 0]] + up[chunk[:, 1]]
        found[chunk[:, 0], chunk[:, 1]] = torch.logsumexp(2 * pair, 1)
    return found


def _tops(rows: Tensor) -> Tensor:
    """The largest entry of every row, 0 where all are −inf."""
    found = rows.amax(1)
    return torch.where(torch.isfinite(found), found, torch.zeros_like(found))
