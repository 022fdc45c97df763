"""The numbers of a layer whose gains cannot be had: states and gradients stand, gains are NaN.

Letters: T timesteps, B sequences, M mapped sequences, S the state's width.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from gradflow.analysis import UNMEASURED, Rate
from gradflow.analyzer.core import Core, finite_sequences, span_of
from gradflow.analyzer.curve import lag_curve
from gradflow.analyzer.gains import SpanGains
from gradflow.analyzer.jacobians import state_size
from gradflow.analyzer.lyapunov import Growth
from gradflow.analyzer.plan import NORMS, Maps
from gradflow.analyzer.ranks import Ranks
from gradflow.analyzer.rates import Verdict
from gradflow.analyzer.settings import Settings
from gradflow.recording import Track

NOT_MEASURED = "gains not measured"  # in place of a method

UNKNOWN = "its step Jacobians are not known: "  # which the sentence says itself


def without_gains(track: Track, settings: Settings, why: str) -> Core:
    """A `Core` that knows the span and which states are finite, and says why it knows no more.

    Args:
        track: one layer in one direction.
        settings: what `analyze` was asked for.
        why: a sentence on what stands in the way of the step Jacobians.

    Returns:
        Its rates, maps and singular values are NaN, its maps have no source, its verdict is
        "inconclusive".

    Raises:
        RecordingError: not even the states are to be had.
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
