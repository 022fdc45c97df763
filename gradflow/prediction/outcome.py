"""What a layer's numbers are with a remedy, and whether that is better."""

from __future__ import annotations

from gradflow.analysis import LayerAnalysis
from gradflow.analyzer.brief import Brief, brief
from gradflow.errors import RecordingError
from gradflow.recording import Recording


def measured(
    recording: Recording,
    name: str,
    span: int | None = None,
    share: int = 1,
    seed: int = 0,
    sequences: tuple[int, ...] | None = None,
) -> Brief | str:
    """The numbers of a layer, or why there are none."""
    try:
        track = recording[name]
        return brief(track, span=span, share=share, seed=seed, sequences=sequences)
    except RecordingError as error:
        return str(error)


def helps(before: Brief | LayerAnalysis, after: Brief) -> float:
    """Powers of ten over the span by which the gain comes nearer to 1."""
    was, now = abs(before.gain.decades), abs(after.gain.decades)
    return 0.0 if was == now else was - now
