"""From the recording of one update to a `Probe`: what each preset measures of a layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from gradflow.analysis import Analysis, LayerAnalysis
from gradflow.analyzer import analyze
from gradflow.analyzer.closed import judged
from gradflow.analyzer.evidence import counted, number
from gradflow.analyzer.jacobians import state_size
from gradflow.analyzer.paced import Paced, paced, paced_linear
from gradflow.analyzer.pulse import broken, pulse
from gradflow.analyzer.read_states import read_part
from gradflow.errors import RecordingError
from gradflow.history import LayerProbe
from gradflow.limits import BAND_WORDS, GONE_WORDS
from gradflow.process import fitting_threads
from gradflow.recording import Recording, Track, pooled

Standing = Paced | LayerAnalysis  # what a rule is held against


@dataclass(frozen=True)
class MeasuredUpdate:
    """What was measured of one update."""

    layers: dict[str, LayerProbe]  # layer name -> its numbers
    cells: dict[str, str]  # layer name -> kind of cell
    standings: dict[str, Standing]  # layer name -> its verdict, where the preset gives one
    broken: dict[str, str]  # layer name -> where a NaN or Inf sits, in words
    notes: tuple[str, ...] = ()  # on what limits the numbers
    analysis: Analysis | None = None  # preset full


def measure(recording: Recording, preset: str) -> MeasuredUpdate:
    """Measure all layers of one update.

    Args:
        recording: of one update, closed.
        preset: "pulse", "rate" or "full".

    Returns:
        The numbers; a layer whose states cannot be read is left out with a note.

    Raises:
        RecordingError: nothing was recorded, or nothing can be read.
    """
    recording.require_tracks()
    recording = _of_training(recording)
    recording, _ = pooled(recording)
    notes = list(recording.notes)
    found: dict[str, LayerProbe] = {}
    standings: dict[str, Standing] = {}
    wrong: dict[str, str] = {}
    analysis = analyze(recording) if preset == "full" else None
    for track in recording.values():
        try:
            found[track.name] = pulse(track)
            bad = broken(track)
            if analysis is not None and track.name in analysis.layers:
                standings[track.name] = analysis[track.name]
            elif preset == "rate":
                with fitting_threads(state_size(track)):
                    standing = _standing(recording, track, notes)
                if standing is not None:
                    standings[track.name] = standing
        except RecordingError as error:
            notes.append(
                f"{track.name} is not in this probe: {str(error).removeprefix(f'{track.name}: ')}"
            )
            continue
        if bad is not None:
            place, kind = bad
            wrong[track.name] = f"{track.name}: the {kind} is {place.value} at {place.where}"
        values = {"nonfinite": float(bad is not None)}
        if bad is not None:
            values["nonfinite_at"] = float(bad[0].step + 1)
        found[track.name] = _with(found[track.name], values, standings.get(track.name))
    if not found:
        raise RecordingError(notes[-1])
    return MeasuredUpdate(
        layers=found,
        cells={track.name: track.cell for track in recording.values() if track.name in found},
        standings=standings,
        broken=wrong,
        notes=tuple(dict.fromkeys(notes)),
        analysis=analysis,
    )


def _of_training(recording: Recording) -> Recording:
    """Without runs that no backward reached beside others of the same layer that one did."""
    reached = {_base(track) for track in recording.values() if track.backwards}
    out = [t for t in recording.values() if not t.backwards and _base(t) in reached]
    for track in out:
        recording.drop(track)
    return recording


def _base(track: Track) -> str:
    return track.name.partition("@")[0]


def _standing(recording: Recording, track: Track, notes: list[str]) -> Paced | None:
    """A layer's verdict, where it has a recurrence whose step Jacobians are known."""
    try:
        _, loop = judged(recording, track)
        part = read_part(loop).judged
        found = paced_linear(part) if track.state_shape else paced(part)
        return replace(found, name=track.name)
    except RecordingError as error:
        notes.append(str(error))
        return None


def _with(layer: LayerProbe, values: dict[str, float], standing: Standing | None) -> LayerProbe:
    """The pulse with the numbers of a verdict."""
    if standing is None:
        return replace(layer, values=layer.values | values)
    gain, rate = standing.gain, standing.rate
    settled = standing.settled if isinstance(standing, Paced) else standing.rate_told
    rated = standing.sequences
    horizon = math.inf if standing.never_gone else math.nan
    values |= {
        "rate": rate.value,
        "rate_low": rate.low,
        "rate_high": rate.high,
        "rate_settled": float(settled),
        "gain": gain.value,
        "gain_low": gain.low,
        "gain_high": gain.high,
        "gain_steps": float(gain.steps),
        "span": float(standing.span),
        "half_life": standing.half_life,
        "horizon": horizon if standing.horizon is None else float(standing.horizon),
        "searched": float(standing.searched),
        "channels": math.nan if standing.channels is None else float(standing.channels),
        "sequences_rated": float(rated),
    }
    words = standing.sentence if isinstance(standing, LayerAnalysis) else sentence(standing)
    return replace(layer, values=layer.values | values, verdict=standing.verdict, sentence=words)


def sentence(found: Paced) -> str:
    """A verdict of a probe in words with its numbers.

    Args:
        found: of one layer.

    Returns:
        One sentence without a full stop.
    """
    said = _SAID[found.verdict](found)
    return f"{found.name} {said}"


def _changed(found: Paced) -> str:
    size, steps = number(abs(found.gain.decades)), counted(found.gain.steps, "step")
    return f"its gain {'falls' if found.gain.value < 0 else 'grows'} by {size} decades over {steps}"


def _gone(found: Paced) -> str:
    if found.horizon is None:
        return (
            f" and is still above {GONE_WORDS} after the {counted(found.searched, 'step')} measured"
        )
    return f" and is gone in every direction after {counted(found.horizon, 'step')}"


def _open(found: Paced) -> str:
    if "not finite" in found.labels:
        return "cannot be judged: its states are not finite"
    if math.isnan(found.gain.value):
        return "cannot be judged: it has no steps to measure"
    return f"is undecided: {_changed(found)}, within an interval that reaches across {BAND_WORDS}"


_SAID: dict[str, Callable[[Paced], str]] = {
    "vanishing": lambda found: f"vanishes: {_changed(found)}{_gone(found)}",
    "exploding": lambda found: f"explodes: {_changed(found)}",
    "stable": lambda found: f"is stable: {_changed(found)}, less than {BAND_WORDS}",
    "dead": lambda found: "is dead: exact zeros or cuts let nothing through",
    "inconclusive": _open,
}


def all_gone(recording: Recording) -> bool:
    """Whether some gradient of the parameters is not finite: an update that a scaler skips.

    Args:
        recording: of one update.
    """
    return any(
        track.has_gradient and not all(bool(torch.isfinite(g.sum())) for g in track.grads.values())
        for track in recording.values()
    )
