"""Notice closed loops, from the calls of stock layers as they come, and read them in time.

A backward frees what the graph has saved, so all is decided right before one runs; what no backward
came through is decided when the block ends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from gradflow.hooks.closed.afresh import Afresh
from gradflow.hooks.closed.dependence import Dependence
from gradflow.hooks.closed.given import GivenInputs
from gradflow.hooks.closed.joint_source import JointSource
from gradflow.hooks.closed.joint_steps import (
    BATCHES,
    LATE,
    PACKED,
    UNEQUAL,
    WHY_NOT,
    Ask,
    JointReading,
    carries_more,
    in_words,
    note_more,
    read,
    step_between,
)
from gradflow.hooks.closed.loops import ClosedLoop, State, states_of
from gradflow.hooks.closed.parts import MarkedPart, PartLayer, Seen, StockPart
from gradflow.hooks.closed.standing import Standing
from gradflow.hooks.dense import Incomplete, Mixed, Place
from gradflow.hooks.graph import NotReadable
from gradflow.hooks.loops.links import End
from gradflow.hooks.loops.stitch import Chain
from gradflow.hooks.marks import TrackOwner, begun, grown
from gradflow.hooks.tapped import TAP, Mark, TapSource
from gradflow.recording import Recording, Track


class ClosedOwner(TrackOwner, Protocol):
    """The recorder, as far as closed loops need it."""

    handles: list[RemovableHandle]
    jacobians: bool | None
    recording: Recording

    def scale(self) -> float: ...


class ClosedLoops:
    """The closed loops of one recording."""

    def __init__(self, owner: ClosedOwner) -> None:
        self.owner = owner
        self.ask = Ask(owner.jacobians)
        self.loops: list[ClosedLoop] = []
        self.given = GivenInputs()
        self.afresh = Afresh()
        self._parts: dict[int, Any] = {}  # id of a chain or of a source -> the part
        self._calls: list[Seen] = []
        self._fresh = False
        self._rests: set[int] = set()  # ids of parts whose sequences rest for some calls
        self._loss: list[Any] = []

    # -- what the recorder calls -------------------------------------------------------------

    def saw(self, chain: Chain, end: End, data: Tensor) -> None:
        """One more call of a chain."""
        if torch._C._current_graph_task_id() == -1:
            part = self._parts.get(id(chain))
            if part is None:
                part = self._parts[id(chain)] = StockPart(chain)
            self._calls.append(Seen.of_call(part, end, data))
            self._fresh = True
            self.given.saw(chain, end, data)

    def saw_mark(self, source: TapSource, track: Track, place: Place, mark: Mark) -> None:
        """One more step of a loop that marks its states."""
        part = self._parts.get(id(source))
        if part is None:
            part = self._parts[id(source)] = MarkedPart(source, track)
        self._calls.append(Seen.of_mark(part, place, mark))
        self._fresh = True

    def decide(self, roots: Sequence[Tensor] = ()) -> None:
        """Look at all calls that came since, while the graph is whole.

        roots are what a backward starts from.
        """
        if not self._fresh:
            return
        self._fresh = False
        self._loss = [root.grad_fn for root in roots if root.grad_fn is not None]
        self.afresh.look(in_order(self._calls))
        dropped = {id(part) for part in self._parts.values() if self._is_dropped(part)}
        several = {id(seen.part) for seen in self._calls if seen.place} - dropped
        calls = in_order([seen for seen in self._calls if id(seen.part) in several])
        whole = {id(part) for part in self._parts.values() if self._is_whole(part, calls)}
        calls = [seen for seen in calls if id(seen.part) not in whole]
        dependence = Dependence(calls)
        if self._follow_rests(dependence, calls):
            dependence = Dependence(calls, self._rests)
        closed = dependence.closed()
        known = [part for parts in closed for part in parts]
        every = dict.fromkeys(seen.part for seen in calls if isinstance(seen.part, MarkedPart))
        closed += [[part] for part in every if part not in known]
        for loop in self.loops:  # now over more than was thought
            if any(set(loop.parts) < set(parts) for parts in closed):
                loop.unknown = loop.unknown or LATE
        for parts in closed:
            self._take_up(parts, calls, dependence)
        self._prune()
        self._loss = []

    def close(self) -> None:
        """Decide what no backward came through, and release the graph."""
        self.decide()
        self.given.close()
        self.afresh.close()
        nodes = [node for seen in self._calls for node in seen.nodes]
        for seen in self._calls:
            seen.edges, seen.starts, seen.inputs, seen.mark = {}, [], [], None
            seen.entry = {}
        for loop in self.loops:
            loop.ended = {}
        self._calls.clear()
        # newest first, one at a time: freed as one long chain they overflow the stack
        nodes.sort(key=lambda node: int(node._sequence_nr()))
        while nodes:
            nodes.pop()

    def unread(self, why: str) -> None:
        """The graph was not looked at as a whole: what is closed among what came since is not known."""
        self._fresh = False
        for seen in self._calls:
            if seen.place:
                seen.part.leave_unread(why)
        for loop in self.loops:
            loop.unknown = loop.unknown or why

    def leave(self, concerned: Callable[[Chain], bool], why: str) -> None:
        """Forget calls that were not recorded as a whole; a loop they are part of has no joint state."""
        self._calls = [seen for seen in self._calls if not is_of(seen.part, concerned)]
        for loop in self.loops:
            if not any(is_of(part, concerned) for part in loop.parts):
                continue
            loop.unknown = loop.unknown or why
            for track in (track for part in loop.parts for track in part.tracks):
                track.loop = ""

    def _follow_rests(self, dependence: Dependence, calls: Sequence[Seen]) -> bool:
        """Follow sequences that rest for some calls of a chain and come back; whether there are such."""
        before = len(self._rests)
        for part in dependence.further:
            mine = [seen for seen in calls if seen.part is part]
            known = [(seen.call, seen.edges, seen.entry) for seen in mine if seen.call is not None]
            whole = isinstance(part, StockPart) and len(known) == part.count
            if whole and part.holder.follow_rests(known):
                self._rests.add(id(part))
        return len(self._rests) > before

    def _prune(self) -> None:
        """Of every chain its last call is enough to tell what the next one depends on."""
        last = {id(seen.part): seen for seen in self._calls}
        kept = {id(seen) for seen in last.values()}
        kept |= {id(seen) for loop in self.loops for seen in loop.ended.values()}
        self._calls = [seen for seen in self._calls if id(seen) in kept]

    def _is_dropped(self, part: Any) -> bool:
        """Whether a loop over a cell turned out to be none, or what it returns is no state."""
        if not isinstance(part, MarkedPart):
            return False
        known = part.track in self.owner.recording.tracks.values()
        return not known or part.source.part_of_a_step

    def _is_whole(self, part: Any, calls: Sequence[Seen]) -> bool:
        """Whether a marked loop is read by itself: its states are all that it carries, or it is tapped.

        In a tapped loop the states are what the user says; that there are more is said, not mended.
        """
        if not isinstance(part, MarkedPart) or part.holder.closed is not None:
            return False
        more = carries_more(part, [seen for seen in calls if seen.part is part])
        if more and part.source.cell == TAP:
            note_more(part)
        return not more or part.source.cell == TAP

    # -- one loop ----------------------------------------------------------------------------

    def _take_up(self, parts: list[Any], calls: Sequence[Seen], dependence: Dependence) -> None:
        loop = next((known for known in self.loops if set(known.parts) == set(parts)), None)
        if loop is None:
            loop = self._begin(parts)
        mine = [seen for seen in calls if seen.part in parts]
        loop.depending |= {
            (id(seen.part), seen.place) for seen in mine if dependence.depends(seen, parts)
        }
        if loop.unknown:
            return
        old = {id(seen) for seen in loop.ended.values()}
        states = states_of([seen for seen in mine if id(seen) not in old], loop)
        if loop.ended and states and states[0] != loop.ended:
            loop.unknown = LATE
            return
        bare = [n for n, state in enumerate(states) if not all(s.edges for s in state.values())]
        # before a step without a graph nothing is read
        states = states[max(bare, default=-1) + 1 :]
        if len(states) < 2:
            return
        try:
            self._read(loop, states, {node for seen in mine for node in seen.nodes})
        except NotReadable as error:
            loop.unknown = in_words(error)
            if loop.source.marks:
                loop.source.marks[-1].unknown = loop.unknown
        loop.ended = states[-1]
        loop.begun = True

    def _begin(self, parts: list[Any]) -> ClosedLoop:
        source = JointSource(self.owner.scale, members=_members(parts))
        loop = ClosedLoop(parts, source)
        if any(part.holder.closed is not None for part in parts):
            loop.unknown = LATE
        for part in parts:
            part.holder.closed = loop
        self.loops.append(loop)
        return loop

    def _read(self, loop: ClosedLoop, states: list[State], every: set[Any]) -> None:
        reading = JointReading.of(loop, states, every, self._loss)
        source = loop.source
        if not loop.begun:
            loop.slots = reading.slots
            source.extras = [
                "carried" + (f"{n}" if n > 1 else "") for n in range(1, 1 + len(reading.slots))
            ]
            loop.own = not source.extras and _is_one_layer(loop)
        elif reading.slots:
            raise NotReadable(LATE)  # what crossed at the backward was not known then
        one, even = bool(source.one_system), all(part.even for part in loop.parts)
        if reading.is_uneven or (one and not even):
            raise NotReadable(BATCHES)
        if any(part.packed for part in loop.parts):
            raise NotReadable(PACKED)
        if any(part.outputs and len(set(part.sizes)) > 1 for part in loop.parts):
            raise NotReadable(UNEQUAL)
        try:
            if loop.own:
                self._read_own(loop, reading)
                return
            marks = self._marks(loop, reading)
        except Mixed:
            batch = next(iter(reading.states[0].values())).batch
            if one or loop.begun or not even:
                raise
            loop.own, source.one_system, loop.read = False, batch, {}
            marks = self._marks(loop, reading)
        for number, (place, mark) in enumerate(marks):
            if not (loop.begun and number == 0):
                self._add(loop, states[number], mark)
                self.owner.handles += source.listen_at(mark, place)

    def _marks(self, loop: ClosedLoop, reading: JointReading) -> list[tuple[Standing, Mark]]:
        """See `read`; outputs within the calls are a part of the state where they are read later."""
        one = bool(loop.source.one_system)
        chunks = [part for part in loop.parts if max(part.sizes) > 1]
        try:
            return read(reading, self.ask, one=one)
        except Incomplete:
            if loop.begun or not chunks or chunks[0].outputs:
                raise
        if any(len(set(part.sizes)) > 1 for part in chunks):
            raise NotReadable(UNEQUAL)
        for part in chunks:
            part.outputs = True
        loop.source.members = _members(loop.parts)
        return read(reading, self.ask, one=one)

    def _read_own(self, loop: ClosedLoop, reading: JointReading) -> None:
        """The steps of one layer whose input descends from it; all others are in closed form."""
        before = reading.place(0, one=False)
        part = loop.parts[0]
        if not self.ask.wants:
            raise NotReadable(WHY_NOT)
        for number, state in enumerate(reading.states[1:], start=1):
            seen = state[id(part)]
            now = reading.place(number, one=False)
            if (id(part), seen.place) in loop.depending:
                jacobian, cut, rows = step_between(before, now, self.ask, number)
                if not _goes_with(rows, part.chain.links[seen.place].rows):
                    raise NotReadable(BATCHES)
                loop.read[seen.place] = jacobian, cut
            before = now
        for place, (_, cut) in loop.read.items():
            part.chain.layout.note_cut(place, cut)
            for track in part.tracks:
                track.read_anew()

    def _add(self, loop: ClosedLoop, state: State, mark: Mark) -> None:
        source = loop.source
        source.marks.append(mark)
        source.ends.append({part: state[id(part)].place for part in loop.parts})
        if loop.track is not None:
            grown(source, loop.track)
            return
        known = self.owner.recording.tracks
        base = loop.holder or "loop"
        taken = base in known and known[base].cell != source.cell
        source.lengths = None if source.one_system else loop.parts[0].lengths
        loop.track = begun(
            self.owner,
            f"{base}.loop" if taken else base,
            source,
            owner=loop.holder,
            unseen_states=tuple(source.extras),
        )
        for track in (track for part in loop.parts for track in part.tracks):
            track.loop = source.name


def in_order(calls: Sequence[Seen]) -> list[Seen]:
    """As they were made: the first step of a cell of one's own is told of at its second."""
    numbers, newest = [], 0
    for seen in calls:
        newest = max(newest, seen.number)
        numbers.append(seen.number or newest)
    return [calls[place] for place in sorted(range(len(calls)), key=numbers.__getitem__)]


