"""The whole graph under the roots of a backward, every node after all that it was made from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gradflow.hooks.graph import LEAF, Edge, kind_of
from gradflow.limits import BACKWARD_NODES


class TooLarge(Exception):
    """The graph has more nodes than are looked at."""


class Unrolled:
    """All nodes that some roots were made from, in the order in which they were made.

    A node is named by its place, 0 for the first. Nodes that a call of torch's own recurrent
    functions made inside are stepped over: what it returned was made from the edges that are given for
    the number of its node.

    Raises:
        TooLarge: there are too many nodes.
    """

    def __init__(self, roots: Iterable[Any], given: Mapping[int, list[Edge]] | None = None) -> None:
        self.nodes: list[Any] = []
        # of every node: (place, output) it was made from
        self.inputs: list[list[tuple[int, int]]] = []
        self.constants: list[bool] = []  # whether it was also made from what needs no gradient
        self.numbers: list[int] = []
        self._collect(list(roots), given or {})

    def __len__(self) -> int:
        return len(self.nodes)

    def _collect(self, stack: list[Any], given: Mapping[int, list[Edge]]) -> None:
        """Depth first; as little as can be is kept of a node, for all that is kept is collected."""
        first: dict[Any, tuple[int, int] | None] = {}  # node -> (its place, 0); None: on the way
        # of those on the way what they were made from
        below: list[tuple[Any, int, Sequence[Edge]]] = []
        nodes, inputs = self.nodes, self.inputs
        constants, numbers = self.constants, self.numbers
        while stack:
            node = stack.pop()
            if node is None:  # all that the last one was made from is known
                node, number, edges = below.pop()
            elif node in first:
                continue
            else:
                if len(first) >= BACKWARD_NODES:
                    raise TooLarge
                first[node] = None
                number = node._sequence_nr()
                edges = given.get(number, node.next_functions)
                waiting = len(stack)
                for child, _ in edges:
                    if child is not None and child not in first:
                        if len(stack) == waiting:
                            stack.append(None)
                        stack.append(child)
                if len(stack) > waiting:
                    below.append((node, number, edges))
                    continue
            made_from = []
            for child, output in edges:
                edge = first[child] if child is not None else None
                if edge is not None:
                    made_from.append(edge if not output else (edge[0], output))
            first[node] = (len(nodes), 0)
            nodes.append(node)
            numbers.append(number)
            inputs.append(made_from)
            constants.append(len(made_from) < len(edges))

    def places(self) -> dict[Any, int]:
        """Node -> its place."""
        return {node: place for place, node in enumerate(self.nodes)}

    def kind(self, place: int) -> str:
        """What a node does: "Tanh", "Addmm", ..."""
        return kind_of(self.nodes[place])

    def is_leaf(self, place: int) -> bool:
        """Whether it stands for a tensor that was not computed."""
        return self.numbers[place] >= LEAF
