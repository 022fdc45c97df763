"""A layer's verdict and its few numbers without maps to show: what remedies are compared by.

The same estimators as in `analyze` on a share of its budgets, and nothing that needs a gradient.

Letters: T timesteps, B sequences, S the state's width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gradflow.analysis import Gain, Rate
from gradflow.analyzer import core
from gradflow.analyzer.jacobians import operator_of, state_size, vector_seconds
from gradflow.analyzer.keeping import keeping_seconds, qr_seconds
from gradflow.analyzer.measuring import measure
from gradflow.analyzer.plan import exact_seconds
from gradflow.analyzer.rates import decays_as_power
from gradflow.analyzer.read_states import read_part
from gradflow.analyzer.sweep import SPEED
from gradflow.process import fitting_threads, without_modes
from gradflow.recording import Track


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
    track = track if track.state_shape else read_part(track).judged
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
    pilot = 2.0 * length * size**3 / speed
    maps = min(exact_seconds(size, length), core.MAP_SECONDS / share + pilot)
    work = min(4.0 * size**3 * span, core.CHANNEL_WORK / share)
    return again + rate + maps + work / speed
