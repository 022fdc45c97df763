"""What a verdict rests on: growth, rate, maps, lag curve and ranks of one layer.

Letters: T timesteps, B sequences, S the state's width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from gradflow.analysis.results import UNMEASURED, Gain, Rate
from gradflow.analyzer import plan
from gradflow.analyzer.curve import LagCurve, lag_curve
from gradflow.analyzer.exponents import Growth, Leading, WeightGrowth, log_growth
from gradflow.analyzer.gains import SpanGains
from gradflow.analyzer.jacobians import operator_of, state_size, vector_seconds
from gradflow.analyzer.keeping import (
    UNKNOWN_RATE,
    Keeping,
    cuts_of,
    interval_of_gains,
    interval_of_rates,
    keeping,
    operator_for,
    qr_seconds,
)
from gradflow.analyzer.linear_units import LinearFacts
from gradflow.analyzer.products import NORMS
from gradflow.analyzer.ranks import Ranks, measure_ranks, survivors
from gradflow.analyzer.rates import Verdict, Vote, enough, judge, over_batches
from gradflow.analyzer.settings import Settings
from gradflow.analyzer.thin import thin_maps
from gradflow.analyzer.timeline import cuts_before, typical_length, typical_segment
from gradflow.limits import CHANNEL_WORK, EXACT_ROWS, MAP_SECONDS, RATE_ROUNDING, RATE_SECONDS
from gradflow.recording.track import Track


@dataclass(frozen=True, kw_only=True)
class Voted:
    """The numbers of a verdict that all sequences have a vote in; none of them needs a gradient."""

    span: int
    finite: np.ndarray  # (B,) whether every state is
    growth: Growth
    sequence_gains: SpanGains
    gain: Gain  # over the span: what the verdict judges
    sequence_rates: np.ndarray  # (B,)
    rate: Rate
    settling: float  # nats per step that all sequences' rates may be off alike
    settled: bool  # whether the rate may be told
    constant: np.ndarray | None  # (S,) exponents, where the step Jacobian never changes
    verdict: Verdict


@dataclass(frozen=True, kw_only=True)
class Core(Voted):
    """The same, and the maps of a few sequences."""

    mapped: tuple[int, ...]
    maps: plan.Maps
    curve: LagCurve
    ranks: Ranks
    no_gains: str = ""  # why no gains could be measured, "" where they were
    linear: LinearFacts | None = None  # of a linear recurrence
    batches: tuple[Vote, ...] = ()  # of all batches, which gain, rate and verdict are over

    @property
    def log_curves(self) -> np.ndarray:
        """(B, T): ln growth along the leading direction from s_0 on."""
        return self.growth.log_growth[1:, :, 0].cumsum(0).T.numpy()


def vote(track: Track, span: int, kept: Keeping, growth: Growth) -> Voted:
    """Gain, rate and verdict of what every sequence keeps over the span, and how fast it grows."""
    finite = finite_sequences(track)
    short = (track.lengths.cpu() == 1).numpy()  # one step has no recurrence
    gains = replace(kept.gains, values=np.where(finite, kept.gains.values, np.nan))
    rates = np.where(finite & ~short, kept.rates_with(growth), np.nan)
    common = kept.unsettled(growth, np.flatnonzero(np.isfinite(rates)))
    usable = bool(finite.all()) and track.steps > 1
    paced = usable and gains.over > 0  # one step from a first state has no pace
    constant = kept.constant is not None
    rate = interval_of_rates(rates, common, constant, growth) if paced else UNKNOWN_RATE
    gain = interval_of_gains(gains, kept, growth) if usable else UNMEASURED
    measurable = int(np.isfinite(gains.votes).sum())
    return Voted(
        span=span,
        finite=finite,
        growth=growth,
        sequence_gains=gains,
        gain=gain,
        sequence_rates=rates,
        rate=rate,
        settling=common,
        settled=enough(common, rate.value, span),
        constant=kept.constant,
        verdict=judge(gain, measurable, int(growth.counted.sum(0).max())),
    )


def voted(track: Track, settings: Settings, watch: WeightGrowth | None = None) -> Voted:
    """How much every sequence keeps over the span and how fast."""
    span = span_of(track, settings)
    kept = keeping(track, settings, span)
    return vote(track, span, kept, growth_of(track, settings, watch, kept.leading))


def measure(
    track: Track, settings: Settings, *, withheld: bool, watch: WeightGrowth | None = None
) -> Core:
    """How much every sequence keeps over the span and how fast, and the maps of a few."""
    known = voted(track, settings, watch)
    mapped = mapped_sequences(track, known.sequence_gains, known.finite, settings)
    over = min(known.span, known.gain.steps or known.span)  # channels over what the verdict judges
    return mapped_core(known, mapped, *_maps(track, mapped, over, withheld, settings))


def mapped_core(
    known: Voted,
    mapped: tuple[int, ...],
    maps: plan.Maps,
    ranks: Ranks,
    linear: LinearFacts | None = None,
) -> Core:
    """The numbers of a verdict with the maps of a few sequences."""
    curve = lag_curve(maps.log_gain["spectral"], maps.sources)
    return Core(**vars(known), mapped=mapped, maps=maps, curve=curve, ranks=ranks, linear=linear)


def pooled_over(core: Core, batches: Sequence[Vote]) -> Core:
    """The same with gain, rate and verdict over several batches, of which this one is one."""
    if len(batches) < 2:
        return core
    return replace(core, **vars(over_batches(batches, core.span)), batches=tuple(batches))


def span_of(track: Track, settings: Settings) -> int:
    """The distance of interest in steps: as asked for, or the typical stretch between cuts, or length."""
    return settings.span or typical_segment(track) or typical_length(track)


def finite_sequences(track: Track) -> np.ndarray:
    """(B,) whether every real state of a sequence, its initial one included, is finite."""
    finite = torch.ones(track.batch, dtype=torch.bool)
    real = track.mask.cpu()
    for values in track.seen_states.values():
        finite &= (torch.isfinite(values.cpu()).all(-1) | ~real).all(0)
    for values in track.initial.values():
        finite &= torch.isfinite(values.cpu()).all(-1)
    return finite.numpy()


def growth_of(
    track: Track, settings: Settings, watch: WeightGrowth | None, leading: Leading
) -> Growth:
    """The QR iteration over all sequences, with as many exponents as are wanted and can be afforded.

    It starts from the direction that keeps most.
    """
    length, batch, size = int(track.lengths.max()), track.batch, state_size(track)
    allowed = RATE_SECONDS / settings.layers
    wanted = [k for k in (1, 2, 4, 8, 16, 32, 64, 128) if k < size] + [size]
    operator = operator_for(track, settings)
    vector = vector_seconds(operator)
    if settings.brief:  # a verdict rests on the largest
        wanted = [1]
    fitting = [k for k in wanted if qr_seconds(length, batch, size, k, vector) <= allowed]
    return log_growth(
        operator,
        track.lengths,
        fitting[-1] if fitting else 1,
        cuts=cuts_of(track),
        seed=settings.seed,
        leading=leading,
        progress=lambda share: settings.progress(f"{track.name}: rates", share),
        watch=watch,
    )


def mapped_sequences(
    track: Track, found: SpanGains, finite: np.ndarray, settings: Settings
) -> tuple[int, ...]:
    """Which sequences are mapped: those nearest to the median gain of all, nearest first.

    Those that are too short for a vote come last.
    """
    candidates, gains = settings.sequences or tuple(range(track.batch)), found.votes
    known = [b for b in candidates if not math.isnan(gains[b])]
    if not known:
        usable = [b for b in candidates if finite[b]] or list(candidates)
        return tuple(sorted(usable, key=lambda b: -int(track.lengths[b]))[: settings.maps])
    # the lower median, so that it is some sequence's own
    middle = np.sort(gains[~np.isnan(gains)])[(int((~np.isnan(gains)).sum()) - 1) // 2]
    distance = [0.0 if gains[b] == middle else abs(float(gains[b] - middle)) for b in known]
    order = sorted(range(len(known)), key=lambda place: (distance[place], known[place]))
    short = [b for b in candidates if b not in known and not math.isnan(found.values[b])]
    return tuple([*(known[place] for place in order), *short][: settings.maps])


def _maps(
    track: Track, mapped: Sequence[int], span: int, withheld: bool, settings: Settings
) -> tuple[plan.Maps, Ranks]:
    if state_size(track) > EXACT_ROWS and operator_of(track, sequences=mapped).thin:
        return thin_maps(
            track,
            mapped,
            span,
            seconds=MAP_SECONDS / settings.layers,
            withheld=withheld,
            progress=lambda share: settings.progress(f"{track.name}: gains", share),
        )
    maps = plan.make_maps(
        track,
        mapped,
        method=settings.method,
        stride=settings.stride,
        seed=settings.seed,
        seconds=MAP_SECONDS / settings.layers,
        withheld=withheld,
        progress=lambda share: settings.progress(f"{track.name}: gains", share),
        norms=("spectral",) if settings.brief else tuple(NORMS),
        executor=settings.executor,
    )
    segments = cuts_before(track)[:, list(mapped)].T.numpy()  # (M, T)
    crossing = segments[:, maps.sources, None] != segments[:, None, :]
    for values in maps.planes:
        values[crossing] = np.nan
    work = CHANNEL_WORK / settings.layers
    return maps, measure_ranks(track, mapped, span, work, settings.executor)


def channels(track: Track, singular: np.ndarray) -> int | None:
    """Median over the mapped sequences of how many directions survive."""
    known = [row for row in singular if not np.isnan(row).all()]
    if not known or track.steps == 1:
        return None
    return int(np.median([survivors(row) for row in known]))


def half_life(core: Core, labels: tuple[str, ...]) -> float:
    """ln 2/|rate| of an exponential decay, else where the lag curve has fallen by half.

    A rate that has not settled, or may be 0 as well, tells none: then it is the curve's own, and
    where that has not fallen by half yet, NaN.
    """
    rate, curve = core.rate.value, core.curve
    if curve.searched == 0 and not math.isfinite(rate):
        return math.nan
    either = core.rate.low < -RATE_ROUNDING and core.rate.high > RATE_ROUNDING
    if math.isfinite(rate) and (either or not core.settled):
        return curve.half_life if math.isfinite(curve.half_life) else math.nan
    if rate < -RATE_ROUNDING and "not exponential" not in labels and curve.falls_with(rate):
        return math.log(2) / -rate
    return curve.half_life
