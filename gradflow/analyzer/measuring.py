"""How the gains of a layer are measured: by the kind of its step maps, in brief, or not at all.

`measure` is asked by everybody. `brief` is a verdict and its few numbers without maps to show, what
remedies are compared by: the same estimators as in `analyze` on a share of its budgets, and nothing
that needs a gradient. `without_gains` is for a layer whose gains cannot be had: its states and gradients
stand, its gains are NaN.

Letters: T timesteps, B sequences, M mapped sequences, S the state's width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from gradflow.analysis.results import UNMEASURED, Gain, Rate
from gradflow.analyzer import core
from gradflow.analyzer.blocks import SPEED
from gradflow.analyzer.core import Core, finite_sequences, span_of
from gradflow.analyzer.curve import lag_curve
from gradflow.analyzer.exponents import Growth, WeightGrowth
from gradflow.analyzer.gains import SpanGains
from gradflow.analyzer.jacobians import operator_of, state_size, vector_seconds
from gradflow.analyzer.keeping import keeping_seconds, qr_seconds
from gradflow.analyzer.linear_measure import measure_linear
from gradflow.analyzer.plan import NORMS, Maps, exact_seconds
from gradflow.analyzer.ranks import Ranks
from gradflow.analyzer.rates import Verdict, decays_as_power
from gradflow.analyzer.read_states import read_part
from gradflow.analyzer.settings import Settings
from gradflow.cells.linear import LinearSteps
from gradflow.errors import RecordingError
from gradflow.process import fitting_threads, without_modes
from gradflow.recording.track import Track


def is_linear(track: Track) -> bool:
    """Whether A_t is made of decays that do not depend on the state, which are known.

    A shape of the state alone does not tell: what goes around it may not be known.
    """
    if not track.state_shape:
        return False
    try:
        return isinstance(track.operator(sequences=torch.tensor([0])), LinearSteps)
    except RecordingError:
        return False


def measure(
    track: Track, settings: Settings, *, withheld: bool, watch: WeightGrowth | None = None
) -> Core:
    """The numbers of a verdict: by sums of logarithms or key-axis products where A_t is linear.

    Raises:
        RecordingError: its step Jacobians are not known.
    """
    if track.state_shape and is_linear(track):
        return measure_linear(track, settings, withheld=withheld)
    return core.measure(track, settings, withheld=withheld, watch=watch)


NOT_MEASURED = "gains not measured"  # in place of a method

UNKNOWN = "its step Jacobians are not known: "  # which the sentence says itself


def without_gains(track: Track, settings: Settings, why: str) -> Core:
    """A `Core` that knows the span and which states are finite, and says why it knows no more.

    Its rates, maps and singular values are NaN, its maps have no source, its verdict is "inconclusive".
    """
    chosen = settings.sequences or tuple(range(track.batch))
    mapped = tuple(sorted(chosen, key=lambda b: -int(track.lengths[b]))[: settings.maps])
    maps = _no_maps(track, len(mapped))
    log_growth = torch.full((track.steps, track.batch, 1), math.nan, dtype=torch.float64)
    nothing = np.zeros(0)
    return Core(
        span=span_of(track, settings),
        finite=finite_sequences(track),
        growth=Growth(log_growth, torch.zeros(track.steps, track.batch, dtype=torch.bool)),
        sequence_gains=SpanGains(
            np.full(track.batch, math.nan), np.zeros(track.batch, dtype=int), 0
        ),
        gain=UNMEASURED,
        sequence_rates=np.full(track.batch, math.nan),
        rate=Rate(math.nan, math.nan, math.nan),
        settling=math.nan,
        settled=False,
        constant=None,
        verdict=Verdict("inconclusive"),
        mapped=mapped,
        maps=maps,
        curve=lag_curve(maps.log_gain["spectral"], maps.sources),
        ranks=Ranks(
            np.full((len(mapped), state_size(track)), math.nan), 0, nothing, nothing, nothing
        ),
        no_gains=why.removeprefix(f"{track.name}: ").removeprefix(UNKNOWN),
    )


def _no_maps(track: Track, mapped: int) -> Maps:
    """Maps without a source."""
    names = list(track.states)
    pairs = tuple(b + a for b in names for a in names) if len(names) > 1 else ()
    nothing = np.full((mapped, 0, track.steps), math.nan)
    return Maps(
        log_gain=dict.fromkeys((*NORMS, "loss"), nothing),
        blocks=np.full((len(pairs), *nothing.shape), math.nan),
        block_names=pairs,
        cell_path=nothing,
        sources=np.zeros(0, dtype=int),
        method="none",
        stride=1,
        dtype=torch.float64,
        words=NOT_MEASURED,
    )


@dataclass(frozen=True)
class Brief:
    """The numbers of a verdict; see `gradflow.analysis.LayerAnalysis`."""

    span: int
    verdict: str
    gain: Gain
    rate: Rate
    half_life: float
    horizon: int | None
    searched: int
    channels: int | None


@without_modes
def brief(
    track: Track,
    *,
    span: int | None = None,
    share: int = 1,
    seed: int = 0,
    sequences: tuple[int, ...] | None = None,
) -> Brief:
    """Measure one layer shortly.

    Args:
        track: one layer in one direction; its gradients are not read.
        span: the distance of interest in steps; the median length by default.
        share: how many measurements share the budgets of one `analyze`.
        seed: of every random start.
        sequences: which may be mapped; all by default.

    Raises:
        RecordingError: its step Jacobians are not known.

    >>> import torch, gradflow
    >>> rnn = torch.nn.RNN(1, 1, bias=False)
    >>> _ = torch.nn.init.constant_(rnn.weight_hh_l0, 0.9)
    >>> with gradflow.record(rnn) as recording:
    ...     rnn(torch.zeros(100, 2, 1))[0][-1].sum().backward()
    >>> found = brief(recording["l0"])
    >>> found.verdict, round(found.half_life, 4), found.horizon, found.channels
    ('vanishing', 6.5788, 66, 0)
    """
    settings = core.Settings(
        span, sequences, 1, "auto", None, seed, share, lambda phase, done: None, brief=True
    )
    track = read_part(track).judged
    with fitting_threads(state_size(track)):
        return _measured(track, settings)


def _measured(track: Track, settings: core.Settings) -> Brief:
    found = measure(track, settings, withheld=True)
    labels = ("not exponential",) if decays_as_power(found.log_curves) else ()
    return Brief(
        span=found.span,
        verdict=found.verdict.name,
        gain=found.gain,
        rate=found.rate,
        half_life=core.half_life(found, labels),
        horizon=found.curve.horizon,
        searched=found.curve.searched,
        channels=core.channels(track, found.ranks.singular),
    )


def brief_seconds(track: Track, span: int, share: int) -> float:
    """Predicted seconds of running the layer again and of `brief`, at most."""
    length, batch, size = int(track.lengths.max()), track.batch, state_size(track)
    weights = sum(weight.numel() for weight in track.weights.values())
    speed = SPEED[torch.float64]
    again = 8.0 * length * batch * weights / speed  # forward, gates, the same in float64
    vector = vector_seconds(operator_of(track))
    rate = qr_seconds(length, batch, size, 1, vector) + keeping_seconds(track, share)
    # a map that does not fit its budget still follows one source to its end
    one = 2.0 * length * size**3 / speed
    maps = min(exact_seconds(size, length), core.MAP_SECONDS / share + one)
    work = min(4.0 * size**3 * span, core.CHANNEL_WORK / share)
    return again + rate + maps + work / speed
