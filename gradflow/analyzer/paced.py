"""A layer's verdict, rate and horizon at the price of a training step: what a probe measures.

The estimators are those of `analyze`, on at most 16 sequences and without a map: the gain over the span by
a block that goes to and fro twice, of a wide layer by one direction in three sweeps; the rate by one
direction; the horizon by the gain over a few lags around it.

Letters: T timesteps, B sequences, S the state's width, k lag.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradflow.analysis.results import Gain, Rate
from gradflow.analyzer.core import Voted, channels, half_life, vote
from gradflow.analyzer.curve import LagCurve
from gradflow.analyzer.exponents import Growth, burn_in, log_growth
from gradflow.analyzer.gains import (
    Norms,
    Window,
    collected,
    common_steps,
    crossing,
    dead_by_cuts,
    log_norms,
    span_windows,
    stretches,
)
from gradflow.analyzer.jacobians import HostOperator, operator_of, state_size
from gradflow.analyzer.keeping import Keeping, counted_steps, cuts_of, leading_of
from gradflow.analyzer.linear_measure import measure_linear
from gradflow.analyzer.measuring import is_linear
from gradflow.analyzer.rates import mean_steps
from gradflow.analyzer.settings import Settings
from gradflow.analyzer.timeline import typical_segment
from gradflow.limits import (
    EXACT_WIDTH,
    LN_GONE,
    LN_HALF,
    PROBE_FEWER,
    PROBE_GUESSES,
    PROBE_REACH,
    PROBE_ROUNDS,
    PROBE_SEQUENCES,
    PROBE_SHARE,
    PROBE_SOURCES,
    PROBE_STEPS,
    PROBE_WIDE,
    RATE_ROUNDING,
    SEED,
    WINDOW_ROWS,
)
from gradflow.recording.pooled import chosen
from gradflow.recording.source import Forward, Operator
from gradflow.recording.track import Track


@dataclass(frozen=True)
class Paced:
    """How far a layer keeps what it is given; see `gradflow.analysis.LayerAnalysis`."""

    name: str  # of the layer
    verdict: str  # one of gradflow.limits.VERDICTS
    gain: Gain  # nats over its steps
    rate: Rate  # nats per step
    settling: float  # nats per step that the rates of all sequences may be off alike
    settled: bool  # whether the rate may be told
    half_life: float  # steps; inf if the gain never halves, NaN if not known
    horizon: int | None  # first lag with gain < 1e-3; None if not reached
    searched: int  # how many lags the horizon was searched over
    span: int  # the distance of interest, in steps
    sequences: int  # that this rests on
    channels: int | None = None  # directions that survive the span, where they were counted
    labels: tuple[str, ...] = ()  # "not finite" where a state is not, "not settled"

    @property
    def never_gone(self) -> bool:
        """Whether the gain stays above 1e-3 for good, as far as a verdict can say."""
        falling = self.verdict == "inconclusive" and not self.gain.value >= 0
        return self.horizon is None and self.verdict != "vanishing" and not falling

    @property
    def pace(self) -> float:
        """Nats per step that the gain over the span comes to."""
        return self.rate.value if math.isnan(self.gain.value) else self.gain.pace


def paced(track: Track, *, span: int | None = None, seed: int = SEED) -> Paced:
    """Measure shortly how far a layer keeps what it is given.

    Args:
        track: one layer in one direction; its gradients are not read.
        span: the distance of interest in steps; by default `usual_span`.
        seed: of the random start.

    Returns:
        The numbers of its verdict.

    Raises:
        RecordingError: its step Jacobians are not known.

    >>> import torch, gradflow
    >>> rnn = torch.nn.RNN(1, 1, bias=False)
    >>> _ = torch.nn.init.constant_(rnn.weight_hh_l0, 0.9)
    >>> with gradflow.record(rnn) as recording:
    ...     rnn(torch.zeros(100, 2, 1))[0][-1].sum().backward()
    >>> found = paced(recording["l0"])
    >>> found.verdict, round(found.rate.value, 4), round(found.half_life, 3), found.horizon
    ('vanishing', -0.1054, 6.579, 66)
    """
    span = span or usual_span(track, track.lengths)
    some = spread(track)
    operator = operator_of(some, _dtype(some))
    lengths, cuts = some.lengths.cpu(), cuts_of(some)
    crossed = crossing(len(cuts), lengths, cuts)
    over = common_steps(crossed, span)
    windows = span_windows(crossed, over, PROBE_SOURCES)
    once = operator.size > PROBE_WIDE and _is_whole(windows, lengths, cuts)
    if once:
        norms, growth = there_and_back(operator, lengths, seed)
        leading = leading_of(windows, norms, some.batch, 0)
    else:
        rows = WINDOW_ROWS if operator.size <= PROBE_WIDE else 1
        norms = log_norms(operator, windows, rows=rows, rounds=PROBE_ROUNDS)
        leading = leading_of(windows, norms, some.batch, 0)
        growth = log_growth(operator, lengths, 1, cuts=cuts, seed=seed, leading=leading)
    gains = dead_by_cuts(collected(windows, norms, crossed, over), lengths.numpy())
    seen = mean_steps(operator, _few(counted_steps(lengths, cuts)), probes=1)
    kept = Keeping(gains, None, math.nan, leading, None, norms.missing, seen)
    found = vote(some, span, kept, growth)
    usable = bool(found.finite.all()) and some.steps > 1
    curve = _curve(operator, crossed, over, found.gain) if usable and over else _nothing()
    half = _half_life(curve, found.rate, found.settled)
    return _paced(track, some, found, curve, half)


def paced_linear(track: Track, *, span: int | None = None, seed: int = SEED) -> Paced:
    """The same of a linear recurrence, whose state may be wide: as `analyze`, on a share of its budgets."""
    span = span or usual_span(track, track.lengths)
    some = spread(track)
    settings = Settings(span, None, 1, "auto", None, seed, PROBE_SHARE, lambda phase, done: None)
    found = measure_linear(some, settings, withheld=True)
    passed = channels(some, found.ranks.singular)
    return _paced(track, some, found, found.curve, half_life(found, ()), passed)


def usual_span(track: Track, lengths: Tensor) -> int:
    """The span where none is given, as of `analyze`: of the stretches between cuts, else the median length.

    Args:
        track: of some sequences.
        lengths: (B,) in steps, of all.
    """
    return typical_segment(track) or max(1, round(float(lengths.cpu().double().quantile(0.5))))


def _paced(
    track: Track,
    some: Track,
    found: Voted,
    curve: LagCurve,
    halved: float,
    passed: int | None = None,
) -> Paced:
    labels: tuple[str, ...] = ()
    if not found.finite.all():
        labels = ("not finite",)
    elif math.isfinite(found.rate.value) and not found.settled:
        labels = ("not settled",)
    return Paced(
        name=track.name,
        verdict=found.verdict.name,
        gain=found.gain,
        rate=found.rate,
        settling=found.settling,
        settled=found.settled,
        half_life=halved,
        horizon=curve.horizon,
        searched=curve.searched,
        span=found.span,
        sequences=some.batch,
        channels=passed,
        labels=labels,
    )


def _few(counted: np.ndarray) -> np.ndarray:
    """(T, B): at most PROBE_STEPS of the steps that count, evenly spread."""
    rows = np.flatnonzero(counted.any(1))
    kept = np.linspace(0, len(rows) - 1, min(PROBE_STEPS, len(rows))).round().astype(int)
    few = np.zeros_like(counted)
    few[rows[kept]] = counted[rows[kept]]
    return few


def spread(track: Track) -> Track:
    """At most 16 of its sequences, evenly spread; fewer of a wide layer."""
    places = spread_places(track.batch, state_size(track))
    return track if len(places) == track.batch else chosen(track, places)


def spread_places(batch: int, width: int) -> list[int]:
    """Which of so many sequences a verdict rests on.

    >>> spread_places(3, 8), spread_places(32, 8)[:4]
    ([0, 1, 2], [0, 2, 4, 6])
    """
    most = PROBE_SEQUENCES if width <= PROBE_WIDE else PROBE_FEWER
    if batch <= most:
        return list(range(batch))
    return np.unique(np.linspace(0, batch - 1, most).round().astype(int)).tolist()


def sent(track: Track, sequences: Sequence[int]) -> list[Track]:
    """Some sequences of a layer as what `paced` reads of them, for another process.

    One track of all of them, or one of each where a verdict asks for single ones; a RecordingError
    where its step Jacobians are not known.
    """
    if not sequences:
        return []
    linear = is_linear(track)
    dtype = torch.float64 if linear else _dtype(track)
    groups = [[one] for one in sequences] if linear else [list(sequences)]
    return [_frozen(chosen(track, some), dtype) for some in groups]


def _frozen(some: Track, dtype: torch.dtype) -> Track:
    known = some.source.forward()
    source = SentSource(
        replace(known, gates={}, inputs=None),
        some.operator(dtype, torch.arange(some.batch)),
        some.source.alone() is not None,
    )
    given: Any = source  # which has no more than `paced` asks for
    return replace(some, source=given, weights={}, notes=[], padding=None, _cache={})


@dataclass(frozen=True, eq=False)
class SentSource:
    """What a verdict reads of a few sequences, without the recording that it comes from."""

    states: Forward
    steps: Operator  # of all of them
    closed: bool  # whether the layer is part of a closed loop
    version: int = 0

    def forward(self) -> Forward:
        """States and initial states."""
        return self.states

    def operator(self, dtype: torch.dtype, sequences: Tensor) -> Operator:
        """The step Jacobians of all its sequences, which are asked for together."""
        assert torch.equal(sequences.cpu(), torch.arange(self.steps.batch))
        return self.steps

    def alone(self) -> SentSource | None:
        """Something where the layer is part of a closed loop."""
        return self if self.closed else None


def _dtype(track: Track) -> torch.dtype:
    return torch.float64 if state_size(track) <= EXACT_WIDTH else torch.float32


# -------------------------------------------------------------------------------- one direction


def _is_whole(windows: list[Window], lengths: Tensor, cuts: Tensor) -> bool:
    """Whether each sequence is one window, from its first state to its last."""
    return (
        len(windows) == len(lengths)
        and not bool(cuts[1:].any())
        and all(one.first == 1 and one.last == int(lengths[one.sequence]) for one in windows)
    )


def there_and_back(operator: HostOperator, lengths: Tensor, seed: int) -> tuple[Norms, Growth]:
    """ln ‖P‖₂ of whole sequences, and the growth step by step, by one direction in three sweeps.

    A random row is pulled back to the first state, which turns it to what P keeps most; pushed forward
    it grows step by step; what arrives is pulled back again, and ‖Pᵀu‖ is the estimate: a lower bound,
    one and a half turns of the power iteration. The growth (T, B, 1) is NaN at the step into the first
    state; lengths (B,) are real steps.

    >>> from gradflow.analyzer.jacobians import DenseOperator
    >>> halving = DenseOperator(torch.full((5, 1, 2, 2), 0.25, dtype=torch.float64))
    >>> norms, growth = there_and_back(halving, torch.tensor([5]), 0)       # eigenvalues 0.5 and 0
    >>> round(norms.spectral.exp().item(), 9), growth.exponents.exp().round(decimals=9).item()
    (0.0625, 0.5)
    """
    steps, batch, size = operator.length, operator.batch, operator.size
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(1, size, generator=generator, dtype=torch.float64)
    begun = (first / first.norm()).to(operator.dtype).expand(batch, 1, -1).clone()
    backward, forward = range(steps - 1, 0, -1), range(1, steps)
    right, _ = _carried(operator.pull, begun, backward, lengths)
    arrived, logs = _carried(operator.push, right, forward, lengths)
    back, again = _carried(operator.pull, arrived, backward, lengths)
    once, twice = logs.nansum(0), again.nansum(0)
    missing = torch.where(torch.isfinite(twice - once), twice - once, 0.0).amax()
    leading = torch.where(torch.isneginf(twice)[:, None], right[:, 0], back[:, 0]).double()
    when = torch.arange(steps)[:, None]
    skipped = torch.tensor([burn_in(int(length)) for length in lengths]).clamp_min(1)
    growth = Growth(logs[..., None], (when < lengths) & (when >= skipped))
    return Norms(twice, twice, leading, float(missing)), growth


def _carried(
    step: Callable[[int, Tensor], Tensor], rows: Tensor, steps: range, lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """Rows (B, 1, S) sent through the steps, of length 1 again after each, and ln of that (T, B)."""
    live = torch.arange(max(steps, default=0) + 1)[:, None] < lengths
    whole, norms = live.all(1).tolist(), torch.full(live.shape, math.nan, dtype=rows.dtype)
    for t in steps:
        moved = step(t, rows)
        torch.linalg.vector_norm(moved[:, 0], dim=-1, out=norms[t])
        scaled = moved / torch.where(norms[t] > 0, norms[t], 1.0)[:, None, None]
        rows = scaled if whole[t] else torch.where(live[t, :, None, None], scaled, rows)
    logs = torch.where(live, norms.double().log(), math.nan)
    return rows, logs


# ------------------------------------------------------------------------------------ the lag curve


def _curve(operator: HostOperator, crossed: np.ndarray, over: int, gain: Gain) -> LagCurve:
    """The lag curve at the gain's own steps, and at a few lags around where it is a half, and 10⁻³."""
    known = {0: 0.0, over: gain.value}
    rows = WINDOW_ROWS if operator.size <= PROBE_WIDE else 1
    for _ in range(PROBE_GUESSES):
        guesses = [_guess(known, level) for level in (LN_HALF, LN_GONE)]
        wanted = {
            min(over, max(1, round(share * guess)))
            for guess in guesses
            if guess is not None
            for share in PROBE_REACH
        }
        lags = sorted(wanted - set(known))
        if not lags:
            break
        known |= dict(zip(lags, _gains_at(operator, crossed, lags, rows), strict=True))
    steps = max(known) + 1
    median, count = np.full(steps, np.nan), np.zeros(steps, dtype=int)
    for lag, value in known.items():
        median[lag], count[lag] = value, 1
    return LagCurve(median, median, median, count, np.isneginf(median).astype(float))


