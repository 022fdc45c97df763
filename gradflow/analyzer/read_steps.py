"""What the loss reads of a layer: at which steps of which sequences, told from exact zeros alone.

Letters: T timesteps, B sequences, L a sequence's real steps. A gradient *arrives* where it comes to
a state from outside the layer's own recurrence; it is *total* where it comes at all.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from gradflow.analyzer.timeline import in_processing_order
from gradflow.errors import RecordingError
from gradflow.limits import STATES_ALIKE
from gradflow.recording.padding import Padding, padding_of
from gradflow.recording.track import Track
from gradflow.recording.tracks import Recording

UNREAD = "unread"  # no gradient comes
ONE_SEQUENCE = "one sequence"  # of one sequence, the first or the last, every step
PACKED_ROWS = "packed rows"  # of packed sequences only the longest
FIRST_STEP = "first step"  # only the step at which the layer starts
AFTER_END = "after end"  # only steps past a sequence's last real one
SURE = "told from what the model was given, which holds padding from there on"
SEEMS = "told from the input, which repeats one row from there on"
FEW_SEQUENCES = "few sequences"  # at most half of the sequences get a gradient


@dataclass(frozen=True)
class Reading:
    """Which steps of which sequences the loss reads, and what is amiss with that."""

    kind: str = ""  # one of the above, "" where nothing is amiss or nothing is known
    sequences: tuple[int, ...] = ()  # that get a gradient; of AFTER_END those read after their end
    padding: int = 0  # AFTER_END: median steps from the last real one to the first that is read
    shown: str = ""  # AFTER_END: by what the lengths are known, "" where they were given
    perhaps: int = (
        0  # where these may be padding: steps before a tail of one row that alone is read
    )
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
    seen = _paddings(recording)
    found = {track.name: _known(track, seen.get(track.name)) for track in recording.values()}
    names = set(found)
    for track in recording.values():
        other = track.name.replace("_reverse", "")
        both = {other, _other_direction(other)} <= names
        above = next((n for n in _all_above(track, recording) if found[n].amiss), "")
        under = (above, found[above].kind) if above else ("", "")
        found[track.name] = replace(found[track.name], bidirectional=both, under=under)
    return found


def _known(track: Track, padding: Padding | None) -> Reading:
    """The reading, or one that says nothing where the layer's numbers are not to be had."""
    try:
        return reading(track, padding)
    except RecordingError:
        return Reading()


