"""What the loss reads of a layer: at which steps of which sequences, told from exact zeros alone.

Letters: T timesteps, B sequences, L a sequence's real steps. A gradient *arrives* where it comes to
a state from outside the layer's own recurrence; it is *total* where it comes at all.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from gradflow.analyzer.order import in_processing_order
from gradflow.errors import RecordingError
from gradflow.limits import BLANKS
from gradflow.recording import Recording, Track

UNREAD = "unread"  # no gradient comes
ONE_SEQUENCE = "one sequence"  # of one sequence, the first or the last, every step
PACKED_ROWS = "packed rows"  # of packed sequences only the longest
FIRST_STEP = "first step"  # only the step at which the layer starts
AFTER_END = "after end"  # only steps past a sequence's last real one
FEW_SEQUENCES = "few sequences"  # at most half of the sequences get a gradient


@dataclass(frozen=True)
class Reading:
    """Which steps of which sequences the loss reads, and what is amiss with that."""

    kind: str = ""  # one of the above, "" where nothing is amiss or nothing is known
    sequences: tuple[int, ...] = ()  # that get a gradient; of AFTER_END those read after their end
    padding: int = 0  # AFTER_END: median steps from the last real one to the first that is read
    told: bool = True  # AFTER_END: whether the lengths were given, not seen at the input
    still: bool = False  # FIRST_STEP: whether nothing at all comes to the recurrent weights
    bidirectional: bool = False  # whether the module has a track of the other direction
    # a layer above of which the loss reads the wrong steps, and what is amiss there
    under: tuple[str, str] = ("", "")

    @property
    def amiss(self) -> bool:
        """Whether the loss reads the wrong steps, here or of a layer above: no remedy helps first."""
        return (self.kind or self.under[1]) not in ("", FEW_SEQUENCES)


def readings(recording: Recording) -> dict[str, Reading]:
    """The reading of every layer, by its name."""
    seen = _seen_lengths(recording)
    found = {track.name: _known(track, seen.get(track.name)) for track in recording}
    names = set(found)
    for track in recording:
        other = track.name.replace("_reverse", "")
        both = {other, _other_direction(other)} <= names
        above = next((n for n in _all_above(track, recording) if found[n].amiss), "")
        under = (above, found[above].kind) if above else ("", "")
        found[track.name] = replace(found[track.name], bidirectional=both, under=under)
    return found


def _known(track: Track, seen_lengths: Tensor | None) -> Reading:
    """The reading, or one that says nothing where the layer's numbers are not to be had."""
    try:
        return reading(track, seen_lengths)
    except RecordingError:
        return Reading()


def reading(track: Track, seen_lengths: Tensor | None = None) -> Reading:
    """Where the loss reaches one layer.

    Args:
        track: one layer in one direction.
        seen_lengths: (B,) real steps as its input shows them, where no lengths were given.

    >>> import torch, gradflow
    >>> lstm = torch.nn.LSTM(2, 3, bidirectional=True)
    >>> with gradflow.record(lstm) as recording:
    ...     lstm(torch.randn(9, 4, 2))[0][-1].sum().backward()
    >>> reading(recording["l0"]).kind, reading(recording["l0_reverse"]).kind
    ('', 'first step')
    """
    if not track.has_gradient:
        return Reading(UNREAD) if track.unread else Reading()
    total = _total(track)
    arriving = None if track.arriving is None else in_processing_order(track, track.arriving)
    raw = None if track.arriving is None else track.arriving.cpu()  # input time, padding too
    some = total.any(0) if raw is None else total.any(0) | raw.any(0)
    if not bool(some.any()):
        return Reading(UNREAD)
    sequences = tuple(np.flatnonzero(some.numpy()).tolist())
    lengths = track.lengths.cpu()
    if arriving is not None and _one_whole_sequence(some, arriving, lengths):
        return Reading(ONE_SEQUENCE, sequences)
    if raw is not None and _only_the_longest(some, raw, lengths):
        return Reading(PACKED_ROWS, sequences)
    if _only_the_first_step(track, total, raw):
        return Reading(FIRST_STEP, sequences, still=_weights_still(track, total))
    ends = seen_lengths if seen_lengths is not None else lengths
    after = None if raw is None else _after_end(raw, ends)
    if after is not None:
        late, padding = after
        return Reading(AFTER_END, late, padding, told=seen_lengths is None)
    return Reading(FEW_SEQUENCES if 2 * len(sequences) <= track.batch else "", sequences)


def _total(track: Track) -> Tensor:
    """(T, B) in processing order: whether any gradient comes to a real step."""
    found = torch.zeros(track.steps, track.batch, dtype=torch.bool)
    for grad in track.grads.values():
        found |= (in_processing_order(track, grad) != 0).any(-1)
    return found & (torch.arange(track.steps)[:, None] < track.lengths.cpu())


def _weights_still(track: Track, total: Tensor) -> bool:
    """Whether ∂L/∂W_hh is exactly 0; of weights that were not seen: whether nothing crosses a step."""
    trains = track.trains_recurrence
    return not bool(total[1:].any()) if trains is None else not trains


def _one_whole_sequence(some: Tensor, arriving: Tensor, lengths: Tensor) -> bool:
    """Whether a single sequence, the first or the last of several, is read at each of its steps."""
    only = np.flatnonzero(some.numpy()).tolist()
    if len(some) < 3 or len(only) != 1 or only[0] not in (0, len(some) - 1):
        return False
    steps = int(lengths[only[0]])
    return steps > 1 and bool(arriving[:steps, only[0]].all())


