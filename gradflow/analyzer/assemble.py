"""`analyze`: from a recording to an analysis, layer after layer or side by side with the same numbers.

Letters: T timesteps, B sequences, H units, S the state's width, k lag, t source, t' target.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from gradflow.analysis.results import LayerAnalysis
from gradflow.analysis.run import Analysis
from gradflow.analyzer import plan
from gradflow.analyzer.activity import state_norms
from gradflow.analyzer.arrays import dataset
from gradflow.analyzer.causes import findings
from gradflow.analyzer.causes.read_by_loss import perhaps_padding
from gradflow.analyzer.closed_loops import judged, told_once, with_alone
from gradflow.analyzer.contributions import contributions, triangle
from gradflow.analyzer.core import channels, half_life, pooled_over
from gradflow.analyzer.curve import finite_extremes
from gradflow.analyzer.evidence import Evidence, Measured
from gradflow.analyzer.exponents import rate_factors, watcher
from gradflow.analyzer.flow import with_flow
from gradflow.analyzer.jacobians import state_size
from gradflow.analyzer.linear_units import as_units
from gradflow.analyzer.loss import arrives_elsewhere, gradient_note, profile
from gradflow.analyzer.measuring import measure, without_gains
from gradflow.analyzer.rates import Vote, decays_as_power
from gradflow.analyzer.read_states import read_part
from gradflow.analyzer.read_steps import Reading, readings
from gradflow.analyzer.sentences import provenance_of, sentence, title, warnings_of
from gradflow.analyzer.settings import Progress, Settings, checked
from gradflow.analyzer.spectrum import spectrum
from gradflow.analyzer.spread import result_of, started
from gradflow.errors import InputError, RecordingError, must_be
from gradflow.limits import LAG_SECONDS, SHORT, TRIANGLE_SECONDS
from gradflow.process import fitting_threads, require_executor, without_modes
from gradflow.recording.pooled import pooled
from gradflow.recording.track import Track
from gradflow.recording.tracks import Recording


@without_modes
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
    pool: bool = True,
    executor: Executor | None = None,
) -> Analysis:
    """Measure how far back every layer's gradient flows, and say why it stops.

    The verdict judges the gain over the span, ln ‖P(t+span←t)‖₂ of each sequence, the largest of any
    direction: its mean with a 95 % t-interval over sequences is held against ±ln 10, one decade. The
    rate is the largest Lyapunov exponent, the slope of what keeps most, its interval widened by how
    far it has settled; where that is too far it is labelled `not settled` and no sentence uses it.

    Args:
        recording: what ``gradflow.record`` saw.
        span: the distance of interest in steps; the median length by default.
        sequences: which sequences may be mapped; all by default.
        maps: how many of them get a full map, first the one with the median gain.
        method: "exact", all in float64, or "auto", which chooses the stride by predicted cost, and for
            wide states float32.
        stride: every how many steps a map has a source.
        seed: of random starts; the gain over the span and the rate do not depend on it.
        progress: called with a phase in words and the share done.
        pool: whether runs of one layer from starts of their own (one sentence at a time, episode
            after episode) are one layer of as many sequences; False keeps them apart, as the
            recording has them.
        executor: any `concurrent.futures.Executor`, for layers side by side, and with ``maps`` above 1
            for the mapped sequences of each; numbers are the same bit for bit. Other processes get
            copies of the states; where a layer cannot be sent, threads do.

    Returns:
        An `Analysis`, layer name -> `LayerAnalysis`: gain in nats over the span, rate in nats per
        step, half-life and horizon in steps, channels, verdict, findings, and every array in
        ``.data``. A layer whose step Jacobians are not known has the label "no gains": totals and
        states, no rate, and a sentence that says why.

    Raises:
        RecordingError: nothing was recorded.
        InputError: an argument out of its range.

    >>> import torch, gradflow
    >>> rnn = torch.nn.RNN(1, 1, bias=False)
    >>> _ = torch.nn.init.constant_(rnn.weight_hh_l0, 0.9)
    >>> with gradflow.record(rnn) as recording:
    ...     rnn(torch.zeros(100, 2, 1))[0][-1].sum().backward()
    >>> layer = gradflow.analyze(recording)["l0"]
    >>> layer.verdict, round(layer.half_life, 4), layer.horizon
    ('vanishing', 6.5788, 66)
    """
    return analyze_among(
        recording, {}, pool=pool, executor=executor, span=span, sequences=sequences, maps=maps,
        method=method, stride=stride, seed=seed, progress=progress,
    )  # fmt: skip


def analyze_among(
    recording: Recording,
    batches: Mapping[str, tuple[Vote, ...]],
    *,
    pool: bool = True,
    executor: Executor | None = None,
    **asked: Any,
) -> Analysis:
    """`analyze` of one batch of several: gain, rate and verdict are over all, the rest is of this one.

    ``batches`` has the votes of all batches, by layer.
    """
    if not isinstance(recording, Recording):
        kind, advice = type(recording).__name__, "give what `with gradflow.record(...)` yields"
        raise InputError(must_be("recording", "a Recording", kind, advice))
    recording.require_tracks()
    recording, said = pooled(recording) if pool else (recording, [])
    settings = replace(checked(recording, **asked), batches=batches)
    layers, refused = _layers(recording, settings, executor)
    return Analysis(
        title=recording.model_name,
        layers=layers,
        warnings=(*refused, *said, *warnings_of(recording, layers)),
        provenance=dict(recording.provenance) | provenance_of(layers, settings),
        unseen=recording.unseen,
    )


def _layers(
    recording: Recording, settings: Settings, executor: Executor | None
) -> tuple[dict[str, LayerAnalysis], list[str]]:
    """All layers whose states can be read, and a sentence on each whose states cannot."""
    layers: dict[str, LayerAnalysis] = {}
    refused: dict[str, RecordingError] = {}
    unread: list[str] = []
    read = readings(recording)
    told = settings.progress
    coming: list[tuple[str, Future[LayerAnalysis], tuple[Any, ...]]] = []
    with _spread(executor, settings) as (maker, settings):
        for track in recording.values():
            try:
                with fitting_threads(sum(state.shape[-1] for state in track.states.values())):
                    shown, loop = judged(recording, track)
                    part = read_part(loop)
                    shown = part.shown if shown is loop else shown
                    if track.state_shape:
                        shown = as_units(track)  # all of it, read or not
                if part.unread and part.words not in unread:
                    unread.append(part.words)
                parts = track, shown, part.judged, read[track.name], settings
                coming.append((track.name, started(maker, _whole_layer, *parts), parts))
            except RecordingError as error:  # its replay is not to be had
                refused[track.name] = error
        for name, future, parts in coming:
            try:
                layers[name] = result_of(future, name, parts)
                told(name, 1.0)
            except RecordingError as error:
                refused[name] = error
    if not layers:
        raise next(iter(refused.values()))
    said = [
        f"{name} is not in this report: {str(error).removeprefix(f'{name}: ')}"
        for name, error in refused.items()
    ]
    doubts = [words for name in layers if (words := perhaps_padding(recording[name], read[name]))]
    return with_flow(recording, told_once(recording, layers)), [*said, *unread, *doubts]


@contextmanager
def _spread(
    executor: Executor | None, settings: Settings
) -> Iterator[tuple[Executor | None, Settings]]:
    """Who makes the layers, and the settings of each.

    Where several sequences are mapped, layers run in threads of this process and wait for what the executor
    makes of each sequence: a task that waited in the executor for other tasks of it could wait for ever.
    """
    if executor is None:
        yield None, settings
        return
    require_executor(executor, "ThreadPoolExecutor(), ProcessPoolExecutor()")
    settings = replace(settings, progress=_silent)
    if settings.maps == 1:
        yield executor, settings
        return
    with ThreadPoolExecutor() as threads:
        yield threads, replace(settings, executor=executor)


def _silent(phase: str, share: float) -> None:
    """The progress of what is made elsewhere."""


# ------------------------------------------------------------------------------------- one layer


def _whole_layer(
    track: Track, shown: Track, loop: Track, read: Reading, settings: Settings
) -> LayerAnalysis:
    """One layer with what it does alone, where it is part of a closed loop."""
    with fitting_threads(sum(state.shape[-1] for state in track.states.values())):
        return with_alone(track, _layer(shown, loop, read, settings), settings)


def _layer(track: Track, loop: Track, read: Reading, settings: Settings) -> LayerAnalysis:
    """Measure one layer in one direction, then judge it and put it into words.

    loop is what of it has a vote in gains and verdict: mostly itself, of a closed loop the joint
    state, and of either what the loss reads.
    """
    withheld = track.has_gradient and track.parity.status == "failed"
    weight = watcher(track)
    try:
        core = measure(loop, settings, withheld=withheld, watch=weight)
        if core.linear is not None and loop.state_shape != track.state_shape:  # of all, read or not
            core = replace(core, linear=measure(track, settings, withheld=True).linear)
    except RecordingError as error:  # no step Jacobians; what needs none is shown all the same
        core, weight = without_gains(track, settings, str(error)), None
    core = pooled_over(core, settings.batches.get(track.name, ()))

    # what the loss sees
    seen = profile(track, withheld)
    measured = Measured(
        **vars(core),
        track=track,
        factors=rate_factors(core.growth, weight),
        spectrum=spectrum(core),
        profile=seen,
        triangle=triangle(track, core.mapped, withheld, TRIANGLE_SECONDS / settings.layers),
        contributed=contributions(
            track,
            core.mapped,
            withheld,
            LAG_SECONDS / settings.layers,
            lambda share: settings.progress(f"{track.name}: lags", share),
        ),
        withheld=withheld,
        share=1 / settings.layers,
    )

    # the verdict, and why
    labels = _labels(measured)
    grows = core.verdict.name == "exploding" or "transient growth" in labels
    evidence = Evidence(
        **vars(measured),
        alone=settings.layers == 1,
        probed=settings.probed,
        reading=read,
        size=state_size(loop),
        labels=labels,
        half_life=half_life(core, labels),
        channels=channels(loop, core.ranks.singular),
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
        gain=evidence.gain,
    )


def _labels(m: Measured) -> tuple[str, ...]:
    longest = int(m.track.lengths.max())
    if longest == 1:
        return ("no recurrence", "short")
    found = {
        "no gains": bool(m.no_gains),
        "not finite": not m.finite.all(),
        # growth that goes on is no transient
        "transient growth": m.curve.transient_growth
        and (m.verdict.name != "exploding" or (m.settled and m.rate.high < 0)),
        "chaotic": _chaotic(m),
        "not settled": math.isfinite(m.rate.value) and not m.settled,
        "not exponential": decays_as_power(m.log_curves),
        "range-limited": _leaves_range(m.track, m.maps),
        "short": longest < SHORT,
        "one sequence": not (m.no_gains or m.batches)
        and (int((~np.isnan(m.sequence_rates)).sum()) == 1 or m.track.batch == 1),
    }
    return tuple(label for label, holds in found.items() if holds)


def _chaotic(m: Measured) -> bool:
    """Whether states that differ by little part for good, while the states themselves do not grow."""
    grows = m.verdict.name in ("exploding", "inconclusive") and m.settled and m.rate.low > 0
    if not grows or m.linear is not None or m.constant is not None:
        return False
    sizes = state_norms(m.track).max(0)[int(m.track.steps / 2) :]
    sizes = sizes[np.isfinite(sizes)]
    if len(sizes) < 2 or not (sizes > 0).all():  # at rest where nothing moves it
        return False
    return bool(math.log(sizes[-1] / sizes[0]) < m.rate.value * (len(sizes) - 1) / 2)


def _leaves_range(track: Track, maps: plan.Maps) -> bool:
    """Whether gains leave what the track's own dtype can hold."""
    limits = torch.finfo(track.states[track.main_state].dtype)
    low, high = finite_extremes(maps.log_gain["spectral"])
    return low < math.log(limits.tiny) or high > math.log(limits.max)
