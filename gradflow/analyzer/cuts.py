"""The steps at which a layer's state is cut off from its past."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from gradflow.analyzer.order import cuts_before, in_processing_order, input_time, segment_lengths
from gradflow.recording import Track


def cut_steps(track: Track) -> list[int]:
    """Input steps, from 0, at which nothing of the previous state arrives in some sequence.

    A loop that marks its states may start from a constant: its second state is then cut off from the
    first, which is no cut of the user's and is said in a note. Neither is one where a sequence of a
    padded batch begins later than others, see `begins_late`.
    """
    steps = sorted(set(input_time(track)[_cuts(track)].tolist()))
    return [] if track.cell == "tap" and steps == [1] else steps


def _cuts(track: Track) -> Tensor:
    """(T, B) true at the user's cuts, in processing order."""
    inside = cuts_before(track).diff(dim=0, prepend=torch.zeros(1, track.batch).int()) > 0
    inside &= torch.arange(track.steps)[:, None] < track.lengths.cpu()
    return inside & ~begins_late(track, inside)


def in_some_sequences(track: Track) -> bool:
    """Whether a cut takes some of the sequences that go on there and not all, as a done mask does."""
    cut = _cuts(track).sum(1)
    going_on = (torch.arange(track.steps)[:, None] < track.lengths.cpu()).sum(1)
    return bool(((cut > 0) & (cut < going_on)).any())


def typical_length(track: Track) -> int:
    """The median of the sequences' lengths, in steps."""
    return max(1, round(float(track.lengths.cpu().double().quantile(0.5))))


def typical_segment(track: Track) -> int:
    """Half of all steps lie in stretches between cuts at least so long; 0 where nothing is cut.

    0 also where every step is cut off: then there is no stretch to look back over.
    """
    if not cut_steps(track):
        return 0
    lengths = np.sort([length for some in segment_lengths(track) for length in some])[::-1]
    typical = int(lengths[np.searchsorted(np.cumsum(lengths), lengths.sum() / 2)])
    return typical if typical > 1 else 0


def begins_late(track: Track, inside: Tensor) -> Tensor:
    """(T, B) cuts behind steps of which nothing is used: the sequence begins there.

    So it is where masked updates keep the first state: torch.where(mask, new, h0). Each of the first
    steps of such a sequence is cut off from the next and no gradient reaches any of them, while another
    sequence goes on.

    Args:
        track: whose cuts they are.
        inside: (T, B) the cuts, in processing order.
    """
    none = torch.zeros_like(inside)
    if not bool(inside[1:2].any()) or not track.has_gradient:
        return none
    grads = [in_processing_order(track, grad) for grad in track.grads.values()]
    reached = torch.stack([(grad != 0).flatten(2).any(2) for grad in grads]).any(0)
    from_the_first = torch.cat([torch.ones_like(inside[:1]), inside[1:]]).int().cumprod(0).bool()
    unused = torch.cat([none[:1], ~reached[:-1]]).int()
    unused[1:] = unused[1:].cumprod(0)
    real = torch.arange(track.steps)[:, None] < track.lengths.cpu()
    of_all = (inside | ~real).all(dim=1, keepdim=True)
    return inside & from_the_first & unused.bool() & ~of_all