def _only_the_longest(some: Tensor, raw: Tensor, lengths: Tensor) -> bool:
    """Whether of sequences of several lengths only the longest are read, at one step: their last."""
    longest = lengths == lengths.max()
    at_last = not bool(raw[: int(lengths.max()) - 1].any())
    return bool((some == longest).all()) and not bool(longest.all()) and at_last


def _only_the_first_step(track: Track, total: Tensor, raw: Tensor | None) -> bool:
    """Whether the layer's first processed step, or padding it ran through before, is all that is read."""
    if bool(total[1:].any()) or int(track.lengths.max()) < 2:
        return False
    if track.reverse and raw is not None:  # the kernel started at the last step of the padding
        return bool(total[0].any()) or not bool(raw[:-1].any())
    return bool(total[0].any()) and bool(total[0][track.lengths.cpu() > 1].any())


def _after_end(raw: Tensor, lengths: Tensor) -> tuple[tuple[int, ...], int] | None:
    """Sequences that are read only past their end, and the median steps of padding before that.

    Of all that are read, or, where most are read rightly, of those that are not.
    """
    steps = torch.arange(len(raw))[:, None]
    read = raw.any(0)
    first = torch.where(raw, steps, torch.full_like(steps, len(raw))).amin(0)
    late = read & (first >= lengths)
    if not bool(late.any()):
        return None
    behind = (first - (lengths - 1)).clamp_min(0)
    middle = int(behind[read].median()) or int(behind[late].median())
    return tuple(np.flatnonzero(late.numpy()).tolist()), middle


# ------------------------------------------------------------------------------ padding at the input


def _seen_lengths(recording: Recording) -> dict[str, Tensor]:
    """Track name -> (B,) real steps, of every layer whose input, or whose stack's input, is padded."""
    known = {track.name: track for track in recording if _has_inputs(track)}
    found: dict[str, Tensor] = {}
    for name, track in known.items():
        lengths = padded_lengths(track)
        if lengths is not None:
            found[name] = lengths
    if not found:
        return {}
    for name, track in known.items():  # in the order in which they ran: the lower ones first
        if name not in found:
            bottom = re.sub(r"l\d+(_reverse)?(@\d+)?$", r"l0\2", name)
            below = bottom if bottom in found else _read_from(track, known, found)
            if below:
                found[name] = found[below]
    return found


def _has_inputs(track: Track) -> bool:
    try:
        return track.has_inputs
    except RecordingError:  # its replay is not to be had
        return False


def _read_from(track: Track, every: Mapping[str, Track], known: Mapping[str, Tensor]) -> str:
    """The name of a layer with known lengths whose states this one reads as they are, or ""."""
    for name in known:
        other = every[name]
        if other is track or "h" not in other.states or other.mask.shape != track.mask.shape:
            continue
        width = other.h.shape[-1]
        if width <= track.inputs.shape[-1] and torch.equal(track.inputs[..., :width], other.h):
            return name
    return ""


def padded_lengths(track: Track) -> Tensor | None:
    """(B,) steps before the tail of equal rows that the input of every padded sequence ends with.

    None where lengths are known, or the input does not look padded: the row of the tails must be the
    same in all sequences, must hardly occur before them, and the tails must differ in length.

    >>> import torch, gradflow
    >>> x = torch.randn(9, 3, 2)
    >>> x[4:, 0], x[6:, 1] = 0.0, 0.0
    >>> rnn = torch.nn.RNN(2, 3)
    >>> with gradflow.record(rnn) as recording:
    ...     rnn(x)[0][-1].sum().backward()
    >>> padded_lengths(recording["l0"]).tolist()
    [4, 6, 9]
    """
    if not track.has_inputs or bool((track.lengths.cpu() < track.steps).any()) or track.steps < 3:
        return None
    x = track.inputs.detach().cpu()
    tails = _tail(x, x[-1])
    padded = np.flatnonzero((tails > 1).numpy())
    if len(padded) == 0:
        return None
    row = x[-1, int(padded[0])]
    blank = (x == row).all(-1)
    tails = torch.where(blank[-1], _tail(x, row.expand_as(x[-1])), 0)
    lengths = track.steps - tails
    before = blank & (torch.arange(track.steps)[:, None] < lengths)
    same_row = bool((tails > 0)[torch.as_tensor(padded)].all())
    if not same_row or int(lengths.min()) < 1 or bool((lengths == lengths[0]).all()):
        return None
    return None if float(before.sum()) > BLANKS * float(lengths.sum()) else lengths


def _tail(x: Tensor, row: Tensor) -> Tensor:
    """(B,) how many rows at the end of x (T, B, I) equal the given ones (B, I)."""
    same = (x == row).all(-1)
    return same.flip(0).int().cumprod(0).sum(0)


# ------------------------------------------------------------------------------------------ a stack


def _other_direction(name: str) -> str:
    base, at, run = name.partition("@")
    return f"{base}_reverse{at}{run}"


def _all_above(track: Track, recording: Recording) -> list[str]:
    """Names of all layers of the same stack that read this one, directly or not."""
    found: list[str] = []
    waiting = list(track.above)
    while waiting:
        name = waiting.pop()
        if name in recording.tracks and name not in found:
            found.append(name)
            waiting += recording[name].above
    return found
