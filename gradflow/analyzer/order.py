"""Between input time and processing order, for padded and for reverse tracks.

Letters: T timesteps, B sequences, L a sequence's real steps, t input time, p processing index.
Forward tracks process t = p. Reverse tracks process t = L − 1 − p: their past is the larger t.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradflow.recording import Track


def input_time(track: Track) -> Tensor:
    """(T, B): the input step t that is processed at index p; T·B past a sequence's end is unused."""
    places = torch.arange(track.steps)[:, None]
    lengths = track.lengths.cpu()
    if not track.reverse:
        return places.expand(-1, track.batch)
    return torch.where(places < lengths, lengths - 1 - places, places)


def in_processing_order(track: Track, values: Tensor) -> Tensor:
    """Values (T, B, ...) from input time into processing order, on the CPU."""
    values = values.detach().cpu()
    if not track.reverse:
        return values
    index = input_time(track)
    return values[index, torch.arange(track.batch)]


def cuts_before(track: Track) -> Tensor:
    """(T, B) in processing order: how many cuts lie at or before each step.

    P(t'←t) crosses a cut where the counts at t and t' differ. The first step is no cut.
    """
    cuts = in_processing_order(track, track.cuts).clone()
    cuts[0] = False
    return cuts.int().cumsum(0)


def segment_lengths(track: Track) -> list[list[int]]:
    """Of every sequence the lengths of its stretches between cuts, in processing order, in steps.

    A sequence without a cut is one stretch; the lengths of a sequence's stretches add up to its own.
    """
    cuts = cuts_before(track)
    return [
        torch.unique_consecutive(cuts[: int(length), b], return_counts=True)[1].tolist()
        for b, length in enumerate(track.lengths.cpu())
    ]
