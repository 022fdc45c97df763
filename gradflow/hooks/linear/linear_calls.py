"""The linear recurrences of a recording: their calls, which of them go on from one before."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from gradflow.hooks.by_value import compared
from gradflow.hooks.graph import Between, Edge, NotReadable, edge_of, is_another, ones_at
from gradflow.hooks.lengths import GivenLengths
from gradflow.hooks.linear.linear_source import LinearSource, Stretch
from gradflow.hooks.linear.scanned import Scanned
from gradflow.hooks.marks import TrackOwner
from gradflow.recording.track import Track

UNJOINED = (
    "it was marked again without initial=, so it is a track of its own; where it goes on from the one "
    "before, give scan that one's last state as initial="
)
CUT_AT = "its first state is handed from call to call, and no gradient comes back to it"


@dataclass(eq=False)
class LastScan:
    """The last call of a recurrence, with live tensors: what the next may go on from."""

    source: LinearSource
    track: Track
    key: tuple[object, ...]  # its name, kind and place in the code
    last: Tensor | None = None  # (B, S) copy of the last state that was returned
    edge: Edge | None = None  # where that, or what it was taken from, sits in the graph
    edges: dict[str, Edge] = field(default_factory=dict)  # of all that was returned


class LinearOwner(TrackOwner, Protocol):
    """The recorder, as far as linear recurrences need it."""

    handles: list[RemovableHandle]
    lengths: GivenLengths

    def scale(self) -> float: ...
    def wants_track(self, name: str) -> bool: ...


@dataclass(eq=False)
class LinearCalls:
    """All of them, in their order."""

    owner: LinearOwner  # the recorder
    seen: bool = False  # also where no track was wanted
    _ends: list[LastScan] = field(default_factory=list)
    _held: list[Edge] = field(default_factory=list)  # a leaf's node lives no longer than it is held

    def saw(self, scanned: Scanned, code: tuple[object, ...] = ()) -> None:
        """One call: more steps of an open recurrence, or the first of a new one."""
        self.seen = True
        owner = self.owner
        if not owner.wants_track(scanned.name):
            return
        key = scanned.name, scanned.cell, *code
        cut = end = None
        for end in reversed(self._ends if scanned.initial is not None else []):
            cut = _cut(end, scanned) if end.key == key else None
            if cut is not None:
                break
        stretch, edges = _stretch(scanned, cut)
        if end is not None and cut is not None:
            end.source.closed = end.source.closed or _is_closed(end, scanned, stretch)
            end.source.stretches.append(stretch)
        else:
            again = any(other.key == key for other in self._ends)
            end = LastScan(*self._begun(scanned, stretch, code), key)
            self._ends.append(end)
            if again and scanned.cell == "scan" and scanned.initial is None:
                end.source.remarks.append(UNJOINED)
        end.last, end.edge = _last(scanned, stretch.known_states)
        end.edges = edges
        source, track = end.source, end.track
        _lengthened(source, scanned)
        source.remarks = list(dict.fromkeys([*source.remarks, *scanned.notes]))
        owner.handles += source.listen(stretch, edges)
        self._held += edges.values()
        _grown(source, track)

    def _begun(
        self, scanned: Scanned, stretch: Stretch, code: tuple[object, ...]
    ) -> tuple[LinearSource, Track]:
        owner = self.owner
        source = LinearSource(
            owner.scale,
            scanned.cell,
            lengths=owner.lengths.of_steps(scanned.batch),
            reverse=scanned.reverse,
            stretches=[stretch],
        )
        nothing = torch.zeros(0, scanned.batch, dtype=torch.bool, device=stretch.cut.device)
        track = Track(
            name=scanned.name,
            cell=scanned.cell,
            reverse=scanned.reverse,
            lengths=torch.zeros(scanned.batch, dtype=torch.long),
            mask=nothing,
            cuts=nothing,
            weights={},
            source=source,
            training=owner.training,
            owner=scanned.name,
            state_shape=scanned.shape,
            code=code,
        )
        owner.add_track(scanned.name, track)
        source.name, source.told = track.name, source.lengths is not None
        source.remarks += owner.lengths.notes
        return source, track

    @property
    def sources(self) -> list[LinearSource]:
        """Of every recurrence."""
        return [end.source for end in self._ends]

    def close(self) -> None:
        """Let go of the user's graph."""
        self._ends.clear()
        self._held.clear()


def _stretch(scanned: Scanned, cut: Tensor | None) -> tuple[Stretch, dict[str, Edge]]:
    live = {"output": scanned.output, "final": scanned.final, "states": scanned.states}
    given = {name: tensor for name, tensor in live.items() if tensor is not None}
    device = next(iter(given.values())).device
    edges = {name: edge for name, tensor in given.items() if (edge := edge_of(tensor))}
    states = scanned.states
    known = None
    if states is not None:
        known = states.detach()
        known = known if scanned.states_back is None else scanned.states_back(known)
        known = known.reshape(scanned.steps, scanned.batch, *scanned.shape).clone()
    if cut is None:
        cut = torch.zeros(scanned.batch, dtype=torch.bool, device=device)
    cuts = None if scanned.cuts is None else scanned.cuts.clone()
    kept = replace(
        scanned, cuts=cuts, output=None, final=None, initial=None, states=None, inputs=()
    )
    stretch = Stretch(
        call=kept,
        cut=cut,
        grad_enabled=torch.is_grad_enabled(),
        differentiable=bool(edges),
        known_states=known,
        returned=None if scanned.output is None else scanned.output.detach().clone(),
        final_holds_output=_comes_from(edges.get("output"), edges.get("final"), within=True),
    )
    return stretch, edges


