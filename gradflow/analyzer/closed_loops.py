"""Layers in closed loops: judged by the joint state, with what they do alone beside it.

Where a layer's next input depends on its own earlier state, the step Jacobian of its own equations is
not that of anything the loss sees. Gains, rate and verdict are then those of the whole step, under the
name of the layer where its state is the whole of what goes around, else under that of the track that
holds the joint state. Nothing that rests on the layer's own equations (the four paths of an LSTM, the
factors of an RNN's rate, advice on its weights) is said of such a loop.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from gradflow.analysis.results import Alone, LayerAnalysis
from gradflow.analyzer.evidence import counted, number
from gradflow.analyzer.measuring import Brief, brief
from gradflow.analyzer.settings import Settings
from gradflow.cells import IN_LOOP
from gradflow.errors import RecordingError
from gradflow.recording.source import Operator, WrappedSource
from gradflow.recording.track import Track
from gradflow.recording.tracks import Recording


@dataclass(frozen=True, eq=False)
class _Judged(WrappedSource):
    """What a layer's track reads, but for the step Jacobians: those of the loop it is a part of."""

    loop: Track

    def operator(self, dtype: torch.dtype, sequences: torch.Tensor) -> Operator:
        return self.loop.operator(dtype, sequences)


def judged(recording: Recording, track: Track) -> tuple[Track, Track]:
    """A track as it is shown, and the track whose gains decide: outside closed loops both are itself."""
    if track.alone is None and not track.loop:
        return track, track
    kind = track.cell if track.spec is None else track.spec.kind
    shown = replace(track, cell=f"{kind}{IN_LOOP}", weights={})
    loop = recording.tracks.get(track.loop)
    if loop is None or (loop.steps, loop.batch) != (track.steps, track.batch):
        return shown, shown
    return replace(shown, source=_Judged(track.source, loop)), loop


def with_alone(track: Track, layer: LayerAnalysis, settings: Settings) -> LayerAnalysis:
    """The layer with what it is part of, and with its numbers alone, its inputs held fixed."""
    said = layer.sentence.removeprefix(layer.name)
    if "no gains" in layer.labels:
        said = said.partition(f"; recording[{track.name!r}].alone")[0]  # that is said beside it
    if track.loop and "no gains" not in layer.labels:
        said = f", a part of {track.loop},{said}"
    if track.inputs_unknown:
        said += f" ({track.inputs_unknown})"
    alone = None if track.alone is None else _alone(track.alone, layer, settings)
    return replace(layer, sentence=layer.name + said, alone=alone, part_of=track.loop)


def _alone(track: Track, layer: LayerAnalysis, settings: Settings) -> Alone | None:
    try:
        found = brief(track, span=layer.span, share=2 * settings.layers, seed=settings.seed)
    except RecordingError:  # its own step Jacobians are not known either
        return None
    words = (
        f"{layer.name} alone, its inputs held fixed, which is not what the loss sees, "
        f"{_alone_words(found)}"
    )
    numbers = found.rate, found.half_life, found.horizon, found.searched, found.channels
    return Alone(*numbers, found.gain, words)


def _alone_words(found: Brief) -> str:
    """As of a verdict: the gain over the span, and where it is gone."""
    if math.isnan(found.gain.value):
        return "has no step to measure"
    verb = "lose" if found.gain.value < 0 else "win"
    size = number(abs(found.gain.decades))
    changes = f"would {verb} {size} decades over {counted(found.gain.steps, 'step')}"
    if math.isinf(found.gain.value):
        changes = f"would let nothing through {counted(found.gain.steps, 'step')}"
    if found.horizon is None:
        return f"{changes}, and not be gone in every direction within {counted(found.searched, 'step')}"
    return f"{changes}, and be gone in every direction after {counted(found.horizon, 'step')}"


def told_once(recording: Recording, layers: dict[str, LayerAnalysis]) -> dict[str, LayerAnalysis]:
    """What is found of a whole loop is said of the loop, not again of every layer in it.

    The loop is named together with its parts.
    """
    found = dict(layers)
    for name, layer in layers.items():
        loop = layers.get(recording[name].loop)
        if loop is not None:
            of_the_loop = {finding.name for finding in loop.findings}
            rest = tuple(f for f in layer.findings if f.name not in of_the_loop)
            found[name] = replace(layer, findings=rest)
    for name, layer in layers.items():
        parts = [one.name for one in layers.values() if one.part_of == name]
        if parts:
            over = f"{name} (over {', '.join(parts)})"
            found[name] = replace(found[name], sentence=over + layer.sentence.removeprefix(name))
    return found
