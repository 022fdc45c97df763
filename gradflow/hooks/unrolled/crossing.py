"""What crosses from one step of an unrolled loop to the next: the state, read from the graph.

Letters: T steps, n_t the number of the first operation of step t (operations are numbered as they are
made). An edge, one output of one operation, crosses the boundary into step t if it was made before
n_t, is used by an operation from n_t on, comes from an operation that marks an earlier step and leads
to one that marks step t or a later one. Those edges are all that step t knows of the past: the step
Jacobian ∂(edges into t + 1)/∂(edges into t) composes, and that of anything less does not.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence

from gradflow.hooks.graph import LEAF, Edge
from gradflow.hooks.unrolled.whole_graph import Unrolled

FAR = 2**62


def crossing(
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
