"""What a verdict rests on: growth, rate, maps, lag curve and ranks of one layer.

Letters: T timesteps, B sequences, S the state's width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gradflow.analysis import Rate
from gradflow.analyzer import plan
from gradflow.analyzer.curve import LagCurve, lag_curve
from gradflow.analyzer.jacobians import operator_of, state_size, vector_seconds
from gradflow.analyzer.leading import WeightGrowth
from gradflow.analyzer.lyapunov import Growth, log_growth
from gradflow.analyzer.norms import EXACT_ROWS
from gradflow.analyzer.order import cuts_before
from gradflow.analyzer.ranks import Ranks, measure_ranks
from gradflow.analyzer.rates import (
    ROUNDING,
    Verdict,
    judge,
    rate_of_one,
    rate_over_sequences,
)
from gradflow.analyzer.settings import Settings
from gradflow.analyzer.singular import survivors
from gradflow.analyzer.thin import thin_maps
from gradflow.recording import Track

MAP_SECONDS = 5.0  # predicted, for the maps of all layers together
RATE_SECONDS = 2.0  # predicted, for the exponents of all layers together
CHANNEL_WORK = 2e11  # operations for the singular values of all layers together


@dataclass(frozen=True)
class Core:
    """The numbers of a verdict, none of which needs a gradient."""

    span: int
    finite: np.ndarray  # (B,) whether every state is
    growth: Growth
    sequence_rates: np.ndarray  # (B,)
    rate: Rate
    verdict: Verdict
    mapped: tuple[int, ...]
    maps: plan.Maps
    curve: LagCurve
    ranks: Ranks
    no_gains: str  # why no gains could be measured, "" where they were

    @property
    def log_curves(self) -> np.ndarray:
        """(B, T): ln growth along the leading direction from s_0 on."""
        return self.growth.log_growth[1:, :, 0].cumsum(0).T.numpy()


def measure(
    track: Track, settings: Settings, *, withheld: bool, watch: WeightGrowth | None = None
) -> Core:
    """How fast every sequence grows or fades, and the maps of a few."""
    span = span_of(track, settings)
    finite = finite_sequences(track)
    growth = growth_of(track, settings, watch)
    rates = growth.exponents[:, 0].numpy().copy()
    rates[~finite | (track.lengths.cpu() == 1).numpy()] = np.nan  # one step has no recurrence
    rate = _rate(track, growth, rates, finite)
    measurable = int(np.isfinite(rates).sum())
    mapped = _mapped(track, rates, finite, settings)
    maps, ranks = _maps(track, mapped, span, withheld, settings)
    return Core(
        span=span,
        finite=finite,
        growth=growth,
        sequence_rates=rates,
        rate=rate,
        verdict=judge(rate, span, measurable, int(growth.counted.sum(0).max())),
        mapped=mapped,
        maps=maps,
        curve=lag_curve(maps.log_gain["spectral"], maps.sources),
        ranks=ranks,
        no_gains="",
    )


def span_of(track: Track, settings: Settings) -> int:
    """The distance of interest in steps: as asked for, or the median length."""
    return settings.span or max(1, round(float(track.lengths.cpu().double().quantile(0.5))))


def finite_sequences(track: Track) -> np.ndarray:
    """(B,) whether every real state of a sequence, its initial one included, is finite."""
    finite = torch.ones(track.batch, dtype=torch.bool)
    real = track.mask.cpu()
    for values in track.seen_states.values():
        finite &= (torch.isfinite(values.cpu()).all(-1) | ~real).all(0)
    for values in track.initial.values():
        finite &= torch.isfinite(values.cpu()).all(-1)
    return finite.numpy()


def growth_of(track: Track, settings: Settings, watch: WeightGrowth | None) -> Growth:
    """The QR iteration over all sequences, with as many exponents as the budget allows."""
    length, batch, size = int(track.lengths.max()), track.batch, state_size(track)
    allowed = RATE_SECONDS / settings.layers
    affordable = [k for k in (1, 2, 4, 8, 16, 32, 64, 128) if k < size] + [size]
    operator = operator_of(track)
    thin = vector_seconds(operator) if operator.thin else None
    fitting = [k for k in affordable if qr_seconds(length, batch, size, k, thin) <= allowed]
    count = fitting[-1] if fitting else 1
    if thin is None and qr_seconds(length, batch, size, 1) > 2 * allowed:
        operator = operator_of(track, torch.float32)
    cuts = cuts_before(track).diff(dim=0, prepend=torch.zeros(1, batch, dtype=torch.int)) > 0
    cuts[0] |= not track.first_step_seen  # what leads into the first state was not seen
    return log_growth(
        operator,
        track.lengths,
        count,
        cuts=cuts[:length],
        seed=settings.seed,
        progress=lambda share: settings.progress(f"{track.name}: rates", share),
        watch=watch,
    )


def qr_seconds(length: int, batch: int, size: int, k: int, thin: float | None = None) -> float:
    """Predicted seconds: the pushes, and for more than one direction a small QR per sequence.

    thin is what one vector of every sequence takes at one step of a thin operator.
    """
    factoring = (8.0 * size * k * k + 3e5) if k > 1 else 4.0 * size
    push = batch * 2.0 * size**2 / 8e9 if thin is None else thin
    return length * (k * push + batch * factoring / 8e9 + 2e-4)


def _rate(track: Track, growth: Growth, rates: np.ndarray, finite: np.ndarray) -> Rate:
    nothing = Rate(math.nan, math.nan, math.nan)
    if not finite.all() or track.steps == 1:
        return nothing
    known = np.flatnonzero(~np.isnan(rates))
    if len(known) == 1:
        b = int(known[0])
        return rate_of_one(growth.log_growth[growth.counted[:, b], b, 0].numpy())
    return rate_over_sequences(rates)


def _mapped(
    track: Track, rates: np.ndarray, finite: np.ndarray, settings: Settings
) -> tuple[int, ...]:
    """Which sequences are mapped: those nearest to the median rate of all, nearest first."""
    candidates = settings.sequences or tuple(range(track.batch))
    known = [b for b in candidates if not math.isnan(rates[b])]
    if not known:
        usable = [b for b in candidates if finite[b]] or list(candidates)
        return tuple(sorted(usable, key=lambda b: -int(track.lengths[b]))[: settings.maps])
    # the lower median, so that it is some sequence's own
    middle = np.sort(rates[~np.isnan(rates)])[(int((~np.isnan(rates)).sum()) - 1) // 2]
    distance = [0.0 if rates[b] == middle else abs(float(rates[b] - middle)) for b in known]
    order = sorted(range(len(known)), key=lambda place: (distance[place], known[place]))
    return tuple(known[place] for place in order[: settings.maps])


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
    )
    segments = cuts_before(track)[:, list(mapped)].T.numpy()  # (M, T)
    crossing = segments[:, maps.sources, None] != segments[:, None, :]
    for values in maps.planes:
        values[crossing] = np.nan
    return maps, measure_ranks(track, mapped, span, CHANNEL_WORK / settings.layers)


def channels(track: Track, singular: np.ndarray) -> int | None:
    """Median over the mapped sequences of how many directions survive."""
    known = [row for row in singular if not np.isnan(row).all()]
    if not known or track.steps == 1:
        return None
    return int(np.median([survivors(row) for row in known]))


def half_life(rate: Rate, curve: LagCurve, labels: tuple[str, ...]) -> float:
    """ln 2/|rate| of an exponential decay, else where the lag curve has fallen by half."""
    if math.isnan(rate.value) and curve.searched == 0:
        return math.nan
    exponential = "not exponential" not in labels and math.isfinite(rate.value)
    if exponential and rate.value < -ROUNDING:
        return math.log(2) / -rate.value
    return curve.half_life
