"""The numbers of a verdict for a linear recurrence, whose state may be far too wide for matrices.

Letters: T steps, B sequences, S the numbers of a state, D its distinct decays, m copies of each,
G heads, d_k keys, d_v columns, M mapped sequences. Elementwise maps go by sums of logarithms, those
with a rank-one part by products on the key axis of each head; the estimators of gains, rates and
verdicts are the same as everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from gradflow.analysis.results import UNMEASURED, Gain, Rate
from gradflow.analyzer.core import (
    Core,
    finite_sequences,
    mapped_core,
    mapped_sequences,
    span_of,
    vote,
)
from gradflow.analyzer.exponents import Growth, Leading, log_growth
from gradflow.analyzer.gains import (
    Norms,
    SpanGains,
    Window,
    collected,
    common_steps,
    crossing,
    dead_by_cuts,
    span_windows,
)
from gradflow.analyzer.keeping import (
    UNKNOWN_RATE,
    Keeping,
    counted_steps,
    cuts_of,
    interval_of_gains,
    interval_of_rates,
    qr_seconds,
    settling_by_halves,
)
from gradflow.analyzer.linear_logs import Logs, LogsOf, linear_steps, logs_of
from gradflow.analyzer.linear_maps import LinearMaps, erasing, head_norms, linear_maps, on_key_axis
from gradflow.analyzer.linear_units import Decays, Heads, LinearFacts, slowest_of_units
from gradflow.analyzer.ranks import (
    Ranks,
    dyadic,
    effective_rank,
    log_singular_along,
    longest_stretch,
    medians,
    starts,
    survivors,
)
from gradflow.analyzer.rates import judge, parted, settled
from gradflow.analyzer.settings import Settings
from gradflow.cells.linear import HEAD_AXES, LinearSteps
from gradflow.limits import (
    CHANNEL_WORK,
    CONSTANT_ALIKE,
    DECAY_AT_FLOOR,
    EXPONENT_BYTES,
    EXPONENTS_MOST,
    GATE_CLOSED,
    RATE_SECONDS,
    VECTOR_SPEED,
    WINDOW_BYTES,
    WINDOW_ROWS,
)
from gradflow.recording.track import Track


def linear_ranks(
    track: Track, logs: LogsOf, mapped: Sequence[int], span: int, settings: Settings
) -> Ranks:
    """Singular values of the mapped sequences: of each distinct decay, or each head's key axis.

    Every one stands as often as the state has it.
    """
    stretches = [longest_stretch(track, b) for b in mapped]
    reach = min(span, max(last - first for first, last in stretches))
    size = int(np.prod(track.state_shape))
    if reach < 1:
        nothing = np.zeros(0)
        return Ranks(np.full((len(mapped), size), np.nan), 0, nothing, nothing, nothing)
    lags = dyadic(reach)
    found, singular = [], []
    first_of = linear_steps(track, [mapped[0]])
    keys = None
    if first_of.left is not None:
        every = linear_steps(track)
        keys = on_key_axis(every)
    for b, (first, last) in zip(mapped, stretches, strict=True):
        most = CHANNEL_WORK / settings.layers / len(mapped)
        for start in starts(first, last):
            end = min(start + reach, last)
            if keys is None:
                values = _elementwise_ranks(logs(b), start, end, lags, size)
            else:
                values = _key_axis_ranks(keys, track.state_shape, b, (start, end), lags, most)
            found.append(values)
            if start == first:
                singular.append(values[-1])
    stacked = np.stack(found)
    return Ranks(
        np.stack(singular),
        reach,
        np.array(lags),
        medians(stacked, effective_rank),
        medians(stacked, survivors),
    )


def _elementwise_ranks(logs: Logs, start: int, end: int, lags: list[int], size: int) -> np.ndarray:
    """(K, S) ln of the entries of P, largest first; NaN past the end."""
    found = np.full((len(lags), size), np.nan)
    for place, lag in enumerate(lags):
        if start + lag <= end:
            row = logs.between(torch.tensor([start]), torch.tensor([start + lag]))[0].numpy()
            found[place] = np.sort(np.repeat(row, logs.copies))[::-1]
    return found


def _key_axis_ranks(
    keys: LinearSteps,
    shape: tuple[int, ...],
    b: int,
    ends: tuple[int, int],
    lags: list[int],
    most_work: float,
) -> np.ndarray:
    """The same of all heads, each as often as there are value columns."""
    heads, _, columns = shape
    steps = range(ends[0] + 1, ends[1] + 1)
    each = []
    for head in range(heads):
        one = keys.of(torch.tensor([b * heads + head]))
        values, _ = log_singular_along(one, steps, lags, most_work=most_work / heads)
        each.append(values)
    joined = np.repeat(np.concatenate(each, axis=1), columns, axis=1)
    # −inf sorts last, and what lies under the rounding of larger ones, NaN, behind it
    return -np.sort(-joined, axis=1)


@dataclass(frozen=True)
class _Kept:
    """What every sequence and every head keeps, and the growth step by step."""

    spectral: Tensor  # (N, G) ln ‖P_g‖₂ of the windows of the span, one behind the other
    growth: Growth  # (T, B, k), the direction that grows most first
    heads: Tensor  # (T, B, G) of each head's own direction that grows most
    keeping: Keeping  # with empty gains, which are made of `spectral`
    decays: Decays
    erased: np.ndarray  # (G,)


def measure_linear(track: Track, settings: Settings, *, withheld: bool) -> Core:
    """How much every sequence keeps over the span and how fast, and the maps of a few.

    Raises:
        RecordingError: its step maps are not known.
    """
    span, finite = span_of(track, settings), finite_sequences(track)
    lengths, cuts = track.lengths.cpu(), cuts_of(track)
    crossed = crossing(len(cuts), lengths, cuts)
    counted = counted_steps(lengths, cuts) & crossed  # A into the first state acts on no state seen
    over = common_steps(crossed, span)
    first = linear_steps(track, [0])
    heads = track.state_shape[0] if len(track.state_shape) == HEAD_AXES else 1
    rank_one = first.left is not None
    each = 16 * WINDOW_ROWS * math.prod(track.state_shape[:2]) * track.batch if rank_one else 1
    windows = span_windows(crossed, over, max(1, WINDOW_BYTES // each))
    logs = LogsOf(track)
    if rank_one:
        kept = _ranked(track, settings, windows, counted, crossed)
    else:
        kept = _elementwise(track, logs, windows, counted, crossed)
    gains = _gains(windows, kept.spectral.amax(1), crossed, over, finite, lengths)
    known = vote(track, span, replace(kept.keeping, gains=gains), kept.growth)
    mapped = mapped_sequences(track, gains, finite, settings)
    mapping = linear_maps(track, logs, mapped, settings, withheld)
    several = None
    if heads > 1:
        usable = bool(finite.all()) and track.steps > 1
        several = _heads(track, mapping, windows, kept, crossed, over, finite, usable)
    facts = LinearFacts(
        shape=track.state_shape,
        decays=kept.decays,
        heads=several,
        time_scale=slowest_of_units(track.state_shape, first.decay.shape[2:], kept.decays),
        rank_one=rank_one,
    )
    judged = min(span, known.gain.steps or span)  # channels over what the verdict judges
    ranks = linear_ranks(track, logs, mapped, judged, settings)
    return mapped_core(known, mapped, mapping.maps, ranks, facts)


def _gains(
    windows: list[Window],
    spectral: Tensor,
    crossed: np.ndarray,
    over: int,
    finite: np.ndarray,
    lengths: Tensor,
) -> SpanGains:
    norms = Norms(spectral, spectral, spectral[:, None], 0.0)
    found = dead_by_cuts(collected(windows, norms, crossed, over), lengths.numpy())
    return replace(found, values=np.where(finite, found.values, np.nan))


def _no_gains(batch: int) -> SpanGains:
    return SpanGains(np.full(batch, math.nan), np.zeros(batch, dtype=int), 0)


def _no_leading(batch: int) -> Leading:
    return Leading(torch.zeros(batch, 1), torch.zeros(batch, dtype=torch.int))


# ------------------------------------------------------------------------------------ elementwise


def _elementwise(
    track: Track, each: LogsOf, windows: list[Window], counted: np.ndarray, crossed: np.ndarray
) -> _Kept:
    """One sequence after the other: sums of logarithms."""
    length, batch, real = len(counted), track.batch, track.lengths.cpu().tolist()
    spectral: list[Tensor] = [torch.empty(0)] * len(windows)
    growth = heads = torch.empty(0)
    census, used, seen = _Census(), torch.from_numpy(counted), torch.from_numpy(crossed)
    for b in range(batch):
        logs = each(b)
        own = [place for place, window in enumerate(windows) if window.sequence == b]
        ends = torch.tensor([[windows[p].first - 1, windows[p].last - 1] for p in own])
        if own:
            kept = logs.between(ends[:, 0], ends[:, 1]).unflatten(1, (logs.groups, -1)).amax(2)
            for place, row in zip(own, kept, strict=True):
                spectral[place] = row
        steps = logs.steps[:length]
        mean = steps[used[:, b]].mean(0).nan_to_num(nan=0.0)  # NaN where no step counts
        if b == 0:
            room = EXPONENT_BYTES // (8 * length * batch)
            shape = length, batch, max(1, min(len(mean), room, EXPONENTS_MOST))
            growth = torch.full(shape, torch.nan, dtype=torch.float64)
            heads = torch.full((length, batch, logs.groups), torch.nan, dtype=torch.float64)
        order = mean.argsort(descending=True, stable=True)[: growth.shape[2]]
        growth[seen[:, b], b] = steps[seen[:, b]][:, order]
        width = len(mean) // logs.groups
        best = mean.unflatten(0, (logs.groups, width)).argmax(1) + width * torch.arange(logs.groups)
        heads[seen[:, b], b] = steps[seen[:, b]][:, best]
        census.add(steps, seen[:, b], real[b], logs)
    decays = census.result()
    constant = None
    if not decays.moves:
        constant = np.sort(np.repeat(decays.mean_log, decays.copies))[::-1].copy()
    found = torch.stack(spectral) if windows else torch.zeros(0, 1, dtype=torch.float64)
    keeping = Keeping(_no_gains(batch), None, math.nan, _no_leading(batch), constant)
    grown = Growth(growth, used)
    return _Kept(found, grown, heads, keeping, decays, np.full(1, math.nan))


class _Census:
    """How the decays of all sequences lie, one sequence after the other."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.low = self.high = torch.empty(0)
        self.count, self.copies, self.near = 0, 1, 0
        self.floor = math.inf

    def add(self, steps: Tensor, crossed: Tensor, length: int, logs: Logs) -> None:
        """ln |a| (T, D) of a sequence; the step into its first state and cuts do not count."""
        own = steps[:length][crossed[:length]]
        if not len(own):
            return
        total, low, high = own.sum(0), own.amin(0), own.amax(0)
        if self.total is None:
            self.total, self.low, self.high = total, low, high
        else:
            self.total = self.total + total
            self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        self.count, self.copies = self.count + len(own), logs.copies
        least = float(low.amin())
        if least < self.floor - DECAY_AT_FLOOR:
            self.near = 0
        if least < self.floor:
            self.floor = least
        self.near += int((own <= self.floor + DECAY_AT_FLOOR).sum())

    def result(self) -> Decays:
        """Of all of them; NaN where no step counts."""
        if self.total is None:
            nothing = np.full(1, math.nan)
            return Decays(nothing, nothing, nothing, self.copies, math.nan, 0.0, True)
        # one entry is often alone at the bottom; a bound is met by several
        bound = int((self.low <= self.floor + DECAY_AT_FLOOR).sum()) > 1
        moves = bool(((self.high - self.low) > CONSTANT_ALIKE).any())
        # −inf − (−inf): an entry that is 0 at every step does not move
        return Decays(
            mean_log=(self.total / self.count).numpy(),
            low=self.low.exp().numpy(),
            high=self.high.exp().numpy(),
            copies=self.copies,
            floor=math.exp(self.floor),
            at_floor=self.near / (self.count * len(self.total)) if bound else 0.0,
            moves=moves,
        )


