"""The gradients that the recorded backwards brought to the weights of the recurrent layers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from gradflow.hooks.loops.loop_source import LoopSource
from gradflow.recording.tracks import Recording


@dataclass(frozen=True)
class WeightNorms:
    """Euclidean norms of ∂L/∂(recurrent and input weights, biases), as the backward left them."""

    total: float  # of all recorded layers' weights together, each weight once; NaN without any
    own: Mapping[str, float]  # track name -> norm over the weights it used


def weight_norms(recording: Recording) -> WeightNorms:
    """Norms of the gradients that arrived at the weights of all recorded recurrent layers.

    Weights outside of them (a head, an embedding) are not seen, so the norm over all parameters of
    the model is at least ``total``.
    """
    squares: dict[int, float] = {}
    own = {}
    for track in recording.values():
        source = track.source
        if not isinstance(source, LoopSource) or source.uses is None:
            continue
        caught = source.uses.caught(source.parts())
        mine = {key: float(grad.double().square().sum()) for key, grad in caught.items()}
        squares |= mine
        if mine:
            own[track.name] = math.sqrt(sum(mine.values()))
    return WeightNorms(math.sqrt(sum(squares.values())) if squares else math.nan, own)
