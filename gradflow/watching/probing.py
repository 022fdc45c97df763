"""From the recording of one update to a `Probe`: what each preset measures of a layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradflow.analysis import Analysis, LayerAnalysis
from gradflow.analyzer import analyze
from gradflow.analyzer.closed_loops import judged
from gradflow.analyzer.evidence import counted, number
from gradflow.analyzer.jacobians import state_size
from gradflow.analyzer.measuring import is_linear
from gradflow.analyzer.paced import Paced, paced, paced_linear, sent, spread_places, usual_span
from gradflow.analyzer.pulse import LayerSums, broken, layer_sums, pulse_of
from gradflow.analyzer.read_states import read_part
from gradflow.distributed import can_be_sent
from gradflow.errors import RecordingError
from gradflow.history import LayerProbe, lag_grid
from gradflow.limits import BAND_WORDS, GONE_WORDS
from gradflow.process import fitting_threads, without_modes
from gradflow.recording import Recording, Track, as_one, pooled

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


@dataclass(frozen=True)
class SeenLayer:
    """What one process saw of a layer in one update, and hands on to the one that writes."""

    cell: str  # kind of cell
    sums: LayerSums  # what its pulse is made from
    wrong: str = ""  # where a NaN or Inf sits, in words
    wrong_step: int = 0  # the time step, counted from 1
    judged: tuple[Track, ...] = ()  # what a verdict rests on, one behind the other as sequences


@dataclass(frozen=True)
class SeenUpdate:
    """What one process saw of one update."""

    layers: dict[str, SeenLayer]  # layer name -> what it saw
    lengths: dict[str, Tensor]  # layer name -> (B,) real steps, of all processes
    notes: tuple[str, ...]  # on what limits the numbers
    analysis: Analysis | None = None  # preset full


def ready(recording: Recording) -> Recording:
    """The recording of an update with the runs of one layer as one.

    Raises:
        RecordingError: nothing was recorded.
    """
    recording.require_tracks()
    return pooled(recording)[0]


def layer_lengths(recording: Recording) -> dict[str, Tensor]:
    """Layer name -> (B,) real steps."""
    return {track.name: track.lengths.cpu() for track in recording.values()}


def lengths_of(parts: Sequence[dict[str, Tensor]]) -> dict[str, list[Tensor]]:
    """Layer name -> (B,) real steps of it in each process, none where it did not run."""
    names = dict.fromkeys(name for part in parts for name in part)
    none = torch.zeros(0, dtype=torch.long)
    return {name: [part.get(name, none) for part in parts] for name in names}


def measure(recording: Recording, preset: str, span: int | None = None) -> MeasuredUpdate:
    """Measure all layers of one update of one process.

    Args:
        recording: of one update, closed.
        preset: "pulse", "rate" or "full".
        span: the distance of interest in steps; by default as of `analyze`.

    Raises:
        RecordingError: nothing was recorded, or nothing can be read.
    """
    recording = ready(recording)
    lengths = lengths_of([layer_lengths(recording)])
    return joined([seen(recording, preset, lengths, 0, span)], span)


@without_modes
def seen(
    recording: Recording,
    preset: str,
    lengths: dict[str, list[Tensor]],
    rank: int,
    span: int | None = None,
) -> SeenUpdate:
    """What this process saw of an update.

    Args:
        recording: its own, ready.
        preset: "pulse", "rate" or "full".
        lengths: of all processes.
        rank: its place among them.
        span: the distance of interest in steps; by default as of `analyze`.

    Raises:
        RecordingError: of no layer anything can be read.
    """
    notes = list(recording.notes)
    found: dict[str, SeenLayer] = {}
    analysis = analyze(recording, span=span) if preset == "full" else None
    for track in recording.values():
        try:
            lags = lag_grid(int(max(int(one.max()) for one in lengths[track.name] if len(one))))
            sums, bad = layer_sums(track, lags), broken(track)
            part: tuple[Track, ...] = ()
            if preset == "rate":
                with fitting_threads(state_size(track)):
                    part = _judged(recording, track, lengths[track.name], rank, notes)
        except RecordingError as error:
            notes.append(
                f"{track.name} is not in this probe: {str(error).removeprefix(f'{track.name}: ')}"
            )
            continue
        one = SeenLayer(track.cell, sums, judged=part)
        if bad is not None:
            place, kind = bad
            words = f"{track.name}: the {kind} is {place.value} at {place.where}"
            words += f" on rank {rank}" if len(lengths[track.name]) > 1 else ""
            one = replace(one, wrong=words, wrong_step=place.step + 1)
        found[track.name] = one
    if not found:
        raise RecordingError(notes[-1])
    whole = {name: torch.cat(some) for name, some in lengths.items()}
    return SeenUpdate(found, whole, tuple(notes), analysis)


def _judged(
    recording: Recording, track: Track, lengths: list[Tensor], rank: int, notes: list[str]
) -> tuple[Track, ...]:
    """What a verdict rests on, where the layer's step Jacobians are known; of several processes, what
    one of them brings to it."""
    try:
        part = read_part(judged(recording, track)[1]).judged
        if len(lengths) == 1:
            return (part,)
        before = sum(map(len, lengths[:rank]))
        every = spread_places(sum(map(len, lengths)), state_size(part))
        runs = tuple(sent(part, [b - before for b in every if 0 <= b - before < part.batch]))
        if not can_be_sent(runs):
            notes.append(
                f"{track.name}: its verdict is of other processes' sequences than those of rank {rank}, "
                "whose steps cannot be sent"
            )
        return runs if can_be_sent(runs) else ()
    except RecordingError as error:
        notes.append(str(error))
        return ()


def joined(parts: Sequence[SeenUpdate], span: int | None = None) -> MeasuredUpdate:
    """The numbers of one update from what each process saw of it.

    Args:
        parts: of each, in the order of their ranks.
        span: the distance of interest in steps; by default as of `analyze`.
    """
    notes = list(dict.fromkeys(note for part in parts for note in part.notes))
    names = dict.fromkeys(name for part in parts for name in part.layers)
    found: dict[str, LayerProbe] = {}
    standings: dict[str, Standing] = {}
    wrong: dict[str, str] = {}
    cells: dict[str, str] = {}
    for name in names:
        each = [part.layers[name] for part in parts if name in part.layers]
        lengths = parts[0].lengths[name]
        probe = pulse_of([one.sums for one in each], lag_grid(int(lengths.max())))
        bad = [one for one in each if one.wrong]
        values = {"nonfinite": float(bool(bad))}
        if bad:
            wrong[name], values["nonfinite_at"] = bad[0].wrong, float(bad[0].wrong_step)
        analysis = parts[0].analysis
        if analysis is not None and name in analysis.layers:
            standings[name] = analysis[name]
        elif any(one.judged for one in each):
            runs = [run for one in each for run in one.judged]
            standing = _standing(name, runs, lengths, span, notes)
            standings |= {} if standing is None else {name: standing}
        found[name], cells[name] = _with(probe, values, standings.get(name)), each[0].cell
    return MeasuredUpdate(
        layers=found,
        cells=cells,
        standings=standings,
        broken=wrong,
        notes=tuple(dict.fromkeys(notes)),
        analysis=parts[0].analysis,
    )


def _standing(
    name: str, runs: list[Track], lengths: Tensor, span: int | None, notes: list[str]
) -> Paced | None:
    """A layer's verdict, where it has a recurrence whose step Jacobians are known."""
    try:
        with fitting_threads(state_size(runs[0])):
            part = as_one(runs)
            span = span or usual_span(part, lengths)
            linear = part.state_shape and is_linear(part)
            found = paced_linear(part, span=span) if linear else paced(part, span=span)
        return replace(found, name=name)
    except RecordingError as error:
        notes.append(str(error))
        return None


def _with(layer: LayerProbe, values: dict[str, float], standing: Standing | None) -> LayerProbe:
    """The pulse with the numbers of a verdict."""
    if standing is None:
        return replace(layer, values=layer.values | values)
    gain, rate = standing.gain, standing.rate
    if isinstance(standing, Paced):
        settling, settled = standing.settling, standing.settled
    else:
        settling, settled = float(standing.data["rate_settling"]), standing.rate_told
    rated = standing.sequences
    horizon = math.inf if standing.never_gone else math.nan
    values |= {
        "rate": rate.value,
        "rate_low": rate.low,
        "rate_high": rate.high,
        "rate_settling": settling,
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