# ------------------------------------------------------------------------- with a rank-one part


def _ranked(
    track: Track,
    settings: Settings,
    windows: list[Window],
    counted: np.ndarray,
    crossed: np.ndarray,
) -> _Kept:
    """Products on the key axis, heads beside each other."""
    heads, width, _ = track.state_shape
    batch, length = track.batch, len(counted)
    every = linear_steps(track)
    keys = on_key_axis(every)
    parts = parted(counted, 1)
    spectral, frobenius = head_norms(keys, windows + parts, heads)
    own, total = spectral[len(windows) :], frobenius[len(windows) :]
    norms = Norms(own.amax(1), torch.logsumexp(2 * total, 1) / 2, own[:, :1], 0.0)
    found = settled(parts, norms, batch, 1)
    vector = batch * heads * 4.0 * width / VECTOR_SPEED
    allowed = RATE_SECONDS / settings.layers
    fitting = [
        k
        for k in sorted({*(1 << p for p in range(width.bit_length())), width})
        if k <= width and qr_seconds(length, batch * heads, width, k, vector) <= allowed
    ]
    each = log_growth(
        keys,
        track.lengths.cpu().repeat_interleave(heads),
        fitting[-1] if fitting else 1,
        cuts=torch.from_numpy(~crossed).repeat_interleave(heads, dim=1),
        seed=settings.seed,
        progress=lambda share: settings.progress(f"{track.name}: rates", share),
    )
    alone = each.log_growth[:, :, 0].unflatten(1, (batch, heads))
    growth = _merged(each, batch, heads)
    keeping = Keeping(_no_gains(batch), found.rates, found.common, _no_leading(batch), None)
    census, used = _Census(), torch.from_numpy(crossed)
    real, erased = track.lengths.cpu().tolist(), erasing(every)
    bare = replace(every, left=None, right=None)
    for b in range(batch):
        logs = logs_of(bare.of(torch.tensor([b])))
        census.add(logs.steps[:length], used[:, b], real[b], logs)
    shares = (erased[:length] < GATE_CLOSED)[used].double().mean(0).numpy()
    return _Kept(spectral[: len(windows)], growth, alone, keeping, census.result(), shares)


