"""The whole graph under the roots of a backward, and what crosses from one step of a loop in it to the next.

Letters: T steps, n_t the number of the first operation of step t (operations are numbered as they are
made). An edge, one output of one operation, crosses the boundary into step t if it was made before
n_t, is used by an operation from n_t on, comes from an operation that marks an earlier step and leads
to one that marks step t or a later one. Those edges are all that step t knows of the past: the step
Jacobian ∂(edges into t + 1)/∂(edges into t) composes, and that of anything less does not.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gradflow.hooks.graph import LEAF, Edge, kind_of
from gradflow.limits import BACKWARD_NODES

FAR = 2**62


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


# ---------------------------------------------------------------------- what crosses between steps


def edges_between(
    graph: Unrolled, marks: Mapping[int, int], boundaries: Sequence[int]
) -> list[list[Edge]]:
    """The edges that cross into each of the steps 1 … T − 1, in the order in which they were made.

    marks: place of a node -> the step (0 … T − 1) that it marks, by a use of the weight; all nodes of a
    step that lead on to the next may be given. boundaries: n_1 … n_{T − 1}. One list of edges for each,
    empty where nothing of the past arrives.
    """
    since = earliest(graph, marks)
    until = latest(graph, marks)
    numbers = graph.numbers
    found: list[dict[tuple[int, int], None]] = [{} for _ in boundaries]
    for user, inputs in enumerate(graph.inputs):
        if until[user] < 0 or numbers[user] >= LEAF:
            continue
        for place, output in inputs:
            if since[place] >= FAR or numbers[place] >= LEAF:
                continue
            # boundary k leads into step k + 1
            first = max(bisect_right(boundaries, numbers[place]), since[place])
            last = min(bisect_right(boundaries, numbers[user]), until[user])
            for k in range(first, last):
                found[k][place, output] = None
    return [
        [(graph.nodes[p], out) for p, out in sorted(edges, key=lambda e: (numbers[e[0]], e[1]))]
        for edges in found
    ]


def earliest(graph: Unrolled, marks: Mapping[int, int]) -> list[int]:
    """Of every node the first step among those that it comes from, itself included; `FAR` for none."""
    found = [FAR] * len(graph)
    for place, inputs in enumerate(graph.inputs):
        step = marks.get(place, FAR)
        for child, _ in inputs:
            if found[child] < step:
                step = found[child]
        found[place] = step
    return found


def latest(graph: Unrolled, marks: Mapping[int, int]) -> list[int]:
    """Of every node the last step among those that it leads to, itself included; −1 for none."""
    found = [-1] * len(graph)
    for place in range(len(graph) - 1, -1, -1):
        step = max(found[place], marks.get(place, -1))
        found[place] = step
        if step >= 0:
            for child, _ in graph.inputs[place]:
                if found[child] < step:
                    found[child] = step
    return found
