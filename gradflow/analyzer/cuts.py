"""The steps at which a layer's state is cut off from its past."""

from __future__ import annotations

import torch
from torch import Tensor

from gradflow.analyzer.order import cuts_before, in_processing_order, input_time
from gradflow.recording import Track


def cut_steps(track: Track) -> list[int]:
    """Input steps, from 0, at which nothing of the previous state arrives in some sequence.

    A loop that marks its states may start from a constant: its second state is then cut off from the
    first, which is no cut of the user's and is said in a note. Neither is one where a sequence of a
    padded batch begins later than others, see `begins_late`.
    """
    inside = cuts_before(track).diff(dim=0, prepend=torch.zeros(1, track.batch).int()) > 0
    inside &= torch.arange(track.steps)[:, None] < track.lengths.cpu()
    inside &= ~begins_late(track, inside)
    steps = sorted(set(input_time(track)[inside].tolist()))
    return [] if track.cell == "tap" and steps == [1] else steps


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