def reading(track: Track, padding: Padding | None = None) -> Reading:
    """Where the loss reaches one layer.

    Args:
        track: one layer in one direction.
        padding: as its input shows it, where no lengths were given.

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
    one_batch = not track.runs  # pooled runs are calls of their own: no axis of theirs is mistaken
    if one_batch and arriving is not None and _one_whole_sequence(some, arriving, lengths):
        return Reading(ONE_SEQUENCE, sequences)
    if one_batch and raw is not None and _only_the_longest(some, raw, lengths):
        return Reading(PACKED_ROWS, sequences)
    if _only_the_first_step(track, total, raw):
        return Reading(FIRST_STEP, sequences, still=_weights_still(track, total))
    kind = FEW_SEQUENCES if 2 * len(sequences) <= track.batch else ""
    after = None if raw is None else _after_end(raw, padding.lengths if padding else lengths)
    if after is None:
        return Reading(kind, sequences)
    late, steps = after
    if padding is not None and not padding.told:
        return Reading(kind, sequences, perhaps=int(padding.lengths[0]))
    shown = "" if padding is None else SURE if padding.sure else SEEMS
    return Reading(AFTER_END, late, steps, shown=shown)


def read_runs(track: Track, sequences: tuple[int, ...]) -> list[int]:
    """Which of the pooled runs, counted from 0, have one of these sequences.

    >>> from types import SimpleNamespace
    >>> read_runs(SimpleNamespace(runs=(1, 2, 1)), (1, 3))
    [1, 2]
    """
    run_of = np.repeat(np.arange(len(track.runs)), track.runs)
    return sorted({int(run_of[b]) for b in sequences})


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


def _paddings(recording: Recording) -> dict[str, Padding]:
    """Track name -> its padding, of every layer of which it shows; nothing where lengths were given.

    It shows at the layer's own input, at the token ids that the input is made from, at a layer below
    that it reads, and else at what the model was given.
    """
    if recording.lengths_given:
        return {}
    tracks = {track.name: track for track in recording.values() if _may_be_padded(track)}
    found = {name: padding for name, track in tracks.items() if (padding := _own(track))}
    for name, track in tracks.items():  # in the order in which they ran: the lower ones first
        if name not in found:
            below = _below(track, tracks, found)
            padding = found[below] if below else _of_model(track, recording.paddings)
            if padding is not None:
                found[name] = padding
    given = [padding for padding in recording.paddings if padding.sure]
    return {
        name: padding if padding.sure else _surely(padding, given)
        for name, padding in found.items()
    }


def _may_be_padded(track: Track) -> bool:
    return not bool((track.lengths.cpu() < track.steps).any())


def _own(track: Track) -> Padding | None:
    """As its own input shows it, or the token ids that this is made from.

    An input made of recurrent states, its own in a closed loop, shows nothing: these may come to rest.
    """
    if track.padding is not None and track.padding.fits(track.mask):
        return track.padding
    if track.reads_states or track.loop or not _has_inputs(track) or track.alone is not None:
        return None
    return padding_of(track.inputs)


def _surely(padding: Padding, given: Sequence[Padding]) -> Padding:
    """The same, sure where something that the model was given says it surely."""
    same = any(torch.equal(padding.lengths, other.lengths) for other in given)
    return replace(padding, sure=True) if same else padding


def _has_inputs(track: Track) -> bool:
    try:
        return track.has_inputs
    except RecordingError:  # its replay is not to be had
        return False


def _below(track: Track, every: Mapping[str, Track], known: Mapping[str, Padding]) -> str:
    """The name of a layer of known padding whose states this one reads step by step, or ""."""
    bottom = re.sub(r"l\d+(_reverse)?(@\d+)?$", r"l0\2", track.name)
    for name in (bottom, *track.below):
        if name in known and known[name].fits(track.mask):
            return name
    if not _has_inputs(track):
        return ""
    for name in known:
        other = every[name]
        if other is track or "h" not in other.states or other.mask.shape != track.mask.shape:
            continue
        width = other.h.shape[-1]
        if width <= track.inputs.shape[-1] and torch.equal(track.inputs[..., :width], other.h):
            return name
    return ""


def _of_model(track: Track, given: Sequence[Padding]) -> Padding | None:
    """As the model's own input shows it, for loops step by step, whose inputs are not seen as one.

    Such a loop may also run from the end to the start: its first steps then read padding, so that
    padded sequences have the same states for as long as all of them do.
    """
    if track.turned is not False:
        return None
    known = [padding for padding in given if padding.fits(track.mask)]
    if not known or not all(torch.equal(p.lengths, known[0].lengths) for p in known):
        return None
    tails = track.steps - known[0].lengths
    common = int(tails.sort().values[-2:][0])  # of the two sequences that are padded most
    state = track.seen_states.get(track.main_state)
    if len(tails) > 1 and common and state is not None:
        early = state[:common, (tails >= common).to(state.device)]
        if torch.allclose(early, early[:, :1], rtol=STATES_ALIKE, atol=0.0):
            return None
    return known[0]


# ------------------------------------------------------------------------------------------ a stack


def _other_direction(name: str) -> str:
    base, at, run = name.partition("@")
    return f"{base}_reverse{at}{run}"


def _all_above(track: Track, recording: Recording) -> list[str]:
    """Names of all layers that read this one step by step, directly or not."""
    found: list[str] = []
    waiting = _above(track, recording)
    while waiting:
        name = waiting.pop()
        if name in recording.tracks and name not in found:
            found.append(name)
            waiting += _above(recording[name], recording)
    return found


def _above(track: Track, recording: Recording) -> list[str]:
    return [
        *track.above,
        *(other.name for other in recording.values() if track.name in other.below),
    ]
