"""The steps at which a layer's state is cut off from its past."""

from __future__ import annotations

import torch

from gradflow.analyzer.order import cuts_before, input_time
from gradflow.recording import Track


def cut_steps(track: Track) -> list[int]:
    """Input steps, from 0, at which nothing of the previous state arrives in some sequence.

    A loop that marks its states may start from a constant: its second state is then cut off from the
    first, which is no cut of the user's and is said in a note.
    """
    inside = cuts_before(track).diff(dim=0, prepend=torch.zeros(1, track.batch).int()) > 0
    inside &= torch.arange(track.steps)[:, None] < track.lengths.cpu()
    steps = sorted(set(input_time(track)[inside].tolist()))
    return [] if track.cell == "tap" and steps == [1] else steps
