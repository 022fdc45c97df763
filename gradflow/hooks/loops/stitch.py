"""Stitch: which calls are steps of one loop.

A call that starts from what an earlier call of the same module returned goes on with that call's
`Chain`; any other call begins a chain of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from gradflow.hooks.call import Call
from gradflow.hooks.graph import Edge, edge_of
from gradflow.hooks.guard import note_hooks
from gradflow.hooks.loops import links
from gradflow.hooks.loops.groups import Group, grouped
from gradflow.hooks.loops.layout import Layout
from gradflow.hooks.loops.links import End, Link
from gradflow.limits import OPEN_LOOPS
from gradflow.recording import Track


@dataclass(eq=False)
class Chain:
    """Calls in time order; links[k] leads from call k − 1 into call k, links[0] is None."""

    calls: list[Call]
    links: list[Link | None]
    tracks: list[Track] = field(default_factory=list)
    lengths: Tensor | None = None  # the user's own, over the whole loop
    unread: str = ""  # why it is not known whether more than its states goes around the loop
    changes: int = 0
    rests: bool = False  # whether sequences rest for some calls: `rows` of links are not known then
    closed: Any = None  # the `ClosedLoop` that it is a part of, if any
    layout: Layout = field(default_factory=Layout)
    _groups: tuple[int, list[Group]] = (-1, [])

    def __post_init__(self) -> None:
        for call, link in zip(self.calls, self.links, strict=True):
            self.layout.add(call, link)

    @property
    def version(self) -> int:
        """How many backwards reached the chain."""
        return len(set().union(*(call.graph_tasks for call in self.calls)))

    @property
    def lost(self) -> str:
        """Why what the backwards brought is no total, if it is none."""
        return next((call.lost for call in self.calls if call.lost), "")

    @property
    def batched(self) -> bool:
        """Whether a backward of several outputs at once reached it."""
        return any(call.batched for call in self.calls)

    @property
    def sizes(self) -> list[int]:
        """The number of steps of every call."""
        return self.layout.extents

    @property
    def batch(self) -> int:
        """B, the sequences of all calls."""
        return self.layout.batch

    @property
    def real(self) -> Tensor | None:
        """(B,) the real steps of every sequence; None where all are T."""
        return self.layout.real(self.lengths)

    def groups(self) -> list[Group]:
        """The calls side by side, with all gradients that came so far."""
        if self._groups[0] != self.changes:
            self._groups = (self.changes, grouped(self.calls))
        for group in self._groups[1]:
            group.refresh()
        return self._groups[1]

    def add(self, call: Call, link: Link) -> None:
        """Go on with one more call."""
        self.calls.append(call)
        self.links.append(link)
        self.changes += 1
        self.layout.add(call, link)
        self.layout.note_cut(len(self.calls) - 1, link.cut, link.kind)
        for track in self.tracks:
            track.grow(self._shape)

    def _shape(self) -> dict[str, Tensor]:
        return self.layout.shape(self.lengths, self.calls[0].h0.device)

    def follow_rests(self, calls: list[tuple[Call, dict[Edge, str], dict[str, Edge]]]) -> bool:
        """Lay the calls out anew, each sequence going on from whichever of them it was in last.

        They come with the edges of what they returned and of what they started from. Returns whether
        every sequence comes from one of an earlier call, or begins.
        """
        found = [
            links.after_rest(calls[:place], *calls[place][::2]) for place in range(1, len(calls))
        ]
        if any(one is None for one in found):
            return False
        layout, self.links = Layout(), [None]
        layout.add(self.calls[0], None)
        for place, (call, one) in enumerate(zip(self.calls[1:], found, strict=True), start=1):
            assert one is not None
            self.links.append(one[0])
            layout.add(call, *one)
            layout.note_cut(place, one[0].cut)
        self.layout, self.rests = layout, True
        self.changes += 1
        for track in self.tracks:
            track.grow(self._shape)
        return True

    def replace_link(self, place: int, link: Link) -> None:
        """What a checkpoint's second run shows of a link that its first run hid."""
        known = self.links[place]
        assert known is not None
        if link.rows is not None or known.rows is not None:
            link = replace(link, rows=known.rows)
        self.links[place] = link
        self.changes += 1
        self.layout.note_cut(place, link.cut, link.kind)
        for track in self.tracks:
            track.read_anew()


class Stitcher:
    """The open ends of all chains of one recording."""

    def __init__(self) -> None:
        self._ends: dict[str, list[tuple[End, Chain]]] = {}
        self._again: dict[str, End] = {}  # the last call a checkpoint made again
        self._chains: dict[int, tuple[Chain, int]] = {}  # id of a call -> its chain and place

    def place(
        self, call: Call, initial: tuple[Tensor, ...], results: tuple[Tensor, ...]
    ) -> tuple[Chain, End]:
        """The chain this call belongs to, new if it is the only one, and its end."""
        end = _end(call, initial, results)
        if call.bidirectional:
            return Chain([call], [None]), end
        ends = self._ends.setdefault(call.owner, [])
        for number in reversed(range(len(ends))):
            known, chain = ends[number]
            if not _same_kind(known.call, call):
                continue
            link = links.find(known, dict(zip(call.initial, initial, strict=True)), call)
            if link is None:
                continue
            del ends[number]
            chain.add(call, link)
            note_hooks(initial, [track.notes for track in chain.tracks])
            ends.append((end, chain))
            self._chains[id(call)] = (chain, len(chain.calls) - 1)
            return chain, end
        chain = Chain([call], [None])
        self._chains[id(call)] = (chain, 0)
        ends.append((end, chain))
        del ends[:-OPEN_LOOPS]
        return chain, end

    def made_again(
        self, call: Call, initial: tuple[Tensor, ...], results: tuple[Tensor, ...]
    ) -> None:
        """Look at a link again, now that a checkpoint makes its two calls with a graph."""
        chain, place = self._chains.get(id(call), (None, 0))
        if chain is None:
            return
        last = self._again.get(call.owner)
        if last is not None and place and last.call is chain.calls[place - 1]:
            link = links.find(last, dict(zip(call.initial, initial, strict=True)), call)
            if link is not None:
                chain.replace_link(place, link)
        self._again[call.owner] = _end(call, initial, results)

    def close(self) -> None:
        """Release the user's tensors."""
        self._ends.clear()
        self._again.clear()
        self._chains.clear()


def _end(call: Call, initial: tuple[Tensor, ...], results: tuple[Tensor, ...]) -> End:
    names = [*call.initial] if call.single else ["output", *call.initial]
    entry = {n: edge_of(tensor) for n, tensor in zip(call.initial, initial, strict=True)}
    return End(call, dict(zip(names, results, strict=True)), entry)


def _same_kind(one: Call, other: Call) -> bool:
    return (
        one.cell == other.cell
        and one.single == other.single
        and one.layers == other.layers
        and [w.shape for w in one.weights] == [w.shape for w in other.weights]
    )
