"""`analyze`: from a recording to an analysis, one layer after the other.

Letters: T timesteps, B sequences, H units, S the state's width, k lag, t source, t' target.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gradflow._version import __version__
from gradflow.analysis import Analysis, LayerAnalysis, Rate
from gradflow.analyzer import plan
from gradflow.analyzer.arrays import dataset
from gradflow.analyzer.causes import findings
from gradflow.analyzer.certificates import broken
from gradflow.analyzer.contributions import contributions
from gradflow.analyzer.curve import LagCurve, finite_extremes, lag_curve
from gradflow.analyzer.evidence import Evidence, number
from gradflow.analyzer.flow import with_flow
from gradflow.analyzer.jacobians import operator_of, state_size
from gradflow.analyzer.leading import WeightGrowth, rate_factors, watcher
from gradflow.analyzer.loss import arrives_elsewhere, gradient_note, profile
from gradflow.analyzer.lyapunov import SHORT, Growth, burn_in, log_growth
from gradflow.analyzer.measured import Measured
from gradflow.analyzer.order import cuts_before
from gradflow.analyzer.ranks import measure_ranks
from gradflow.analyzer.rates import (
    ROUNDING,
    Verdict,
    decays_as_power,
    judge,
    rate_of_one,
    rate_over_sequences,
)
from gradflow.analyzer.singular import survivors
from gradflow.analyzer.spectrum import spectrum
from gradflow.analyzer.threads import fitting_threads
from gradflow.analyzer.triangle import triangle
from gradflow.analyzer.words import sentence, title
from gradflow.errors import InputError, RecordingError, must_be
from gradflow.recording import Recording, Track

METHODS = ("auto", "exact", "sketch")
MAP_SECONDS = 8.0  # predicted, for the maps of all layers together
RATE_SECONDS = 2.0  # predicted, for the exponents of all layers together
TRIANGLE_SECONDS = 1.5  # predicted, for the triangles of all layers together
LAG_SECONDS = 5.5  # predicted, for the gradients by lag of all layers together
CHANNEL_WORK = 2e11  # operations for the singular values of all layers together

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Settings:
    """What `analyze` was asked for, checked."""

    span: int | None
    sequences: tuple[int, ...] | None
    maps: int
    method: str
    stride: int | None
    seed: int
    layers: int  # how many share the budgets
    progress: Progress


def analyze(
    recording: Recording,
    *,
    span: int | None = None,
    sequences: Sequence[int] | None = None,
    maps: int = 1,
    method: str = "auto",
    stride: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Analysis:
    """Measure how far back every layer's gradient flows, and say why it stops.

    The rate is the largest Lyapunov exponent, λ₁ = mean over t of ln |R_t,11| (Benettin et al.
    1980), with a 95 % t-interval over sequences; the verdict is an equivalence test against the
    band ±ln(10)/span.

    Args:
        recording: what ``gradflow.record`` saw.
        span: the distance of interest in steps; the median length by default.
        sequences: which sequences may be mapped; all by default.
        maps: how many of them get a full map, first the one with the median rate.
        method: "exact", "sketch" (blocks truncated as they lose rank), or "auto", which chooses
            method and stride by predicted cost.
        stride: every how many steps a map has a source.
        seed: of every random start.
        progress: called with a phase in words and the share done.

    Raises:
        RecordingError: nothing was recorded.
        InputError: an argument out of its range.

    >>> import torch, gradflow
    >>> rnn = torch.nn.RNN(1, 1, bias=False)
    >>> _ = torch.nn.init.constant_(rnn.weight_hh_l0, 0.9)
    >>> with gradflow.record(rnn) as recording:
    ...     rnn(torch.zeros(100, 2, 1))[0][-1].sum().backward()
    >>> layer = analyze(recording)["l0"]
    >>> layer.verdict, round(layer.half_life, 4), layer.horizon
    ('vanishing', 6.5788, 66)
    """
    if not isinstance(recording, Recording):
        kind = type(recording).__name__
        raise InputError(
            must_be(
                "recording", "a Recording", kind, "give what `with gradflow.record(...)` yields"
            )
        )
    recording.require_tracks()
    settings = _checked(recording, span, sequences, maps, method, stride, seed, progress)
    layers, refused = _layers(recording, settings)
    return Analysis(
        title=recording.model_name,
        layers=layers,
        warnings=(*refused, *_warnings(recording, layers)),
        provenance=dict(recording.provenance) | _provenance(layers, settings),
    )


def _layers(recording: Recording, settings: Settings) -> tuple[dict[str, LayerAnalysis], list[str]]:
    """All layers that can be measured, and a sentence on each that cannot."""
    layers: dict[str, LayerAnalysis] = {}
    refused: list[RecordingError] = []
    for track in recording:
        try:
            with fitting_threads(sum(state.shape[-1] for state in track.states.values())):
                layers[track.name] = _layer(track, settings)
        except RecordingError as error:  # its Jacobians or its replay are not to be had
            refused.append(error)
    if not layers:
        raise refused[0]
    return with_flow(recording, layers), [str(error) for error in refused]


def _checked(
    recording: Recording,
    span: int | None,
    sequences: Sequence[int] | None,
    maps: int,
    method: str,
    stride: int | None,
    seed: int,
    progress: Progress | None,
) -> Settings:
    if span is not None:
        _whole("span", span, 1, "leave it out for the median length")
    _whole("maps", maps, 1, "leave it out for one map")
    if stride is not None:
        _whole("stride", stride, 1, "leave it out to let the predicted cost choose")
    _whole("seed", seed, 0, "leave it out for 0")
    if method not in METHODS:
        raise InputError(
            must_be("method", "one of auto, exact, sketch", repr(method), "leave it out for auto")
        )
    batch = min(track.batch for track in recording)
    chosen: tuple[int, ...] | None = None
    if sequences is not None:
        if isinstance(sequences, str) or not isinstance(sequences, Iterable):
            raise InputError(
                must_be("sequences", "a list of indices", repr(sequences), "write it as [0]")
            )
        chosen = tuple(dict.fromkeys(sequences))
        if not chosen:
            raise InputError(
                must_be("sequences", "at least one index", "none", "leave it out for all of them")
            )
        for index in chosen:
            _whole("every index in sequences", index, 0, f"this recording has {batch} sequences")
            if index >= batch:
                raise InputError(
                    must_be(
                        "every index in sequences",
                        f"below {batch}, the number of sequences",
                        index,
                        "count sequences from 0",
                    )
                )
    return Settings(
        span,
        None if chosen is None else tuple(int(index) for index in chosen),
        maps,
        method,
        stride,
        seed,
        len(recording),
        progress or (lambda phase, share: None),
    )


def _whole(name: str, value: object, least: int, advice: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise InputError(must_be(name, f"a whole number of at least {least}", repr(value), advice))


# ------------------------------------------------------------------------------------- one layer


def _layer(track: Track, settings: Settings) -> LayerAnalysis:
    """Measure one layer in one direction, then judge it and put it into words."""
    span = settings.span or max(1, round(float(track.lengths.cpu().double().quantile(0.5))))
    finite = _finite_sequences(track)

    # how fast it grows or fades, every sequence on its own
    weight = watcher(track)
    growth = _growth(track, settings, weight)
    rates = growth.exponents[:, 0].numpy().copy()
    rates[~finite | (track.lengths.cpu() == 1).numpy()] = np.nan  # one step has no recurrence
    rate = _rate(track, growth, rates, finite)
    measurable = int(np.isfinite(rates).sum())
    verdict = judge(rate, span, measurable, int(growth.counted.sum(0).max()))

    # every source to every target, for a few sequences
    mapped = _mapped(track, rates, finite, settings)
    withheld = track.has_gradient and track.parity.status == "failed"
    maps = _maps(track, mapped, withheld, settings)
    curve = lag_curve(maps.log_gain["spectral"], maps.sources)
    ranks = measure_ranks(track, mapped, span, CHANNEL_WORK / settings.layers)

    # what the loss sees
    seen = profile(track, withheld)
    measured = Measured(
        track=track,
        span=span,
        growth=growth,
        factors=rate_factors(growth, weight),
        rate=rate,
        sequence_rates=rates,
        spectrum=spectrum(growth, rate, rates),
        mapped=mapped,
        maps=maps,
        curve=curve,
        ranks=ranks,
        singular=ranks.singular,
        reach=ranks.reach,
        profile=seen,
        triangle=triangle(track, mapped, withheld, TRIANGLE_SECONDS / settings.layers),
        contributed=contributions(
            track,
            mapped,
            withheld,
            LAG_SECONDS / settings.layers,
            lambda share: settings.progress(f"{track.name}: lags", share),
        ),
        withheld=withheld,
        share=1 / settings.layers,
    )

    # the verdict, and why
    labels = _labels(measured, verdict, finite)
    grows = verdict.name == "exploding" or "transient growth" in labels
    evidence = Evidence(
        **vars(measured),
        alone=settings.layers == 1,
        size=state_size(track),
        verdict=verdict,
        labels=labels,
        half_life=_half_life(rate, curve, labels),
        channels=_channels(track, ranks.singular),
        gradient_note=gradient_note(track) or ("" if grows else arrives_elsewhere(seen)),
        data=dataset(measured),
    )
    settings.progress(track.name, 1.0)
    return _assembled(evidence)


def _assembled(evidence: Evidence) -> LayerAnalysis:
    track = evidence.track
    return LayerAnalysis(
        name=track.name,
        cell=track.cell,
        reverse=track.reverse,
        hidden=track.hidden,
        size=evidence.size,
        steps=track.steps,
        sequences=track.batch,
        span=evidence.span,
        verdict=evidence.verdict.name,
        labels=evidence.labels,
        rate=evidence.rate,
        half_life=evidence.half_life,
        horizon=evidence.curve.horizon,
        searched=evidence.curve.searched,
        channels=evidence.channels,
        lyapunov=None if math.isnan(evidence.rate.value) else evidence.spectrum.values,
        findings=findings(evidence),
        parity=track.parity,
        sentence=sentence(evidence),
        title=title(evidence),
        gradient_note=evidence.gradient_note,
        method=evidence.maps.words,
        data=evidence.data,
    )


def _finite_sequences(track: Track) -> np.ndarray:
    """(B,) whether every real state of a sequence, its initial one included, is finite."""
    finite = torch.ones(track.batch, dtype=torch.bool)
    real = track.mask.cpu()
    for values in track.states.values():
        finite &= (torch.isfinite(values.cpu()).all(-1) | ~real).all(0)
    for values in track.initial.values():
        finite &= torch.isfinite(values.cpu()).all(-1)
    return finite.numpy()


def _growth(track: Track, settings: Settings, watch: WeightGrowth | None) -> Growth:
    """The QR iteration over all sequences, with as many exponents as the budget allows."""
    length, batch, size = int(track.lengths.max()), track.batch, state_size(track)
    allowed = RATE_SECONDS / settings.layers
    affordable = [k for k in (1, 2, 4, 8, 16, 32, 64, 128) if k < size] + [size]
    fitting = [k for k in affordable if _qr_seconds(length, batch, size, k) <= allowed]
    count = fitting[-1] if fitting else 1
    wide = _qr_seconds(length, batch, size, 1) > 2 * allowed
    operator = operator_of(track, torch.float32 if wide else torch.float64)
    cuts = cuts_before(track).diff(dim=0, prepend=torch.zeros(1, batch, dtype=torch.int)) > 0
    cuts[0] |= not track.initial  # what leads into the first state was not seen
    return log_growth(
        operator,
        track.lengths,
        count,
        cuts=cuts[:length],
        seed=settings.seed,
        progress=lambda share: settings.progress(f"{track.name}: rates", share),
        watch=watch,
    )


def _qr_seconds(length: int, batch: int, size: int, k: int) -> float:
    """Predicted seconds: the pushes, and for more than one direction a small QR per sequence."""
    factoring = (8.0 * size * k * k + 3e5) if k > 1 else 4.0 * size
    return length * (batch * (2.0 * size**2 * k + factoring) / 8e9 + 2e-4)


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


def _maps(track: Track, mapped: Sequence[int], withheld: bool, settings: Settings) -> plan.Maps:
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
    return maps


def _channels(track: Track, singular: np.ndarray) -> int | None:
    """Median over the mapped sequences of how many directions survive."""
    known = [row for row in singular if not np.isnan(row).all()]
    if not known or track.steps == 1:
        return None
    return int(np.median([survivors(row) for row in known]))


def _half_life(rate: Rate, curve: LagCurve, labels: tuple[str, ...]) -> float:
    """ln 2/|rate| of an exponential decay, else where the lag curve has fallen by half."""
    if math.isnan(rate.value) and curve.searched == 0:
        return math.nan
    exponential = "not exponential" not in labels and math.isfinite(rate.value)
    if exponential and rate.value < -ROUNDING:
        return math.log(2) / -rate.value
    return curve.half_life


def _labels(m: Measured, verdict: Verdict, finite: np.ndarray) -> tuple[str, ...]:
    longest = int(m.track.lengths.max())
    if longest == 1:
        return ("no recurrence", "short")
    found = {
        "not finite": not finite.all(),
        # growth that goes on is no transient
        "transient growth": m.curve.transient_growth and verdict.name != "exploding",
        "not exponential": decays_as_power(_curves(m.growth)),
        "range-limited": _leaves_range(m.track, m.maps),
        "short": longest < SHORT,
        "one sequence": int((~np.isnan(m.sequence_rates)).sum()) == 1 or m.track.batch == 1,
    }
    return tuple(label for label, holds in found.items() if holds)


def _curves(growth: Growth) -> np.ndarray:
    """(B, T): ln growth along the leading direction from s_0 on."""
    return growth.log_growth[1:, :, 0].cumsum(0).T.numpy()


def _leaves_range(track: Track, maps: plan.Maps) -> bool:
    """Whether gains leave what the track's own dtype can hold."""
    limits = torch.finfo(track.states[track.main_state].dtype)
    low, high = finite_extremes(maps.log_gain["spectral"])
    return low < math.log(limits.tiny) or high > math.log(limits.max)


