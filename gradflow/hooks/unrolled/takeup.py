"""A loop written by hand becomes a track: its states, told from the graph, are marked as `tap` would.

This happens right before the first backward through it, when its graph is complete and nothing of it
is freed: the gradients that then reach its states are the totals, and the step Jacobians are read
from the graph as those between two taps are.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from gradflow.hooks.axes import Axis, usual_axis
from gradflow.hooks.dense import Place, Step
from gradflow.hooks.graph import Between, Edge, NotReadable, is_hooked
from gradflow.hooks.loops.links import probe_of
from gradflow.hooks.marks import LastMark, Marks
from gradflow.hooks.own.returned import row_of
from gradflow.hooks.tapped import UNROLLED, TapSource
from gradflow.hooks.unrolled.loop_states import NO_VALUE, LoopStates, NoRows, NoState
from gradflow.hooks.unrolled.values import Values
from gradflow.hooks.unrolled.whole_graph import Unrolled
from gradflow.limits import LOOP_STEPS, STATE_ENTRIES


def checked(graph: Unrolled, steps: LoopStates) -> LoopStates:
    """The steps, with the batch axes of the states, if these can be those of a track.

    Raises:
        NoState: they are of a shape or type that is not read, sequences are mixed, or an operation of
            the loop cannot be called by itself.
    """
    for shape, dtype in _shapes(steps.edges[0]):
        if not dtype.is_floating_point:
            raise NoState(f"one of its states is {dtype}, and only real states are read")
        if not shape or not 0 < math.prod(shape) <= STATE_ENTRIES:
            raise NoState(f"a state of shape {tuple(shape)} is a single number, empty or too large")
    first = min(node._sequence_nr() for node, _ in steps.edges[0])
    last = max(node._sequence_nr() for node, _ in steps.edges[-1])
    for node, number in zip(graph.nodes, graph.numbers, strict=True):
        if first <= number <= last and is_hooked(node):
            raise NoState(
                "it runs in a checkpoint, or under other hooks on saved tensors, where its values "
                "are not to be read"
            )
    try:
        steps = replace(steps, axes=_axes(steps))
        unfit = _unfit(steps)
        if unfit and all(len(shape) == 2 for shape, _ in _shapes(steps.edges[0])):
            columns = replace(steps, axes=(1,) * len(steps.axes))  # of W @ h, each a sequence
            steps, unfit = (steps, unfit) if _unfit(columns) else (columns, "")
        if unfit:
            raise NoState(unfit)
    except NotReadable as error:
        raise NoState(f"{error} is in it, which cannot be called by itself") from error
    return steps


def _shapes(edges: list[Edge]) -> list[tuple[torch.Size, torch.dtype]]:
    known = [node._input_metadata[output] for node, output in edges]
    return [(torch.Size(m.shape), m.dtype) for m in known]


def _axes(steps: LoopStates) -> tuple[Axis, ...]:
    """Which axis of each state is the batch: the one along which a step mixes nothing."""
    middle = max(1, len(steps.edges) // 2)
    before, now = steps.edges[middle - 1 : middle + 1]
    shapes = [shape for shape, _ in _shapes(now)]
    batches = {shape[0] for shape in shapes if len(shape) == 2}
    found: list[Axis] = []
    for number, shape in enumerate(shapes):
        if len(shape) < 3 or (len(shape) == 3 and shape[0] == 1):
            found.append(usual_axis(shape))
            continue
        apart = _apart(before, now, number) or [0]
        fitting = [axis for axis in apart if shape[axis] in batches] or apart
        if len(fitting) > 1 and len(shape) == 3:
            raise NoRows(
                f"along several axes of its state of shape {tuple(shape)} nothing is mixed, so it "
                "does not tell its sequences apart from its units",
                tuple(shape),
            )
        found.append(fitting[0])
    return tuple(found)


def _apart(before: list[Edge], now: list[Edge], number: int) -> list[int]:
    """The axes of one state along which no entry of a step depends on another entry's past."""
    (shape, dtype), (node, output) = _shapes(now)[number], now[number]
    like = torch.zeros(shape, dtype=dtype, device=node._input_metadata[output].device)
    between = Between([now[number]], {one for one, _ in before}, 0)
    probe = probe_of(like)

    def mixes(axis: int, bit: int, one: int) -> bool:
        """Whether places with a bit depend on places without it, or the other way round."""
        chosen = torch.arange(shape[axis], device=like.device) >> bit & 1 == one
        seed = probe.movedim(axis, -1) * chosen
        pulled = between.pull([(now[number], seed.movedim(-1, axis))]).get(before[number])
        return pulled is None or bool(pulled.movedim(axis, -1)[..., ~chosen].any())

    def is_apart(axis: int) -> bool:
        # two places differ in one bit of their numbers at least
        bits = range((shape[axis] - 1).bit_length())
        return not any(mixes(axis, bit, one) for bit in bits for one in (0, 1))

    return [axis for axis in range(len(shape) - 1) if shape[axis] > 1 and is_apart(axis)]


