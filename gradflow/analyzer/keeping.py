"""What a layer keeps over the span and at which rate, from one set of products of its Jacobians.

Letters: T timesteps, B sequences, S the state's width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from gradflow.analysis.results import Gain, Rate
from gradflow.analyzer.exponents import Growth, Leading, burn_in
from gradflow.analyzer.gains import (
    Norms,
    SpanGains,
    Window,
    collected,
    common_steps,
    crossing,
    dead_by_cuts,
    log_norms,
    span_windows,
)
from gradflow.analyzer.jacobians import (
    HostOperator,
    constant_exponents,
    operator_of,
    state_size,
    vector_seconds,
)
from gradflow.analyzer.rates import (
    PARTS,
    Settled,
    beyond_noise,
    mean_steps,
    parted,
    quantile,
    rate_of_one,
    rate_over_sequences,
    settled,
    unrest,
)
from gradflow.analyzer.settings import Settings
from gradflow.analyzer.timeline import cuts_before
from gradflow.limits import (
    EXACT_WIDTH,
    GAIN_SECONDS,
    LEAST_ROUNDS,
    PIECES,
    RATE_ROUNDING,
    ROUND_TELLS,
    STEP_CALL_SECONDS,
    THIN_BUDGETS,
    THIN_ROUNDS,
    UNSETTLED,
    USUAL_ROUNDS,
    VECTOR_SPEED,
    WINDOW_BYTES,
    WINDOW_ROUNDS,
    WINDOW_ROWS,
)
from gradflow.recording.track import Track

UNKNOWN_RATE = Rate(math.nan, math.nan, math.nan)


@dataclass(frozen=True)
class Keeping:
    """Gains and rates of every sequence, and the direction that keeps most."""

    gains: SpanGains
    rates: np.ndarray | None  # (B,) by products over parts; NaN where that could not be afforded
    common: float  # nats per step that these may all be off alike
    leading: Leading  # of each sequence's first window
    constant: np.ndarray | None  # (S,) exponents, where the step Jacobian never changes
    missing: float = 0.0  # nats that one more round could add to a gain
    seen: np.ndarray | None = None  # (2, B, m S) of `mean_steps`

    def rates_with(self, growth: Growth) -> np.ndarray:
        """(B,): the growth per step of the direction that keeps most, past the burn-in."""
        grown = growth.exponents[:, 0].numpy().copy()
        if self.constant is not None:
            return np.where(np.isfinite(grown), self.constant[0], grown)
        return grown

    def unsettled(self, growth: Growth, alive: np.ndarray) -> float:
        """What the rates of some sequences may all be off alike, nats per step.

        By the products over parts, by what these differ from the growth of one direction, and by
        whether the steps still move.
        """
        if self.constant is not None:
            return 0.0
        if self.rates is None:
            common = settling_by_halves(growth, 0, alive)
        else:
            off = (self.rates - growth.exponents[:, 0].numpy())[alive]
            off = off[np.isfinite(off)]
            common = self.common + (abs(float(off.mean())) if len(off) else 0.0)
        if self.seen is None or not len(alive):
            return common
        rate = float(self.rates_with(growth)[alive].mean())
        steps = float(growth.counted[:, alive].sum(0).double().mean())
        return common + unrest(self.seen[:, alive], rate, steps)


def keeping(track: Track, settings: Settings, span: int) -> Keeping:
    """Measure both together: all windows go through the steps at once."""
    lengths, cuts = track.lengths.cpu(), cuts_of(track)
    operator = operator_for(track, settings)
    crossed = crossing(len(cuts), lengths, cuts)
    counted = counted_steps(lengths, cuts)
    plan = _planned(_cost(track, operator), operator.size, settings)
    most = max(1, WINDOW_BYTES // (16 * plan.rows * operator.size * operator.batch))
    over = common_steps(crossed, span)
    windows = span_windows(crossed, over, most)
    together = windows + (parted(counted, 1) if plan.rated == track.batch else [])
    norms = log_norms(operator, together, rows=plan.rows, rounds=plan.rounds)
    gains = dead_by_cuts(collected(windows, norms, crossed, over), lengths.numpy())
    leading = leading_of(together, norms, track.batch, 1 if plan.rated == track.batch else 0)
    exponents = None if operator.thin else constant_exponents(operator, counted & crossed)
    if exponents is not None and math.isfinite(exponents[0]):
        counts = counted.any(0)
        rates = np.where(counts, exponents[0], np.nan)
        return Keeping(gains, rates, 0.0, leading, exponents, norms.missing)
    if plan.rated == track.batch:
        found = settled(together[len(windows) :], norms.after(len(windows)), track.batch, 1)
    elif plan.rated:
        found = _of_some(track, settings, counted, plan)
    else:
        return Keeping(gains, None, math.nan, leading, None, norms.missing)
    seen = mean_steps(operator, counted)
    return Keeping(gains, found.rates, found.common, leading, None, norms.missing, seen)


def leading_of(windows: list[Window], norms: Norms, batch: int, part: int) -> Leading:
    """What keeps most of each sequence's first window of a part."""
    rows = torch.zeros(batch, norms.leading.shape[1], dtype=torch.float64)
    at = torch.zeros(batch, dtype=torch.int)
    for place in reversed([n for n, window in enumerate(windows) if window.part == part]):
        window = windows[place]
        rows[window.sequence], at[window.sequence] = norms.leading[place], window.first
    return Leading(rows.nan_to_num(0.0), at)