# --------------------------------------------------------------------------- warnings, provenance


def _warnings(recording: Recording, layers: dict[str, LayerAnalysis]) -> tuple[str, ...]:
    notes = list(recording.notes)
    known = [track for track in recording if track.name in layers]
    for track in known:
        layer = layers[track.name]
        notes += track.notes
        notes += [str(v.attrs["note"]) for v in layer.data.values() if "note" in v.attrs]
        longest = int(track.lengths.max())
        if 1 < longest < SHORT:
            notes.append(
                f"{track.name} ran for {longest} steps only: rates are taken without a burn-in and "
                "include the transient"
            )
        if "range-limited" in layer.labels:
            name = str(track.states[track.main_state].dtype).removeprefix("torch.")
            notes.append(
                f"gains of {track.name} leave the range of {name}: the model's own gradient "
                "over- or underflows there"
            )
        sides = layer.data["sum_rule"].values
        if broken(sides):
            notes.append(
                f"the Lyapunov exponents of {track.name} add up to {number(sides[0])} per step, its "
                f"determinants to {number(sides[1])}: the smallest exponents lie below rounding"
            )
    every = [track.name for track in known if _loss_at_every_step(layers[track.name])]
    if every:
        notes.append(
            f"the loss reaches {', '.join(every)} from many steps at once: the total gradient need "
            "not fade even where nothing flows; read the profile of the last loss step alone"
        )
    return tuple(dict.fromkeys(notes))


def _loss_at_every_step(layer: LayerAnalysis) -> bool:
    """Whether the last loss step alone falls short of the total at most steps."""
    states = list(layer.data["state"].values)
    norms = layer.data["grad_norm"].sel(state="h" if "h" in states else layer.main_state)
    total, last = norms.sel(kind="total").values, norms.sel(kind="last").values
    known = np.isfinite(total) & np.isfinite(last) & (total > 0)
    more = np.abs(total[known] - last[known]) > 0.01 * total[known]
    return int(known.sum()) > 2 and float(more.mean()) > 0.5


def _provenance(layers: dict[str, LayerAnalysis], settings: Settings) -> dict[str, object]:
    longest = max(layer.steps for layer in layers.values())
    return {
        "gradflow": __version__,
        "torch": torch.__version__,
        "method": "; ".join(dict.fromkeys(layer.method for layer in layers.values())),
        "burn_in": f"{burn_in(longest)} of {longest} steps",
        "seed": settings.seed,
        "dtype": "float64, but where the method says otherwise",
        "start": "seeded random basis, the same for every sequence",
    }