def _guess(known: dict[int, float], level: float) -> float | None:
    """Where the curve is to be looked at for a level; None where it is known well enough."""
    lags = sorted(lag for lag in known if not math.isnan(known[lag]))
    below = [lag for lag in lags if lag and known[lag] < level]
    if not below:
        return None
    after = below[0]
    before = max(lag for lag in lags if lag < after)
    if after - before <= 1 or (before and after / before <= max(PROBE_REACH)):
        return None
    low, high = known[before], known[after]
    if not math.isfinite(high):
        return (before + after) / 2
    return before + (after - before) * (low - level) / (low - high)


def _gains_at(
    operator: HostOperator, crossed: np.ndarray, lags: list[int], rows: int
) -> list[float]:
    """The median over sequences and windows of ln ‖P‖₂ over each of these lags."""
    windows: list[Window] = []
    several = operator.size > EXACT_WIDTH and operator.batch >= PROBE_FEWER
    for part, lag in enumerate(lags):
        if several or operator.size > PROBE_WIDE:  # the last ones: few steps are gone through
            ends = {b: last for b, first, last in stretches(crossed) if last - first >= lag}
            own = [Window(b, last - lag, last) for b, last in ends.items()]
        else:
            own = span_windows(crossed, lag, PROBE_SOURCES)
        windows += [replace(one, part=part) for one in own if one.steps == lag]
    norms = log_norms(operator, windows, rows=rows, rounds=PROBE_ROUNDS)
    parts = torch.tensor([window.part for window in windows])
    return [_median(norms.spectral[parts == part]) for part in range(len(lags))]


def _median(values: Tensor) -> float:
    if not len(values) or bool(values.isnan().any()):
        return math.nan
    return float(values.sort().values[[(len(values) - 1) // 2, len(values) // 2]].mean())


def _nothing() -> LagCurve:
    values = np.array([0.0])
    return LagCurve(values, values, values, np.zeros(1, dtype=int), values)


def _half_life(curve: LagCurve, rate: Rate, settled: bool) -> float:
    """ln 2/|rate| of an exponential decay, else where the lag curve has fallen by half; see `core`."""
    either = rate.low < -RATE_ROUNDING and rate.high > RATE_ROUNDING
    if not math.isfinite(rate.value) or either or not settled:
        found = curve.half_life
        return found if math.isfinite(found) and curve.searched else math.nan
    if rate.value < -RATE_ROUNDING and curve.falls_with(rate.value):
        return math.log(2) / -rate.value
    return curve.half_life
