"""A loop written by hand becomes a track: its states, told from the graph, are marked as `tap` would.

This happens right before the first backward through it, when its graph is complete and nothing of it
is freed: the gradients that then reach its states are the totals, and the step Jacobians are read
from the graph as those between two taps are.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gradflow.hooks.axes import usual_axis
from gradflow.hooks.dense import Place, Step
from gradflow.hooks.graph import Edge, NotReadable
from gradflow.hooks.loops.links import probe_of
from gradflow.hooks.marks import Marks
from gradflow.hooks.own.returned import row_of
from gradflow.hooks.tapped import UNROLLED, TapSource
from gradflow.hooks.unrolled.order import Unrolled
from gradflow.hooks.unrolled.steps import NoRows, NoState, Steps
from gradflow.hooks.unrolled.values import Values, is_hooked
from gradflow.limits import STATE_ENTRIES
from gradflow.recording import Track


def checked(graph: Unrolled, steps: Steps) -> None:
    """See that the states can be those of a track, before anything is made of them.

    Raises:
        NoState: they are of a shape or type that is not read, sequences are mixed, or an operation of
            the loop cannot be called by itself.
    """
    batches = set()
    for node, output in steps.edges[0]:
        known = node._input_metadata[output]
        shape, dims = tuple(known.shape), len(known.shape)
        if not known.dtype.is_floating_point:
            raise NoState(f"one of its states is {known.dtype}, and only real states are read")
        if not dims or (dims == 3 and shape[0] != 1) or not 0 < math.prod(shape) <= STATE_ENTRIES:
            kind = NoRows if dims > 2 else NoState
            raise kind(f"a state of shape {shape} does not tell its sequences apart from its units")
        batches.add(1 if dims == 1 else shape[1] if dims == 3 else shape[0])
    if len(batches) > 1:
        raise NoState("its states are not of one batch")
    first, last = (
        min(node._sequence_nr() for node, _ in steps.edges[0]),
        max(node._sequence_nr() for node, _ in steps.edges[-1]),
    )
    for node, number in zip(graph.nodes, graph.numbers, strict=True):
        if first <= number <= last and is_hooked(node):
            raise NoState(
                "it runs in a checkpoint, or under other hooks on saved tensors, where its values "
                "are not to be read"
            )
    _check_mixing(steps)


def _check_mixing(steps: Steps) -> None:
    """One sequence of a middle step must depend on that sequence of the step before alone."""
    middle = max(1, len(steps.edges) // 2)
    before, now = (_place(edges) for edges in steps.edges[middle - 1 : middle + 1])
    seed = probe_of(now.like)
    seed[1:] = 0
    try:
        step = Step.find(before, now, set(), 0)
        pulled = step.pull(seed) if step is not None else None
    except NotReadable as error:
        raise NoState(f"{error} is in it, which cannot be called by itself") from error
    if pulled is None:
        raise NoState("no path leads from one of its steps to the next")
    if bool((pulled[1:] != 0).any()):
        raise NoState(
            "the rows of its state depend on one another, so they are not sequences of a batch"
        )


def _place(edges: list[Edge]) -> Place:
    """The place of some states of unknown value."""
    known = {f"s{i}": node._input_metadata[output] for i, (node, output) in enumerate(edges)}
    rows = {
        name: row_of(
            torch.zeros(tuple(m.shape), dtype=m.dtype, device=m.device),
            usual_axis(torch.Size(m.shape)),
        )
        for name, m in known.items()
    }
    shapes = {name: torch.Size(m.shape) for name, m in known.items()}
    return Place.at(dict(zip(known, edges, strict=True)), shapes, rows)


def rows_of(values: Values, steps: Steps) -> list[list[Tensor]]:
    """The values of all states at all steps, (B, width) each.

    Raises:
        NoState: one of them is not to be had.
    """
    found = []
    for edges in steps.edges:
        tensors = [values.of(edge) for edge in edges]
        if any(tensor is None for tensor in tensors):
            raise NoState("no operation keeps the values of its states")
        found.append([row_of(t, usual_axis(t.shape)) for t in tensors if t is not None])
    return found


def take_up(
    marks: Marks, name: str, cell: str, steps: Steps, names: list[str], rows: list[list[Tensor]]
) -> Track:
    """The track of a loop; its hooks are set, and the gradients come with the backward.

    Args:
        marks: of the recording.
        name: of the track.
        cell: class name of the module that loops.
        steps: the states, as edges.
        names: of the states, in that order.
        rows: their values, from `rows_of`.
    """
    end = None
    for edges, values in zip(steps.edges, rows, strict=True):
        shapes = {
            name: torch.Size(node._input_metadata[output].shape)
            for name, (node, output) in zip(names, edges, strict=True)
        }
        states = dict(zip(names, values, strict=True))
        place = Place.at(dict(zip(names, edges, strict=True)), shapes, states)
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
    return end.track
