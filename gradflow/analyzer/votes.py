"""What one of several probes says of every layer: its verdict, its gain and its rate, and no more."""

from __future__ import annotations

from dataclasses import dataclass

from gradflow.analysis import Gain, Rate
from gradflow.analyzer.closed import judged
from gradflow.analyzer.core import voted
from gradflow.analyzer.read_states import read_part
from gradflow.analyzer.settings import checked
from gradflow.errors import RecordingError
from gradflow.process import fitting_threads
from gradflow.recording import Recording, pooled


@dataclass(frozen=True)
class Vote:
    """The numbers of a verdict that several probes must agree on."""

    verdict: str
    gain: Gain
    rate: Rate


def votes(recording: Recording, *, span: int | None, seed: int) -> dict[str, Vote] | None:
    """The votes that `analyze` would give, by layer, at a fraction of its cost.

    None where a layer is not measured in this way: its step Jacobians are not known, or are those of
    a linear recurrence.
    """
    recording, _ = pooled(recording)
    settings = checked(recording, span, None, 1, "auto", None, seed, None)
    found: dict[str, Vote] = {}
    for track in recording.values():
        if track.state_shape:
            return None
        try:
            with fitting_threads(sum(state.shape[-1] for state in track.states.values())):
                _, loop = judged(recording, track)
                known = voted(read_part(loop).judged, settings)
        except RecordingError:
            return None
        found[track.name] = Vote(known.verdict.name, known.gain, known.rate)
    return found