def is_of(part: StockPart | MarkedPart, concerned: Callable[[Chain], bool]) -> bool:
    """Whether a part is a chain that is concerned."""
    return isinstance(part, StockPart) and concerned(part.chain)


def _goes_with(rows: Tensor | None, others: Tensor | None) -> bool:
    """Whether inputs and states tell the same of which sequence each is; rows as in `Link`."""
    if rows is None or others is None:
        return rows is others
    return bool(((rows == others.to(rows.device)) | (rows < 0)).all())


def _is_one_layer(loop: ClosedLoop) -> bool:
    """Whether the joint state is that of one layer at every step, so that its track can hold it."""
    part = loop.parts[0]
    if len(loop.parts) > 1 or not isinstance(part, StockPart) or part.layers > 1:
        return False
    around = any(link is not None and link.around is not None for link in part.chain.links)
    return set(part.sizes) == {1} and not around


def _members(parts: list[Any]) -> list[PartLayer]:
    """Every layer of every part, with the names of its states in the joint state."""
    found = []
    single = len(parts) == 1 and parts[0].layers == 1
    for part in parts:
        for layer in range(part.layers):
            track = part.track_name(layer)
            names = {s: s if single else f"{track}.{s}" for s in part.states(layer)}
            found.append(PartLayer(part, layer, names, track))
    return found
