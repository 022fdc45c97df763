"""Notice closed loops, from the calls of stock layers as they come, and read them in time.

A backward frees what the graph has saved, so all is decided right before one runs; what no backward
came through is decided when the block ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from gradflow.hooks.call import Call
from gradflow.hooks.closed.dependence import Dependence, Seen
from gradflow.hooks.closed.given import GivenInputs
from gradflow.hooks.closed.loops import ClosedLoop, State, states_of
from gradflow.hooks.closed.reading import (
    BATCHES,
    LATE,
    WHY_NOT,
    Ask,
    Reading,
    in_words,
    read,
    step_between,
)
from gradflow.hooks.closed.source import JointSource, Member
from gradflow.hooks.dense import Mixed
from gradflow.hooks.graph import NotReadable
from gradflow.hooks.loops.links import End
from gradflow.hooks.loops.loop import Loop
from gradflow.hooks.loops.stitch import Chain
from gradflow.recording import Recording, Track


class Owner(Protocol):
    """The recorder, as far as closed loops need it."""

    handles: list[RemovableHandle]
    jacobians: bool | None
    training: bool
    recording: Recording

    def scale(self) -> float: ...
    def add_track(self, base: str, track: Track) -> None: ...


class ClosedLoops:
    """The closed loops of one recording."""

    def __init__(self, owner: Owner) -> None:
        self.owner = owner
        self.ask = Ask(owner.jacobians)
        self.loops: list[ClosedLoop] = []
        self.given = GivenInputs()
        self._calls: list[Seen] = []
        self._fresh = False
        self._loss: list[Any] = []

    # -- what the recorder calls -------------------------------------------------------------

    def saw(self, chain: Chain, end: End, data: Tensor) -> None:
        """One more call of a chain."""
        if torch._C._current_graph_task_id() == -1:
            self._calls.append(Seen.of(chain, end, data))
            self._fresh = True
            self.given.saw(chain, end, data)

    def decide(self, roots: Sequence[Tensor] = ()) -> None:
        """Look at all calls that came since, while the graph is whole.

        roots are what a backward starts from.
        """
        if not self._fresh:
            return
        self._fresh = False
        self._loss = [root.grad_fn for root in roots if root.grad_fn is not None]
        chains = {id(seen.chain) for seen in self._calls if seen.place}
        calls = [seen for seen in self._calls if id(seen.chain) in chains]
        dependence = Dependence(calls)
        closed = dependence.closed()
        for loop in self.loops:  # now over more than was thought
            if any(set(loop.chains) < set(chains) for chains in closed):
                loop.unknown = loop.unknown or LATE
        for several in closed:
            self._take_up(several, calls, dependence)
        self._prune()
        self._loss = []

    def close(self) -> None:
        """Decide what no backward came through, and let go of the graph."""
        self.decide()
        self.given.close()
        nodes = [node for seen in self._calls for node in seen.nodes]
        for seen in self._calls:
            seen.edges, seen.starts, seen.input = {}, [], None
        for loop in self.loops:
            loop.ended = {}
        self._calls.clear()
        # newest first, one at a time: freed as one long chain they overflow the stack
        nodes.sort(key=lambda node: int(node._sequence_nr()))
        while nodes:
            nodes.pop()

    def _prune(self) -> None:
        """Of every chain its last call is enough to tell what the next one depends on."""
        last = {id(seen.chain): seen for seen in self._calls}
        kept = {id(seen) for seen in last.values()}
        kept |= {id(seen) for loop in self.loops for seen in loop.ended.values()}
        self._calls = [seen for seen in self._calls if id(seen) in kept]

    # -- one loop ----------------------------------------------------------------------------

    def _take_up(self, chains: list[Chain], calls: Sequence[Seen], dependence: Dependence) -> None:
        loop = next((known for known in self.loops if set(known.chains) == set(chains)), None)
        if loop is None:
            loop = self._begin(chains)
        mine = [seen for seen in calls if seen.chain in chains]
        loop.depending |= {id(s.call) for s in mine if dependence.depends(s, chains)}
        if loop.unknown:
            return
        old = {id(seen) for seen in loop.ended.values()}
        states = states_of([seen for seen in mine if id(seen) not in old], loop)
        if loop.ended and states and states[0] != loop.ended:
            loop.unknown = LATE
            return
        bare = [n for n, state in enumerate(states) if not all(s.edges for s in state.values())]
        states = states[
            max(bare, default=-1) + 1 :
        ]  # before a step without a graph nothing is read
        if len(states) < 2:
            return
        try:
            self._read(loop, states, {node for seen in mine for node in seen.nodes})
        except NotReadable as error:
            loop.unknown = in_words(error)
        loop.ended = states[-1]
        loop.begun = True

    def _begin(self, chains: list[Chain]) -> ClosedLoop:
        source = JointSource(self.owner.scale, members=_members(chains))
        loop = ClosedLoop(chains, source)
        if any(chain.closed is not None for chain in chains):
            loop.unknown = LATE
        for chain in chains:
            chain.closed = loop
        self.loops.append(loop)
        return loop

    def _read(self, loop: ClosedLoop, states: list[State], every: set[Any]) -> None:
        reading = Reading.of(loop, states, every, self._loss)
        source = loop.source
        if not loop.begun:
            loop.slots = reading.slots
            source.extras = [
                "carried" + (f"{n}" if n > 1 else "") for n in range(1, 1 + len(reading.slots))
            ]
            loop.own = not source.extras and _is_one_layer(loop)
        elif reading.slots:
            raise NotReadable(LATE)  # what crossed at the backward was not known then
        one = bool(source.one_system)
        if len(reading.batches) > 1 or not all(chain.layout.even for chain in loop.chains):
            raise NotReadable(BATCHES)
        try:
            if loop.own:
                self._read_own(loop, reading)
                return
            marks = read(reading, self.ask, one=one)
        except Mixed:
            batch = next(iter(reading.batches))
            if one or loop.begun:
                raise
            loop.own, source.one_system, loop.read = False, batch, {}
            marks = read(reading, self.ask, one=True)
        for number, (place, mark) in enumerate(marks):
            if not (loop.begun and number == 0):
                self._add(loop, states[number], mark)
                self.owner.handles += source.listen_at(mark, place)

    def _read_own(self, loop: ClosedLoop, reading: Reading) -> None:
        """The steps of one layer whose input descends from it; all others are in closed form."""
        before = reading.place(0, one=False)
        chain = loop.chains[0]
        if not self.ask.wants:
            raise NotReadable(WHY_NOT)
        for number, state in enumerate(reading.states[1:], start=1):
            seen = state[id(chain)]
            now = reading.place(number, one=False)
            if id(seen.call) in loop.depending:
                loop.read[seen.place] = step_between(before, now, self.ask, number)
            before = now
        for place, (_, cut) in loop.read.items():
            for track in chain.tracks:
                track.cuts[place] = cut
                track.read_anew()

    def _add(self, loop: ClosedLoop, state: State, mark: Any) -> None:
        source = loop.source
        source.marks.append(mark)
        source.ends.append({id(chain): state[id(chain)].place for chain in loop.chains})
        batch, device = len(mark.cut), mark.cut.device
        if loop.track is None:
            loop.track = Track(
                name="",
                cell=source.cell,
                reverse=False,
                lengths=torch.ones(batch, dtype=torch.long, device=device),
                mask=torch.ones(1, batch, dtype=torch.bool, device=device),
                cuts=mark.cut.unsqueeze(0),
                weights={},
                source=source,
                training=self.owner.training,
                owner=loop.holder,
                unseen_states=tuple(source.extras),
            )
            known = self.owner.recording.tracks
            base = loop.holder or "loop"
            self.owner.add_track(f"{base}.loop" if base in known else base, loop.track)
            source.name = loop.track.name
            for chain in loop.chains:
                for part in chain.tracks:
                    part.loop = source.name
            return
        track, steps = loop.track, len(source.marks)
        track.cuts = torch.cat([track.cuts, mark.cut.unsqueeze(0)])
        track.lengths = torch.full_like(track.lengths, steps)
        lengths = loop.chains[0].real
        if lengths is not None and not source.one_system:
            source.lengths = lengths
            track.lengths = torch.minimum(track.lengths, lengths.to(device))
        track.mask = torch.arange(steps, device=device).unsqueeze(1) < track.lengths
        track.read_anew()


def _is_one_layer(loop: ClosedLoop) -> bool:
    """Whether the joint state is that of one layer at every step, so that its track can hold it."""
    if len(loop.chains) > 1 or loop.chains[0].calls[0].layers > 1:
        return False
    chain = loop.chains[0]
    around = any(link is not None and (link.around is not None) for link in chain.links)
    return set(chain.sizes) == {1} and not around


def _members(chains: list[Chain]) -> list[Member]:
    """Every layer of every chain, with the names of its states in the joint state."""
    found = []
    single = len(chains) == 1 and chains[0].calls[0].layers == 1
    for chain in chains:
        loop = Loop(chain)
        for layer, name in enumerate(_layer_names(chain.calls[0])):
            track = next((t.name for t in chain.tracks if _layer_of(t) == layer), name)
            states = ["h"] if chain.calls[0].c0 is None else ["h", "c"]
            names = {state: state if single else f"{track}.{state}" for state in states}
            found.append(Member(chain, loop, layer, names, track))
    return found


def _layer_names(call: Call) -> list[str]:
    if call.single:
        return [call.owner or "cell"]
    path = f"{call.owner}." if call.owner else ""
    return [f"{path}l{layer}" for layer in range(call.layers)]


def _layer_of(track: Track) -> int:
    return int(getattr(track.source, "layer", 0))