def _last(scanned: Scanned, known: Tensor | None) -> tuple[Tensor | None, Edge | None]:
    """A copy (B, S) of the last state, and where what it can be taken from sits in the graph."""
    if scanned.final is not None:
        return _rows(scanned.final, scanned.batch), edge_of(scanned.final)
    if scanned.states is None or known is None:
        return None, None
    return known[-1].flatten(1), edge_of(scanned.states)


def _rows(state: Tensor, batch: int) -> Tensor | None:
    """(B, S), in whatever order its layout has; None where it is not one state of every sequence."""
    found = state.detach()
    return found.reshape(batch, -1).clone() if found.numel() % batch == 0 else None


def _cut(end: LastScan, scanned: Scanned) -> Tensor | None:
    """(B,) which sequences start cut off from the last call; None where this is a start of its own.

    A call goes on where the state that it was given is, sequence by sequence, the one returned last,
    or zeros: a reset. Whether a gradient comes back tells the graph.
    """
    source = end.source
    if scanned.initial is None or end.last is None or source.batch != scanned.batch:
        return None
    if source.stretches[0].call.shape != scanned.shape or source.reverse or scanned.reverse:
        return None
    given = _rows(scanned.initial, scanned.batch)
    if given is None or given.shape != end.last.shape:
        return None
    same, reset = compared(given.to(end.last.dtype), end.last)
    if not bool((same | reset).all()):
        return None
    linked = _comes_from(edge_of(scanned.initial), end.edge)
    if not linked and bool(reset.all()):
        return None  # from a start of its own
    if scanned.cut or not linked:
        if torch.is_grad_enabled():
            source.remarks.append(scanned.cut or CUT_AT)
        return torch.ones_like(same)
    return ~same


def _is_closed(end: LastScan, scanned: Scanned, stretch: Stretch) -> bool:
    """Whether more comes back to the call before than through the first state that a call is given."""
    before = end.source.stretches[-1].call
    ends = end.edges.values()
    if any(_comes_from(edge_of(one), edge) for one in scanned.inputs for edge in ends):
        return True
    root = None if scanned.states is None else edge_of(scanned.states)
    if root is None or end.edge is None or not before.states_back or not scanned.states_back:
        return False
    try:
        found = Between([root], {end.edge[0]}).pull([(root, ones_at(root))]).get(end.edge)
    except NotReadable:
        found = None
    if found is None:
        return False
    made = scanned.make()
    ones = scanned.states_back(ones_at(root)).reshape(made.length, made.batch, *made.shape)
    last = made.pull(0, made.totals(ones)[0].flatten(1).unsqueeze(1))[:, 0]
    expected = last.new_zeros(before.steps, *last.shape)
    expected[-1] = last.masked_fill(stretch.cut.unsqueeze(1), 0.0)
    return is_another(before.states_back(found).reshape(expected.shape), expected)


def _comes_from(mine: Edge | None, edge: Edge | None, *, within: bool = False) -> bool:
    """Whether a path of the graph leads from a tensor back to an earlier one, perhaps within one call."""
    if mine is None or edge is None:
        return False
    since = edge[0]._sequence_nr() if within else None
    try:
        return edge[0] in Between([mine], {edge[0]}, since=since).reached
    except NotReadable:
        return False


def _lengthened(source: LinearSource, scanned: Scanned) -> None:
    """The real steps of a recurrence with one more call, where a mask of the model's tells them."""
    if source.told:
        return
    steps = torch.full((source.batch,), scanned.steps)
    before = torch.full_like(steps, source.steps - scanned.steps)
    known = before if source.lengths is None else source.lengths
    now = steps if scanned.lengths is None else scanned.lengths
    lengths = torch.where(known == before, known + now, known)
    source.lengths = None if bool((lengths == source.steps).all()) else lengths


def _grown(source: LinearSource, track: Track) -> None:
    """The track of a recurrence that has one more call."""
    device, steps = source.stretches[0].cut.device, source.steps
    lengths = torch.full((source.batch,), steps)
    if source.lengths is not None:
        lengths = source.lengths.clamp(max=steps)
    time = torch.arange(steps).unsqueeze(1)
    track.lengths = lengths.to(device)
    track.mask = (time < lengths).to(device)
    cuts = []
    for stretch in source.stretches:
        here = torch.zeros(stretch.call.steps, source.batch, dtype=torch.bool, device=device)
        here[0] = stretch.cut
        if stretch.call.cuts is not None:
            begins = stretch is source.stretches[0]
            here |= stretch.call.cuts.to(device)
            here[0] &= not begins
        cuts.append(here)
    track.cuts = torch.cat(cuts)
    track.read_anew()


def tensors_of(sources: Iterable[LinearSource]) -> list[Tensor]:
    """One tensor of each recurrence, which tells device and dtype."""
    found = []
    for source in sources:
        first = source.stretches[0]
        found += [t for t in (first.known_states, first.returned) if t is not None][:1]
    return found
