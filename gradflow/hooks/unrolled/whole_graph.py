"""The whole graph under the roots of a backward, every node after all that it was made from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from gradflow.hooks.graph import LEAF, Edge, kind_of
from gradflow.limits import BACKWARD_NODES


class TooLarge(Exception):
    """The graph has more nodes than are looked at."""


class Unrolled:
    """All nodes that some roots were made from, in the order in which they were made.

    A node is named by its place, 0 for the first. Nodes that a call of torch's own recurrent
    functions made inside are stepped over: what it returned was made from what it was given.

    Args:
        roots: nodes to start from.
        given: number of a node -> edges that stand for what it was made from.

    Raises:
        TooLarge: there are more than `MOST` nodes.
    """

    def __init__(self, roots: Iterable[Any], given: Mapping[int, list[Edge]] | None = None) -> None:
        self.nodes: list[Any] = []
        # of every node: (place, output) it was made from
        self.inputs: list[list[tuple[int, int]]] = []
        self.constants: list[bool] = []  # whether it was also made from what needs no gradient
        self.numbers: list[int] = []
        self._collect(list(roots), {} if given is None else given)

    def __len__(self) -> int:
        return len(self.nodes)

    def _collect(self, stack: list[Any], given: Mapping[int, list[Edge]]) -> None:
        place: dict[Any, int] = {}
        opened: dict[Any, tuple[int, Any]] = {}  # node -> its number, and what it was made from
        while stack:
            node = stack[-1]
            if node in place:
                stack.pop()
                continue
            if node not in opened:
                number = node._sequence_nr()
                edges = given.get(number) if given else None
                edges = node.next_functions if edges is None else edges
                if len(opened) >= BACKWARD_NODES:
                    raise TooLarge
                opened[node] = (number, edges)
                below = [child for child, _ in edges if child is not None and child not in place]
                if below:
                    stack += below
                    continue
            stack.pop()
            number, edges = opened[node]
            place[node] = len(self.nodes)
            self.nodes.append(node)
            self.numbers.append(number)
            made_from = [(place[c], output) for c, output in edges if c is not None and c in place]
            self.inputs.append(made_from)
            self.constants.append(len(made_from) < len(edges))

    def places(self) -> dict[Any, int]:
        """Node -> its place."""
        return {node: place for place, node in enumerate(self.nodes)}

    def kind(self, place: int) -> str:
        """What a node does: "Tanh", "Addmm", ..."""
        return kind_of(self.nodes[place])

    def is_leaf(self, place: int) -> bool:
        """Whether it stands for a tensor that was not computed."""
        return self.numbers[place] >= LEAF