def _merged(each: Growth, batch: int, heads: int) -> Growth:
    """Of all heads of a sequence together, the exponents in descending order, (T, B, G·k)."""
    logs = each.log_growth.unflatten(1, (batch, heads)).flatten(2)  # (T, B, G·k)
    counted = each.counted.unflatten(1, (batch, heads))[:, :, 0]
    order = each.exponents.unflatten(0, (batch, heads)).flatten(1).nan_to_num(nan=0.0)
    places = order.argsort(dim=1, descending=True, stable=True)
    return Growth(logs.gather(2, places.expand(len(logs), -1, -1)), counted)


# ------------------------------------------------------------------------------------ the heads


def _heads(
    track: Track,
    mapping: LinearMaps,
    windows: list[Window],
    kept: _Kept,
    crossed: np.ndarray,
    over: int,
    finite: np.ndarray,
    usable: bool,
) -> Heads:
    """Every head by itself: the same estimators on its own gains and rates."""
    lengths, count = track.lengths.cpu(), kept.spectral.shape[1]
    gains, rates, verdicts = [], [], []
    steps = int(kept.growth.counted.sum(0).max())
    for head in range(count):
        own = _gains(windows, kept.spectral[:, head], crossed, over, finite, lengths)
        growth = Growth(kept.heads[:, :, head : head + 1], kept.growth.counted)
        gain: Gain = interval_of_gains(own, kept.keeping, growth) if usable else UNMEASURED
        values = np.where(finite, growth.exponents[:, 0].numpy(), np.nan)
        common = settling_by_halves(growth, 0, np.flatnonzero(np.isfinite(values)))
        constant = kept.keeping.constant is not None
        rate: Rate = interval_of_rates(values, common, constant, growth)
        gains.append(gain)
        rates.append(rate if usable else UNKNOWN_RATE)
        verdicts.append(judge(gain, int(np.isfinite(own.votes).sum()), steps))
    erased = kept.erased if len(kept.erased) == count else np.full(count, math.nan)
    return Heads(
        tuple(gains), tuple(rates), tuple(verdicts), mapping.lags, mapping.head_gain, erased
    )
