"""What one of several probes or batches says of every layer: verdict, gain and rate, and no more."""

from __future__ import annotations

from gradflow.analyzer.closed import judged
from gradflow.analyzer.core import Voted, voted
from gradflow.analyzer.measuring import measure
from gradflow.analyzer.rates import Vote
from gradflow.analyzer.read_states import read_part
from gradflow.analyzer.settings import checked
from gradflow.errors import RecordingError
from gradflow.process import fitting_threads
from gradflow.recording import Recording, pooled


def votes(recording: Recording, *, span: int | None, seed: int) -> dict[str, Vote]:
    """The votes that `analyze` would give, by layer, mostly at a fraction of its cost.

    A layer whose step Jacobians are not known has none.
    """
    recording, _ = pooled(recording)
    settings = checked(recording, span, seed=seed)
    found: dict[str, Vote] = {}
    for track in recording.values():
        try:
            with fitting_threads(sum(state.shape[-1] for state in track.states.values())):
                if track.state_shape:  # of a linear recurrence
                    known: Voted = measure(track, settings, withheld=True)
                else:
                    _, loop = judged(recording, track)
                    known = voted(read_part(loop).judged, settings)
        except RecordingError:
            continue
        found[track.name] = Vote(known.verdict.name, known.gain, known.rate)
    return found