def _of_some(track: Track, settings: Settings, counted: np.ndarray, plan: _Plan) -> Settled:
    """Rates of as many sequences as can be afforded, evenly spread, NaN for the others."""
    spread = np.linspace(0, track.batch - 1, plan.rated).round().astype(int)
    chosen = np.unique(spread)
    operator = operator_for(track, settings, chosen.tolist())
    windows = parted(counted[: operator.length, chosen], 0)
    norms = log_norms(operator, windows, rows=plan.rows, rounds=plan.rounds)
    found = settled(windows, norms, len(chosen), 0)
    rates = np.full(track.batch, math.nan)
    rates[chosen] = found.rates
    return replace(found, rates=rates)


def cuts_of(track: Track) -> Tensor:
    """(T, B) in processing order, also before a first state that came from where nothing was seen."""
    steps = int(track.lengths.max())
    first = torch.zeros(1, track.batch, dtype=torch.int)
    cuts = cuts_before(track).diff(dim=0, prepend=first)[:steps] > 0
    cuts[0] |= not track.first_step_seen
    return cuts


def counted_steps(lengths: Tensor, cuts: Tensor) -> np.ndarray:
    """(T, B): the steps of a rate, past the burn-in and no cut."""
    when = torch.arange(len(cuts))[:, None]
    skipped = torch.tensor([burn_in(int(length)) for length in lengths])
    return ((when < lengths) & (when >= skipped) & (lengths > 1) & ~cuts).numpy()


# -------------------------------------------------------------------------------------- intervals


def interval_of_gains(gains: SpanGains, kept: Keeping, growth: Growth) -> Gain:
    """Mean gain over the span with its t-interval over sequences; of one, by its batch means."""
    found = rate_over_sequences(gains.votes)
    finite = np.flatnonzero(np.isfinite(gains.votes))
    if math.isnan(found.low) and len(finite) == 1 and math.isfinite(found.value):
        half = (
            0.0 if kept.constant is not None else gains.over * _half_of_one(growth, int(finite[0]))
        )
        found = Rate(found.value, found.value - half, found.value + half)
    more = kept.missing if kept.missing > ROUND_TELLS else 0.0
    return Gain(found.value, found.low, found.high + more, gains.over)


def interval_of_rates(rates: np.ndarray, common: float, constant: bool, growth: Growth) -> Rate:
    """Mean rate with its interval over sequences, widened by what has not settled."""
    found = rate_over_sequences(rates)
    finite = np.flatnonzero(np.isfinite(rates))
    if not math.isfinite(found.value) or constant:
        return Rate(found.value, found.value, found.value)
    if len(finite) == 1:
        half = _half_of_one(growth, int(finite[0]))
    elif float(np.ptp(rates[finite])) <= RATE_ROUNDING:  # the same sequence again and again
        half = _half_of_one(growth, int(finite[0]), pieces=PIECES)
    else:
        half = (found.high - found.low) / 2
    half = math.hypot(half, common)
    return Rate(found.value, found.value - half, found.value + half)


def _half_of_one(growth: Growth, b: int, pieces: int = 0) -> float:
    """Half the interval of one sequence's rate; NaN where it is too short to know its own spread."""
    steps = growth.log_growth[growth.counted[:, b], b, 0].numpy()
    found = rate_of_one(steps)
    half = (found.high - found.low) / 2
    if not math.isnan(half) or not pieces or len(steps) < 2 * pieces:
        return half
    length = len(steps) // pieces
    means = steps[len(steps) - length * pieces :].reshape(pieces, length).mean(1)
    return quantile(pieces - 1) * float(means.std(ddof=1)) / math.sqrt(pieces)


