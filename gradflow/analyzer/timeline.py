"""A layer's steps: in which order they are processed, where they are cut off, where the first NaN sits.

Letters: T timesteps, B sequences, L a sequence's real steps, t input time, p processing index.
Forward tracks process t = p. Reverse tracks process t = L − 1 − p: their past is the larger t.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradflow.recording.track import CUT_KINDS, Track


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


def kinds_of_cuts(track: Track) -> list[tuple[str, bool]]:
    """What the user's cuts are, as far as that is known, and whether each kind takes but some sequences."""
    cut = _cuts(track)
    kinds = torch.zeros_like(cut, dtype=torch.int8)
    if track.cut_kinds is not None:
        kinds = in_processing_order(track, track.cut_kinds)
    masked, zeros = (CUT_KINDS.index(name) for name in ("masked with zeros", "reset to zeros"))
    if bool((cut & (kinds == masked)).any()):  # the mask of states that were detached before
        kinds = torch.where(kinds == zeros, masked, kinds)
    going_on = (torch.arange(track.steps)[:, None] < track.lengths.cpu()).sum(1)
    found = []
    for kind in kinds[cut].unique().tolist():
        here = (cut & (kinds == kind)).sum(1)
        # of all that are detached at once some may be masked as well
        taken = cut.sum(1) if CUT_KINDS[kind] == "detached" else here
        found.append((CUT_KINDS[kind], bool(((here > 0) & (taken < going_on)).any())))
    return found


def cut_words(track: Track) -> str:
    """What the cuts are and whom they take: "detached in all sequences at once"."""
    said = []
    for kind, some in kinds_of_cuts(track):
        whom = "some sequences at a time" if some else "all sequences at once"
        masks = ", as done masks do" if some and kind.startswith("masked") else ""
        said.append(kind or "detached, masked or reset")
        said[-1] += f" in {whom}{masks}" if track.batch > 1 else ""
    return "; ".join(said)


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
    sequence goes on. inside are the cuts (T, B), in processing order.
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


@dataclass(frozen=True)
class Bad:
    """One entry that is not finite; indices from 0, the step in input time."""

    name: str  # of the state
    step: int
    sequence: int
    unit: int
    value: str  # "NaN", "inf", "-inf"

    @property
    def where(self) -> str:
        """Its place in words, counted from 1."""
        return f"step {self.step + 1}, sequence {self.sequence + 1}, unit {self.unit + 1}"


def first_not_finite(
    track: Track, tensors: Mapping[str, Tensor], *, backward: bool = False
) -> Bad | None:
    """The first entry on a real step that is NaN or Inf; backward, the one processed last.

    At the same step the tensor named first wins.
    """
    real = torch.arange(track.steps)[:, None] < track.lengths.cpu()
    first: tuple[int, str, int, int] | None = None
    for name, values in tensors.items():
        bad = in_processing_order(track, ~torch.isfinite(values)) & real[..., None]
        hits = bad.nonzero()
        if len(hits) == 0:
            continue
        place = int(hits[:, 0].max() if backward else hits[:, 0].min())
        if first is None or (place > first[0] if backward else place < first[0]):
            sequence, unit = (int(n) for n in hits[hits[:, 0] == place][0, 1:])
            first = (place, name, sequence, unit)
    if first is None:
        return None
    place, name, sequence, unit = first
    step = int(track.lengths[sequence]) - 1 - place if track.reverse else place
    value = f"{float(tensors[name][step, sequence, unit]):g}".replace("nan", "NaN")
    return Bad(name, step, sequence, unit, value)


@dataclass(frozen=True)
class Origin:
    """Where what is not finite came in from."""

    what: str
    advice: str
    code: str


def bad_weight(track: Track) -> Origin | None:
    """The first weight that holds NaN or Inf."""
    for name, weight in track.weights.items():
        places = (~torch.isfinite(weight)).nonzero()
        if len(places):
            value = f"{float(weight[tuple(places[0])]):g}".replace("nan", "NaN")
            # as Python finds it: people paste this behind the weight's name
            spot = ", ".join(str(int(n)) for n in places[0])
            count = "one entry" if len(places) == 1 else f"{len(places)} entries"
            return Origin(
                f"{name} holds {count} that {'is' if len(places) == 1 else 'are'} not finite "
                f"({name}[{spot}] is {value})",
                "the weights themselves are broken: go back to an earlier checkpoint, and clip the "
                "gradient or lower the learning rate from there",
                "torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)",
            )
    return None


def bad_input(track: Track) -> Origin | None:
    """The first NaN or Inf in what the layer read, where that was seen."""
    if not track.has_inputs:
        return None
    bad = first_not_finite(track, {"the input": track.inputs})
    if bad is None:
        return None
    return Origin(
        f"the layer's input is {bad.value} at step {bad.step + 1} of sequence {bad.sequence + 1}, "
        f"feature {bad.unit + 1}",
        "clean the data, or find the layer before this one that makes it",
        "print((~torch.isfinite(x)).nonzero())  # every place where x is not finite",
    )


def bad_start(track: Track) -> Origin | None:
    """The first NaN or Inf in the initial state."""
    for name, values in track.initial.items():
        places = (~torch.isfinite(values)).nonzero()
        if len(places):
            sequence, unit = (int(n) for n in places[0])
            value = f"{float(values[sequence, unit]):g}".replace("nan", "NaN")
            return Origin(
                f"the initial state {name} is {value} in sequence {sequence + 1}, unit {unit + 1}",
                "find what made the state that is handed over: the end of the batch before this one?",
                "",
            )
    return None


def bad_state(track: Track) -> Bad | None:
    """The first NaN or Inf of the forward pass, None without one; c, which makes h, before h."""
    main = {track.main_state: track.states[track.main_state]}
    return first_not_finite(track, main | track.seen_states)


def bad_gradient(track: Track) -> Bad | None:
    """The first NaN or Inf of the backward pass, None without one."""
    return first_not_finite(track, track.grads, backward=True) if track.has_gradient else None


def arrives(track: Track, bad: Bad) -> bool:
    """Whether a bad gradient is already in what reaches h from outside this layer's recurrence."""
    if not track.has_direct:
        return False
    return not bool(torch.isfinite(track.grad_h_direct[bad.step, bad.sequence]).all())
