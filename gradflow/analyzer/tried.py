"""Whether a change of weights does, on the recorded batch, what a remedy promises.

The layer is run again with the change, and the same few vectors are pushed through its steps before
and after; nothing is trained. A remedy that does not help here is not advised.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from gradflow.analyzer.activity import over_all
from gradflow.analyzer.evidence import Evidence
from gradflow.analyzer.jacobians import operator_of, state_size
from gradflow.analyzer.order import cuts_before
from gradflow.analyzer.sweep import SPEED
from gradflow.errors import RecordingError
from gradflow.limits import (
    GATE_CLOSED,
    LESS_SHUT,
    TRIED_LEAST,
    TRIED_SECONDS,
    TRIED_SEQUENCES,
    TRIED_VECTORS,
)
from gradflow.recording import Track


@dataclass(frozen=True)
class Try:
    """What a change of weights did on the recorded batch."""

    won: float  # decades, or a share of a gate's values; NaN: not tried
    least: float  # from which on that is worth an advice
    why_not: str = ""  # in words, where it was not tried

    @property
    def helps(self) -> bool:
        """Whether it did enough to be advised."""
        return self.won >= self.least


def tried(
    e: Evidence,
    *,
    forget_bias: float = 0.0,
    scale_hh: float = 1.0,
    scale_ih: float = 1.0,
    opens: str = "",
) -> Try:
    """Run a layer again with changed weights, and see whether it does what the remedy promises.

    Args:
        e: of the layer.
        forget_bias: see `Track.changed`, as the others.
        scale_hh: a factor.
        scale_ih: a factor.
        opens: a gate that is to be shut less often; by default the gain is to come nearer to 1.
    """
    key = (opens, forget_bias, scale_hh, scale_ih)
    if key not in e.tries:
        changes = {"forget_bias": forget_bias, "scale_hh": scale_hh, "scale_ih": scale_ih}
        e.tries[key] = _try(e, changes, opens)
    return e.tries[key]


def _try(e: Evidence, changes: dict[str, float], opens: str) -> Try:
    least = LESS_SHUT if opens else TRIED_LEAST
    seconds = _seconds(e.track)
    if seconds > TRIED_SECONDS * e.share:
        return Try(math.nan, least, f"that would take about {max(1, round(seconds))} s")
    others = [b for b in range(e.track.batch) if b not in e.mapped]
    sequences = [*e.mapped, *others][:TRIED_SEQUENCES]

    def amiss(track: Track) -> float:
        """What the change is to make smaller."""
        if opens:
            return over_all((track.gates[opens] < GATE_CLOSED).double(), track.mask)
        return abs(decades(track, sequences, e.span))

    try:
        was, now = amiss(e.track), amiss(e.track.changed(**changes))
    except RecordingError as error:
        return Try(math.nan, least, str(error))
    if math.isnan(now):
        return Try(-math.inf, least)
    return Try(0.0 if was == now else was - now, least)


def decades(track: Track, sequences: list[int], span: int) -> float:
    """log10 of the gain over the span of a few random vectors, the mean over some sequences.

    Growth per step over all steps that no cut precedes, times the span; −inf where exact zeros end
    every vector of a sequence.

    >>> import torch, gradflow
    >>> rnn = torch.nn.RNN(1, 1, bias=False)
    >>> _ = torch.nn.init.constant_(rnn.weight_hh_l0, 0.1)
    >>> with gradflow.record(rnn) as recording:
    ...     rnn(torch.zeros(5, 2, 1))[0].sum().backward()
    >>> round(decades(recording["l0"], [0, 1], 10), 6)
    -10.0
    """
    operator = operator_of(track, torch.float64, sequences)
    segments, lengths = cuts_before(track)[:, sequences], track.lengths.cpu()[sequences]
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(TRIED_VECTORS, operator.size, generator=generator, dtype=torch.float64)
    block = (start / start.norm()).expand(len(sequences), -1, -1)
    total, count = torch.zeros(2, len(sequences), dtype=torch.float64)
    for t in range(1, operator.length):
        pushed = operator.push(t, block)
        size = torch.linalg.vector_norm(pushed, dim=(1, 2))
        counted = (lengths > t) & (segments[t] == segments[t - 1])
        total += torch.where(counted, size.log(), 0.0)
        count += counted
        going = (counted & (size > 0)).view(-1, 1, 1)
        block = torch.where(going, pushed / size.view(-1, 1, 1), block)
    known = (total / count)[count > 0]
    return float(known.mean()) * span / math.log(10) if len(known) else math.nan


def _seconds(track: Track) -> float:
    """Predicted: the calls again and their gates in float64, then the pushes, twice."""
    weights = sum(weight.numel() for weight in track.weights.values())
    length = int(track.lengths.max())
    again = 8.0 * length * track.batch * weights
    pushes = (
        4.0 * length * min(TRIED_SEQUENCES, track.batch) * TRIED_VECTORS * state_size(track) ** 2
    )
    return (again + pushes) / SPEED[torch.float64] + length * 4e-4