def settling_by_halves(growth: Growth, j: int, sequences: np.ndarray) -> float:
    """By how much an exponent of the later half of the steps differs from that of the earlier.

    Beyond the noise of that difference over sequences; NaN where there are not two steps.
    """
    off = []
    for b in sequences:
        steps = growth.log_growth[growth.counted[:, b], b, j].numpy()
        if len(steps) > 1 and np.isfinite(steps).all():
            off.append(steps[len(steps) // 2 :].mean() - steps[: len(steps) // 2].mean())
    return UNSETTLED * beyond_noise(np.array(off)) if off else math.nan


# ----------------------------------------------------------------------------------------- budget


@dataclass(frozen=True)
class _Plan:
    """How much of it can be afforded."""

    rows: int
    rounds: int
    rated: int  # sequences whose rate is measured by parts


@dataclass(frozen=True)
class _Cost:
    """What sweeps over all steps take."""

    length: int
    batch: int
    vector: float  # seconds of one vector of every sequence through one step
    thin: bool  # whether that is what one sequence takes, too

    def sweep(self, rows: int, batch: int | None = None) -> float:
        """Predicted seconds of one sweep of blocks of so many rows."""
        share = 1.0 if batch is None or self.thin else batch / self.batch
        return self.length * (rows * share * self.vector + STEP_CALL_SECONDS)


def operator_for(
    track: Track, settings: Settings, sequences: list[int] | None = None
) -> HostOperator:
    """The operator of some sequences, all by default; float32 where one direction is dear already."""
    operator = operator_of(track, torch.float64, sequences)
    whole = operator if sequences is None else operator_of(track)
    wide = _cost(track, whole).sweep(1) > 2 * GAIN_SECONDS / settings.layers
    return operator_of(track, torch.float32, sequences) if wide and not operator.thin else operator


def _cost(track: Track, operator: HostOperator) -> _Cost:
    vector = vector_seconds(operator)
    return _Cost(int(track.lengths.max()), track.batch, vector, operator.thin)


def qr_seconds(length: int, batch: int, size: int, k: int, vector: float) -> float:
    """Predicted seconds: the pushes, and for more than one direction a small QR per sequence.

    vector is what one vector of every sequence takes at one step, see `vector_seconds`.
    """
    factoring = (8.0 * size * k * k + 3e5) if k > 1 else 4.0 * size
    return length * (k * vector + batch * factoring / VECTOR_SPEED + STEP_CALL_SECONDS)


def _planned(cost: _Cost, size: int, settings: Settings) -> _Plan:
    """Whole where it fits; else fewer rows, rounds, and sequences whose rate is measured by parts."""
    allowed, parts = GAIN_SECONDS / settings.layers, len(PARTS)
    least = LEAST_ROUNDS
    if cost.thin:
        allowed, least = THIN_BUDGETS * allowed, THIN_ROUNDS
    if size <= EXACT_WIDTH:
        return _Plan(size, 1, cost.batch)
    usual = 2 * USUAL_ROUNDS
    if usual * cost.sweep((1 + parts) * WINDOW_ROWS) <= allowed:
        return _Plan(WINDOW_ROWS, WINDOW_ROUNDS, cost.batch)
    fitting = [rows for rows in (WINDOW_ROWS, 2) if usual * cost.sweep(rows) <= allowed]
    rows = fitting[0] if fitting else 1
    rounds = int(allowed / (2 * cost.sweep(rows)))
    if cost.thin:
        whole = usual * cost.sweep(parts * rows) <= allowed
        return _Plan(rows, min(WINDOW_ROUNDS, max(least, rounds)), cost.batch if whole else 0)
    each = usual * (cost.sweep(parts * rows, 1) - cost.sweep(0))
    rated = int((allowed - usual * cost.sweep(0)) / each)
    return _Plan(rows, min(WINDOW_ROUNDS, max(least, rounds)), min(cost.batch, max(0, rated)))


def keeping_seconds(track: Track, layers: int) -> float:
    """Predicted seconds of `keeping` where so many measurements share its budget."""
    size, parts = state_size(track), 1 + len(PARTS)
    cost = _cost(track, operator_of(track))
    if size <= EXACT_WIDTH:
        return cost.sweep(parts * size)
    whole = 2 * USUAL_ROUNDS * cost.sweep(parts * WINDOW_ROWS)
    return max(2 * LEAST_ROUNDS * cost.sweep(1), min(whole, 2 * GAIN_SECONDS / layers))
