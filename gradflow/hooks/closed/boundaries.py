"""What crosses from one step of a loop to the next: edges of the graph, from the younger side to the older.

A boundary is a number: nodes numbered up to it were made before, all others after. An edge crosses
it if it leads from a node made after to one made before that descends from a state of the loop. What
does not descend from a state was given: inputs, weights, an encoder's memory.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from torch import Tensor

from gradflow.hooks.graph import LEAF, Edge, NotReadable, descended, outputs
from gradflow.limits import STEP_NODES


def crossing(
    roots: Iterable[Any], states: Collection[Any], boundaries: Sequence[int]
) -> list[set[Edge]]:
    """The edges that cross each boundary, in ascending order, on the way from the roots to any state.

    Roots and states are nodes; what leads to no root (to the loss alone) is not seen.

    Raises:
        NotReadable: the loop has too many operations.
    """
    oldest = min(node._sequence_nr() for node in states)
    known = set(states)
    found = _younger(roots, oldest)
    found.sort(key=lambda node: int(node._sequence_nr()))
    descends: set[Any] = set()
    result: list[set[Edge]] = [set() for _ in boundaries]
    for node in found:
        number = node._sequence_nr()
        below = [edge for edge in node.next_functions if edge[0] in descends]
        if below or node in known:
            descends.add(node)
        end = bisect_left(boundaries, number)
        for edge in below:
            for place in range(bisect_left(boundaries, edge[0]._sequence_nr()), end):
                result[place].add(edge)
    return result


def crossing_any(roots: Iterable[Any], boundary: int, since: int) -> set[Edge]:
    """The same of one boundary, from nodes numbered `since` and later, whatever they descend from."""
    return {
        edge
        for node in _younger(roots, since)
        if node._sequence_nr() > boundary
        for edge in node.next_functions
        if edge[0] is not None and since <= edge[0]._sequence_nr() <= boundary
    }


def _younger(roots: Iterable[Any], oldest: int) -> list[Any]:
    """All ancestors of the roots that are no older than a number, the roots themselves included."""
    seen: set[Any] = set()
    stack = list(roots)
    while stack:
        node = stack.pop()
        if node in seen or not oldest <= node._sequence_nr() < LEAF:
            continue
        if len(seen) >= STEP_NODES * 10:
            raise NotReadable(f"more than {STEP_NODES * 10} operations")
        seen.add(node)
        stack += [child for child, _ in node.next_functions if child is not None]
    return list(seen)


def buffers_read(
    roots: Iterable[Any], ends: Collection[Any], buffers: Collection[Edge]
) -> dict[Edge, bool]:
    """The buffers that are read in a step, tensors written in place -> whether they are read as a whole.

    Of a buffer that takes one step after the other only the last row is read, as a rule, and that is
    what was written there: the buffer itself goes nowhere, though the graph leads through it. roots are
    nodes of what the calls of the step were given, ends those of all its states.
    """
    found: dict[Edge, Tensor] = {}
    since = min((node._sequence_nr() for node in ends), default=LEAF)

    def is_end(node: Any) -> bool:
        return node in ends or not since <= node._sequence_nr() < LEAF

    for root in roots:
        given = [(root, place) for place in range(outputs(root))]
        for node, entries in descended(given, is_end):
            for place, entry in entries.items():
                edge = (node, place)
                if edge in buffers:
                    found[edge] = found[edge] + entry if edge in found else entry
    return {edge: bool((entry != 0).all()) for edge, entry in found.items()}
