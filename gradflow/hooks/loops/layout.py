"""Layout: where the steps of the calls of a loop lie in the loop's own time, sequence by sequence.

Batches may shrink, grow or be reordered between calls, and calls may be packed. Every sequence goes
through the calls that it is in, without a hole; a sequence that begins in a later call has its first
step at index 0 like all others.

Letters: T steps of the longest sequence, B sequences, t and b of one call.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from gradflow.hooks.call import Call
from gradflow.hooks.loops.links import Link
from gradflow.recording import Track


@dataclass(frozen=True)
class Part:
    """One call; everything in the user's order of its sequences."""

    sequences: Tensor  # (b,) which of the loop's sequences they are
    starts: Tensor  # (b,) the loop's step at which they begin here
    lengths: Tensor  # (b,) steps here
    extent: int  # t
    begins: Tensor  # (b,) true for sequences that begin here

    @property
    def ends(self) -> Tensor:
        """(b,) their last step here."""
        return self.starts + self.lengths - 1


@dataclass(eq=False)
class Layout:
    """The calls of a loop in its time; `even` where each is a stretch of steps of all sequences."""

    parts: list[Part] = field(default_factory=list)
    totals: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))  # (B,)
    even: bool = True

    @property
    def batch(self) -> int:
        """B."""
        return len(self.totals)

    @property
    def steps(self) -> int:
        """T."""
        return int(self.totals.max())

    def add(self, call: Call, link: Link | None) -> Part:
        """Go on with one more call."""
        return self.join(_steps_of(call), _extent(call), None if link is None else link.rows)

    def join(self, lengths: Tensor, extent: int = 1, rows: Tensor | None = None) -> Part:
        """Go on with steps of (b,) lengths; rows as in `Link`."""
        sequences = self._sequences(len(lengths), rows)
        begins = sequences < 0
        fresh = int(begins.sum())
        if fresh:
            sequences[begins] = torch.arange(self.batch, self.batch + fresh)
            self.totals = torch.cat([self.totals, torch.zeros(fresh, dtype=torch.long)])
        part = Part(sequences, self.totals[sequences], lengths, extent, begins)
        self.totals[sequences] += lengths
        self.even = self.even and bool(
            len(sequences) == self.batch
            and (sequences == torch.arange(self.batch)).all()
            and (lengths == part.extent).all()
            and (not self.parts or not fresh)
        )
        self.parts.append(part)
        return part

    def _sequences(self, count: int, rows: Tensor | None) -> Tensor:
        if not self.parts:
            return torch.full((count,), -1, dtype=torch.long)
        before = self.parts[-1].sequences
        if rows is None:
            return before.clone()
        rows = rows.cpu()
        return torch.where(rows < 0, -1, before[rows.clamp(min=0)])

    def is_that_of(self, other: Layout) -> bool:
        """Whether another loop has the same sequences at the same steps, call by call."""
        if self.even and other.even:
            return self.batch == other.batch
        return len(self.parts) == len(other.parts) and all(
            torch.equal(mine.sequences, theirs.sequences)
            and torch.equal(mine.starts, theirs.starts)
            for mine, theirs in zip(self.parts, other.parts, strict=True)
        )

    def real(self, given: Tensor | None) -> Tensor | None:
        """(B,) the real steps of every sequence, None where all are T; given are the user's own."""
        if given is None:
            return None if self.even else self.totals
        more = self.totals[len(given) :]  # some joined in later calls
        return torch.minimum(self.totals, torch.cat([given.cpu(), more]))

    def grown(self, track: Track, cut: Tensor, given: Tensor | None) -> None:
        """Give a track the shape that it has with the last part; cut (b,) at its first step."""
        steps, batch, real = self.steps, self.batch, self.real(given)
        device = track.lengths.device
        more = (0, batch - track.cuts.shape[1], 0, steps - len(track.cuts))
        track.cuts = F.pad(track.cuts, more)
        self.note_cut(track, len(self.parts) - 1, cut)
        track.lengths = torch.full((batch,), steps) if real is None else real.clone()
        track.lengths = track.lengths.to(device)
        track.mask = torch.arange(steps, device=device).unsqueeze(1) < track.lengths
        track.read_anew()

    def note_cut(self, track: Track, place: int, cut: Tensor) -> None:
        """Put on a track where nothing comes into a part from before it, (b,)."""
        part, device = self.parts[place], track.cuts.device
        cut = cut.to(device) & ~part.begins.to(device)
        track.cuts[part.starts.to(device), part.sequences.to(device)] = cut

    def placed(self, arrays: dict[int, Tensor]) -> Tensor:
        """(T, B, ...) from (t, b, ...) of some calls; zero at the steps of the others."""
        if self.even and len(arrays) == len(self.parts):
            return torch.cat([arrays[place] for place in range(len(arrays))])
        first = next(iter(arrays.values()))
        found = first.new_zeros(self.steps * self.batch, *first.shape[2:])
        index, values = [], []
        for place, array in arrays.items():
            where, real = self._index(place)
            index.append(where)
            values.append(array.flatten(0, 1) if real is None else array.flatten(0, 1)[real])
        found[torch.cat(index).to(first.device)] = torch.cat(values)
        return found.unflatten(0, (self.steps, self.batch))

    def _index(self, place: int) -> tuple[Tensor, Tensor | None]:
        """The places of a call's steps among T·B, and which of its t·b steps are real."""
        part = self.parts[place]
        time = torch.arange(part.extent).unsqueeze(1)
        where = ((part.starts + time) * self.batch + part.sequences).flatten()
        if bool((part.lengths == part.extent).all()):
            return where, None
        real = (time < part.lengths).flatten()
        return where[real], real

    def mask(self, places: list[int]) -> Tensor:
        """(T, B) true at the steps of these calls."""
        ones = {
            place: torch.ones(part.extent, len(part.sequences), dtype=torch.bool)
            for place, part in enumerate(self.parts)
            if place in places
        }
        return self.placed(ones)

    def spread(self, place: int, array: Tensor, dim: int = 0) -> Tensor:
        """(·, B, ·) from (·, b, ·) of one call, zero for the sequences that are not in it."""
        if self.even:
            return array
        shape = list(array.shape)
        shape[dim] = self.batch
        sequences = self.parts[place].sequences.to(array.device)
        return array.new_zeros(shape).index_copy(dim, sequences, array)


def _extent(call: Call) -> int:
    if call.batch_sizes is not None:
        return len(call.batch_sizes)
    return int(call.data.shape[1 if call.batch_first else 0])


def _steps_of(call: Call) -> Tensor:
    """(b,) the steps that the kernel ran of every sequence, user's order."""
    batch = int(call.h0.shape[1])
    if call.batch_sizes is None:
        return torch.full((batch,), _extent(call), dtype=torch.long)
    lengths = (call.batch_sizes.unsqueeze(1) > torch.arange(batch)).sum(0)
    return lengths if call.unsorted is None else lengths[call.unsorted.cpu()]
