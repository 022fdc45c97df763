"""One place decides by the kind of a track's step maps how its gains are measured."""

from __future__ import annotations

import torch

from gradflow.analyzer import core
from gradflow.analyzer.core import Core
from gradflow.analyzer.leading import WeightGrowth
from gradflow.analyzer.linear.measure import measure_linear
from gradflow.analyzer.settings import Settings
from gradflow.cells.linear import LinearSteps
from gradflow.errors import RecordingError
from gradflow.recording import Track


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
