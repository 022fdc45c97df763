"""Read the joint step Jacobians of a closed loop from the user's graph, before a backward frees it.

Letters: B sequences, S the width of the joint state, A_t = ∂s_t/∂s_{t−1}.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradflow.hooks.closed.boundaries import buffers_read, crossing, crossing_any
from gradflow.hooks.closed.parts import MarkedPart, Seen
from gradflow.hooks.closed.standing import Standing, View, view_of_tensor
from gradflow.hooks.dense import Step, within
from gradflow.hooks.graph import Between, Edge, NotReadable, kind_of
from gradflow.hooks.loops.links import probe_of
from gradflow.hooks.tape import Constants
from gradflow.hooks.tapped import TAPPED, Mark
from gradflow.hooks.wide import MOVED, Moved, WideStep, wide_step, wide_within
from gradflow.limits import JACOBIAN_WIDEST

if TYPE_CHECKING:
    from gradflow.hooks.closed.loops import ClosedLoop, State

MORE = (
    "more goes around it than its states: what an earlier step made is read again later (attention "
    "over all earlier steps, a memory that grows)"
)
BATCHES = (
    "its parts run with different numbers of sequences, or in another order, so that no state of "
    "theirs belongs to one sequence"
)
CHANGING = "its batch changes between steps while something goes around beside the states"
UNEQUAL = (
    "its calls have different numbers of steps, and what they return of all of them goes on; give chunks "
    "of one length"
)
PACKED = (
    "its sequences have lengths of their own within a call, and the states between calls are read of calls "
    "in which all are as long"
)
NO_GRAPH = "some of its steps ran without a graph; run the whole loop with gradients enabled"
LATE = "a backward in the middle of it freed what its later steps depend on"
NOT_A_STATE = "depends on more of the past"  # of a marked loop that was read step by step
NO_BATCH = "something without a batch axis goes around it"


WHY_NOT = "step Jacobians were turned off with jacobians=False"


@dataclass(frozen=True)
class Ask:
    """What of the Jacobians is wanted."""

    jacobians: bool | None  # of `record`
    constants: Constants = field(default_factory=Constants)  # of wide steps

    @property
    def wants(self) -> bool:
        """Whether step Jacobians are taken at all."""
        return self.jacobians is not False

    def wide(self, width: int) -> bool:
        """Whether those of this width are kept as products, and not written out."""
        return self.jacobians is None and width > JACOBIAN_WIDEST


@dataclass(frozen=True)
class JointReading:
    """The joint states of a loop, one after the other, and all that crosses between them."""

    loop: ClosedLoop
    states: Sequence[State]
    extras: list[list[Edge]]  # of every state: what crosses after it besides what calls returned
    slots: list[tuple[tuple[int, ...], Any]]  # shape and dtype of those

    @staticmethod
    def of(
        loop: ClosedLoop, states: Sequence[State], every: set[Any], loss: Sequence[Any]
    ) -> JointReading:
        """Look at what crosses.

        every is the nodes of all calls of the loop, loss those that a backward starts from.

        Raises:
            NotReadable: more crosses than a state, or there is no graph.
        """
        if any(not seen.edges for state in states for seen in state.values()):
            raise NotReadable(NO_GRAPH)
        roots = {node for state in states for seen in state.values() for node in seen.nodes}
        ends = [max(seen.number for seen in state.values()) for state in states]
        found = crossing(roots, every, ends)
        extras = []
        for state, edges in zip(states, found, strict=True):
            known = {edge for seen in state.values() for edge in seen.edges}
            extras.append(sorted(edges - known, key=lambda e: (-e[0]._sequence_nr(), e[1])))
        extras = _without_unread(states, every, extras)
        slots = _slots(extras[:-1])
        if slots and loss:
            known = {edge for seen in states[-1].values() for edge in seen.edges}
            ended = crossing(loss, every, ends[-2:])[1] - known
            extras[-1] = _at_the_end(extras[-2], ended, ends[-2])
        if slots and not loop.begun and not extras[0]:  # of the first step nothing older descends
            since = ends[0] - (ends[1] - ends[0])
            known = {edge for seen in states[0].values() for edge in seen.edges}
            extras[0] = _alike(extras[1], crossing_any(roots, ends[0], since) - known)
        if loop.slots is not None and loop.slots != slots:
            raise NotReadable(MORE)
        if slots and not all(part.even for part in loop.parts):
            raise NotReadable(CHANGING)
        return JointReading(loop, states, extras, slots)

    @property
    def is_uneven(self) -> bool:
        """Whether its parts have different numbers of sequences at the end of some step."""
        return any(len({seen.batch for seen in state.values()}) > 1 for state in self.states)

    def _aligned(self, number: int) -> list[Edge | None]:
        """What crosses after a step, at the places of the slots."""
        edges = self.extras[number]
        nothing: list[Edge | None] = [None] * (len(self.slots) - len(edges))
        whole = [n for n, each in enumerate(self.extras) if len(each) == len(self.slots)]
        return [*nothing, *edges] if whole and number > whole[0] else [*edges, *nothing]

    def place(self, number: int, *, one: bool) -> Standing:
        """Where the state at the end of a step stands."""
        views: dict[Edge, list[View]] = {}
        rows: dict[str, Tensor] = {}
        state = self.states[number]
        for part in self.loop.parts:
            seen = state[id(part)]
            members = [m for m in self.loop.source.members if m.part is part]
            views |= seen.views(members)
            rows |= seen.rows(members)
        batch = len(next(iter(rows.values())))
        for edge, name, (shape, dtype) in zip(
            self._aligned(number), self.loop.source.extras, self.slots, strict=True
        ):
            view = view_of_tensor(name, shape, batch)
            if view is None:
                raise NotReadable(NO_BATCH)
            like = next(iter(rows.values()))
            rows[name] = like.new_zeros(batch, torch.Size(shape).numel() // batch, dtype=dtype)
            if edge is not None:
                views[edge] = [view]
        return Standing.holding(views, rows, one=one)


def _without_unread(
    states: Sequence[State], every: set[Any], extras: list[list[Edge]]
) -> list[list[Edge]]:
    """Without buffers that steps are written into and of which nothing older is read."""
    buffers = {e for each in extras for e in each if kind_of(e[0]) == "CopySlices"}
    if not buffers:
        return extras
    left: list[list[Edge]] = [[] for _ in extras]
    read: dict[Edge, bool] = {}  # by the steps from some step on -> whether all of it
    for number in range(len(states) - 1, -1, -1):
        left[number] = [edge for edge in extras[number] if edge not in buffers or edge in read]
        if not all(read[edge] for edge in left[number] if edge in buffers):
            raise NotReadable(MORE)
        steps = states[number].values()
        roots = {node for seen in steps for node in (*seen.starts, *seen.inputs)} - every
        for edge, whole in buffers_read(roots, every, buffers).items():
            read[edge] = whole or read.get(edge, False)
    return left


def _slots(extras: Sequence[Sequence[Edge]]) -> list[tuple[tuple[int, ...], Any]]:
    """Shape and dtype of what crosses besides the states, youngest first, if that settles.

    There may be less of it at first, as nothing old is there yet, and at last, as nothing reads what
    is young any more.
    """
    kinds = [[_kind(edge) for edge in edges] for edges in extras]
    full = max(kinds, key=len, default=[])
    settled = [number for number, known in enumerate(kinds) if len(known) == len(full)]
    if not full:
        return []
    first, last = settled[0], settled[-1]
    fits = (
        len(settled) == last - first + 1 > 1
        and all(kinds[number] == full for number in settled)
        and all(known == full[: len(known)] for known in kinds[:first])
        and all(known == full[len(full) - len(known) :] for known in kinds[last + 1 :])
    )
    if not fits:
        raise NotReadable(MORE)
    return full


def _at_the_end(before: Sequence[Edge], found: set[Edge], since: int) -> list[Edge]:
    """What goes on from the last step to the loss in the place of what crossed before it."""
    last = [edge for edge in found if edge[0]._sequence_nr() >= since]
    return _alike(before, last)


def _alike(wanted: Sequence[Edge], found: Iterable[Edge]) -> list[Edge]:
    """For each of some edges the one that is made alike; none where that is not one for each."""
    chosen = []
    for edge in wanted:
        like = [
            e
            for e in found
            if (_kind(e), type(e[0]), e[1]) == (_kind(edge), type(edge[0]), edge[1])
        ]
        if len(like) != 1:
            return []
        chosen += like
    return chosen


def _kind(edge: Edge) -> tuple[tuple[int, ...], Any]:
    known = edge[0]._input_metadata[edge[1]]
    return tuple(int(size) for size in known.shape), known.dtype


def read(reading: JointReading, ask: Ask, *, one: bool) -> list[tuple[Standing, Mark]]:
    """A mark for every joint state, with the Jacobian of the step that led to it.

    Raises:
        Mixed: sequences depend on one another, and are not taken as one system.
        NotReadable: the graph cannot be read.
    """
    found: list[tuple[Standing, Mark]] = []
    for number in range(len(reading.states)):
        place = reading.place(number, one=one)
        mark = Mark(
            states=_values(reading, number, one=one),
            grad_enabled=True,
            differentiable=True,
            cut=torch.zeros(len(place.like), dtype=torch.bool, device=place.like.device),
        )
        if not ask.wants:
            mark.unknown = WHY_NOT
        else:
            wide = ask.wide(place.like.shape[1])
            mark.within = wide_within(place, ask.constants) if wide else within(place)
            mark.within_known = True
            if found:
                step = step_between(found[-1][0], place, ask, number)
                mark.jacobian, mark.cut, mark.rows = step
        found.append((place, mark))
    return found


def step_between(
    before: Standing, now: Standing, ask: Ask, number: int
) -> tuple[Tensor | WideStep, Tensor, Tensor | None]:
    """A_t (b, S, S), the sequences (b,) in which nothing of the state before arrives, and their rows.

    rows are as in `Link`: where the sequences were in the state before.
    """
    wide, moved = ask.wide(now.like.shape[1]), len(now.like) != len(before.like)
    roots = [edge for edge, _ in now.roots.values()]
    between = Between(roots, before.nodes, before.since)
    if not between.reached:
        if moved:
            raise NotReadable(BATCHES)
        size = now.like.shape[1]
        zero = WideStep() if wide else now.like.new_zeros(len(now.like), size, size)
        return zero, torch.ones(len(now.like), dtype=torch.bool, device=now.like.device), None
    step = Step(before, now, between)
    if wide:
        if moved:
            raise Moved(MOVED)
        flows = (step.pull(probe_of(now.like)) != 0).any(1)
        return wide_step(step, ask.constants, number), step.cut(flows), None
    jacobian = step.jacobian()
    return jacobian, step.cut(jacobian.flatten(1).any(1)), step.rows


def _values(reading: JointReading, number: int, *, one: bool) -> dict[str, Tensor]:
    rows: dict[str, Tensor] = {}
    state = reading.states[number]
    for member in reading.loop.source.members:
        rows |= state[id(member.part)].rows([member])
    batch = len(next(iter(rows.values())))
    for name, (shape, dtype) in zip(reading.loop.source.extras, reading.slots, strict=True):
        like = next(iter(rows.values()))
        rows[name] = like.new_zeros(batch, torch.Size(shape).numel() // batch, dtype=dtype)
    return {name: row.reshape(1, -1) if one else row for name, row in rows.items()}


def carries_more(part: MarkedPart, steps: Sequence[Seen]) -> bool:
    """Whether a marked loop carries more than its states, as far as its own reading does not tell.

    Its steps were read one by one as they came, each looked at back to the states two steps before.
    What is older than those, and comes in beside them, is seen here alone.
    """
    marks = part.source.marks
    if part.source.mixed:
        return False
    if any(mark.unknown for mark in marks):
        reasons = {mark.unknown for mark in marks if mark.unknown}
        return any(NOT_A_STATE in reason or "mixes the sequences" in reason for reason in reasons)
    steps = [seen for seen in steps if seen.number]
    if len(steps) < 3:
        return False
    nodes = {node for seen in steps for node in seen.nodes}
    ends = [seen.number for seen in steps]
    for number, edges in enumerate(crossing(nodes, nodes, ends)[1:], start=1):
        old = {edge for edge in edges if edge[0]._sequence_nr() <= ends[number - 1]}
        if old - set(steps[number].edges):
            return True
    return False


def note_more(part: MarkedPart) -> None:
    """Say on the last mark of a tapped loop that it carries more, unless something is said already."""
    mark = part.source.marks[-1]
    if not any(mark.unknown for mark in part.source.marks):
        mark.unknown = f"a state that {NOT_A_STATE} than the states before it, so {TAPPED.more}"


def in_words(error: NotReadable) -> str:
    """Why a loop could not be read, as a clause."""
    text = str(error)
    clauses = (MORE, BATCHES, CHANGING, UNEQUAL, PACKED, NO_GRAPH, LATE, NO_BATCH)
    whole = text in clauses or text.startswith(("wide steps", "step Jacobians"))
    if text.startswith("what a checkpoint"):
        text += "; record one step without the checkpoint"
    return text if whole else f"between two of its steps lies {text}"
