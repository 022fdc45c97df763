"""Layout: where the steps of the calls of a loop lie in the loop's own time, sequence by sequence.

Batches may shrink, grow or be reordered between calls, and calls may be packed, or padded. Every sequence
goes through the calls that it is in, without a hole; a sequence that begins in a later call has its first
step at index 0 like all others.

Letters: T steps of the longest sequence, B sequences, t and b of one call.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from gradflow.hooks.call import Call
from gradflow.hooks.loops.links import Link


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
    """The calls of a loop in its time; `even` where each is a stretch of steps of all sequences.

    Even calls are only counted while they come: what is done for one must not grow with their number.
    """

    even: bool = True
    batch: int = 0  # B
    extents: list[int] = field(default_factory=list)  # t of every call
    cuts: dict[int, Tensor] = field(default_factory=dict)  # place of a call -> `note_cut`
    kinds: dict[int, Tensor | int] = field(default_factory=dict)  # the same, of what it is
    padding: bool = False  # whether sequences went on through padding, whose steps count
    _parts: list[Part] = field(default_factory=list)  # of the calls whose part was asked for
    _totals: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))  # after these
    _given: Tensor | None = None  # (b,) of the last call, the user's own

    @property
    def parts(self) -> list[Part]:
        """One for each call."""
        self._write()
        return self._parts

    @property
    def totals(self) -> Tensor:
        """(B,) the steps of every sequence."""
        self._write()
        return self._totals

    def _write(self) -> None:
        """Write out the parts of the calls that were only counted."""
        if len(self._parts) == len(self.extents):
            return
        every, none = torch.arange(self.batch), torch.zeros(self.batch, dtype=torch.bool)
        for extent in self.extents[len(self._parts) :]:
            if not self._parts:
                self._totals = torch.zeros(self.batch, dtype=torch.long)
            begins = none if self._parts else ~none
            self._append(every, torch.full_like(every, extent), extent, begins)

    def _append(self, sequences: Tensor, lengths: Tensor, extent: int, begins: Tensor) -> None:
        self._parts.append(Part(sequences, self._totals[sequences], lengths, extent, begins))
        self._totals[sequences] += lengths

    @property
    def steps(self) -> int:
        """T."""
        return sum(self.extents) if self.even else int(self.totals.max())

    def add(self, call: Call, link: Link | None, origins: Tensor | None = None) -> None:
        """Go on with one more call; origins (b,) are the rows of all calls before, −1 a new one."""
        rows = None if link is None else link.rows
        if link is not None and (link.ends is not None or self._given is not None):
            self._go_on(link)
        lengths = _lengths(call)
        self._given = None if call.lengths is None else call.lengths.cpu()
        # what is known of a call alone is read without a layout
        if self.extents and lengths is None:
            lengths = self._given
        self.join(int(call.h0.shape[1]), _extent(call), lengths, rows, origins)

    def _go_on(self, link: Link) -> None:
        """Of the last call so far, let every sequence end at the step after which it goes on."""
        part = self.parts[-1]
        every = torch.arange(len(part.sequences))
        on = every if link.rows is None else link.rows[link.rows >= 0].cpu()
        lengths = part.lengths.clone() if self._given is None else self._given.clone()
        ends = torch.full_like(every, part.extent - 1) if link.ends is None else link.ends.cpu()
        ends = torch.where(ends < 0, lengths - 1, ends)
        self.padding |= self._given is not None and bool((ends[on] >= lengths[on]).any())
        lengths[on] = ends[on] + 1
        self.even &= bool((lengths == part.lengths).all())
        self._parts[-1] = replace(part, lengths=lengths)
        self._totals[part.sequences] += lengths - part.lengths

    def join(
        self,
        batch: int,
        extent: int = 1,
        lengths: Tensor | None = None,
        rows: Tensor | None = None,
        origins: Tensor | None = None,
    ) -> None:
        """Go on with t = extent steps of b sequences, or of each as many as its length (b,).

        rows as in `Link`, origins as in `add`.
        """
        if not self.extents:
            self.batch = batch
        alike = lengths is None or bool((lengths == extent).all())
        same = origins is None and self._are_the_same(rows)
        if self.even and alike and batch == self.batch and same:
            self.extents.append(extent)
            return
        known = self.parts
        known_by = known[-1:] if origins is None else known
        sequences = self._sequences(batch, rows if origins is None else origins, known_by)
        begins = sequences < 0
        fresh = int(begins.sum())
        if fresh:
            self.batch = fresh + (self.batch if known else 0)
            sequences[begins] = torch.arange(self.batch - fresh, self.batch)
            self._totals = torch.cat([self._totals, torch.zeros(fresh, dtype=torch.long)])
        lengths = torch.full((batch,), extent) if lengths is None else lengths
        self.even = False
        self.extents.append(extent)
        self._append(sequences, lengths, extent, begins)

    def _are_the_same(self, rows: Tensor | None) -> bool:
        """Whether all sequences go on, each where it was."""
        return rows is None or bool((rows.cpu() == torch.arange(len(rows))).all())

    @staticmethod
    def _sequences(count: int, rows: Tensor | None, parts: list[Part]) -> Tensor:
        if not parts:
            return torch.full((count,), -1, dtype=torch.long)
        before = torch.cat([part.sequences for part in parts])
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

    def note_cut(self, place: int, cut: Tensor, kind: Tensor | int | None = None) -> None:
        """Nothing comes into these sequences (b,) of a call from before it; kind as in `Link`."""
        self.cuts[place] = cut
        if kind is not None:
            self.kinds[place] = kind

    def shape(self, given: Tensor | None, device: torch.device) -> dict[str, Tensor]:
        """Lengths (B,), mask, cuts and their kinds (T, B) as a `Track` has them; given as in `real`."""
        steps, real = self.steps, self.real(given)
        lengths = torch.full((self.batch,), steps) if real is None else real.clone()
        lengths = lengths.to(device)
        cuts = torch.zeros(steps, self.batch, dtype=torch.bool, device=device)
        kinds = torch.zeros(steps, self.batch, dtype=torch.int8, device=device)
        for place, cut in self.cuts.items():
            if bool(cut.any()):
                part, cut = self.parts[place], cut.to(device)
                cut = cut & ~part.begins.to(device) if place else cut
                at = part.starts.to(device), part.sequences.to(device)
                cuts[at] = cut
                if place in self.kinds:
                    kind = torch.as_tensor(self.kinds[place], dtype=torch.int8)
                    kinds[at] = cut * kind.to(device)
        mask = torch.arange(steps, device=device).unsqueeze(1) < lengths
        return {"lengths": lengths, "mask": mask, "cuts": cuts, "cut_kinds": kinds}

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


def _lengths(call: Call) -> Tensor | None:
    """(b,) the steps that the kernel ran of every sequence, user's order; None where all are alike."""
    if call.batch_sizes is None:
        return None
    batch = int(call.h0.shape[1])
    lengths = (call.batch_sizes.unsqueeze(1) > torch.arange(batch)).sum(0)
    return lengths if call.unsorted is None else lengths[call.unsorted.cpu()]
