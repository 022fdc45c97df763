"""Pieces of one loop: where the state was detached, the next piece goes on from where one ended.

No path of the graph leads from piece to piece, so their values tell: what the first step of a piece
computed with is the last state of the piece before, or its tanh, or that beside an input.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from torch import Tensor

from gradflow.hooks.by_value import holds
from gradflow.hooks.graph import Edge, kind_of, saved_by
from gradflow.hooks.marks import LastMark
from gradflow.limits import PIECE_NODES


@dataclass(eq=False)
class Piece:
    """A loop as far as it was seen: one more piece may follow."""

    end: LastMark
    last: list[Edge]  # the states of its last step
    rows: list[Tensor]  # their values, (B, width) each

    def goes_on(self, first: list[Edge]) -> bool:
        """Whether a piece whose first states are these began with the last states of this one."""
        if [_form(edge) for edge in first] != [_form(edge) for edge in self.last]:
            return False
        since = max(node._sequence_nr() for node, _ in self.last)
        return any(holds(found, row) for found in _used(first, since) for row in self.rows)


def _form(edge: Edge) -> tuple[object, ...]:
    known = edge[0]._input_metadata[edge[1]]
    return kind_of(edge[0]), edge[1], tuple(known.shape), known.dtype


def _used(states: list[Edge], since: int) -> list[Tensor]:
    """What the operations that made these states, and are newer than a number, computed with."""
    found: list[Tensor] = []
    seen = {node for node, _ in states}
    queue = deque(seen)
    while queue and len(seen) < PIECE_NODES:
        node = queue.popleft()
        found += saved_by(node)
        for child, _ in node.next_functions:
            if child is not None and child not in seen and since < child._sequence_nr():
                seen.add(child)
                queue.append(child)
    return found