def _unfit(steps: LoopStates) -> str:
    """Why these axes are no batch, or nothing: a sequence of a middle step must depend on itself alone."""
    shapes = [shape for shape, _ in _shapes(steps.edges[0])]
    if len({1 if a is None else s[a] for s, a in zip(shapes, steps.axes, strict=True)}) > 1:
        return "its states are not of one batch"
    middle = max(1, len(steps.edges) // 2)
    before, now = (_place(edges, steps.axes) for edges in steps.edges[middle - 1 : middle + 1])
    seed = probe_of(now.like)
    seed[1:] = 0
    step = Step.find(before, now, set(), 0)
    if step is None:
        raise NoState("no path leads from one of its steps to the next")
    mixed = bool((step.pull(seed)[1:] != 0).any())
    why = "the rows of its state depend on one another, so they are not sequences of a batch"
    return why if mixed else ""


def _place(edges: list[Edge], axes: tuple[Axis, ...]) -> Place:
    """The place of some states of unknown value."""
    names = [f"s{number}" for number in range(len(edges))]
    devices = [node._input_metadata[output].device for node, output in edges]
    known = zip(_shapes(edges), axes, devices, strict=True)
    rows = [row_of(torch.zeros(s, dtype=d, device=device), axis) for (s, d), axis, device in known]
    return _placed(names, edges, rows, axes)


def _placed(
    names: list[str], edges: list[Edge], rows: list[Tensor], axes: tuple[Axis, ...]
) -> Place:
    shapes = [shape for shape, _ in _shapes(edges)]
    return Place.at(
        dict(zip(names, edges, strict=True)),
        dict(zip(names, shapes, strict=True)),
        dict(zip(names, rows, strict=True)),
        dict(zip(names, axes, strict=True)),
    )


def with_rows(values: Values, steps: LoopStates) -> tuple[LoopStates, list[list[Tensor]]]:
    """The steps, and the values of all states at all of them, (B, width) each.

    Where only those of the last step are not to be had, that step is left out.

    Raises:
        NoState: those of another step are not to be had.
    """
    found = []
    for edges in steps.edges:
        tensors = [values.of(edge) for edge in edges]
        if any(tensor is None for tensor in tensors):
            break
        pairs = zip(tensors, steps.axes, strict=True)
        found.append([row_of(t, axis) for t, axis in pairs if t is not None])
    if len(found) == len(steps.edges):
        return steps, found
    if len(found) < max(len(steps.edges) - 1, LOOP_STEPS):
        raise NoState("no operation keeps the values of its states")
    return replace(steps, edges=steps.edges[:-1], notes=(*steps.notes, NO_VALUE)), found


def take_up(
    marks: Marks,
    name: str,
    cell: str,
    steps: LoopStates,
    names: list[str],
    rows: list[list[Tensor]],
    end: LastMark | None = None,
) -> LastMark:
    """The track of a loop; its hooks are set, and the gradients come with the backward.

    cell is the class of the module that loops; names are of the states, rows their values from `with_rows`.
    Given the end of a loop that it goes on with, it is cut off from that. Returns where it has come to.
    """
    for edges, values in zip(steps.edges, rows, strict=True):
        states = dict(zip(names, values, strict=True))
        place = _placed(names, edges, values, steps.axes)
        mark = Marks.new(place, states)
        mark.grad_enabled = True
        if end is None:
            source = TapSource(marks.owner.scale, cell=cell, marks=[mark], own_words=UNROLLED)
            end = marks.begin(name, source, {}, place)
        else:
            if not marks.by_graph(end, place, mark):
                marks.without_graph(end, place, mark)
            Marks.extend(end, mark)
        marks.settle(end, {}, place, mark)
    assert end is not None
    return end
