"""Loops without a weight: one tensor is cut into steps, and what came of a step goes into the next.

`h = f[t] * h + (1 - f[t]) * z[t]` (quasi-recurrent networks, leaky integrators, minGRU by hand): the cuts
of f are to it what the uses of a weight are to other loops. A step of such a loop begins where something
that came of an earlier cut meets what came of a newer one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Set
from itertools import pairwise

from gradflow.hooks.graph import MOVES
from gradflow.hooks.unrolled.chains import Recurrence, Uses, WeightChain, between
from gradflow.hooks.unrolled.whole_graph import Unrolled
from gradflow.limits import CUT_USES

# what is carried on is a sum over steps or a list that grows; the largest so far; a product
POOLS = (
    MOVES | {"Add", "Sub", "Sum", "Cat", "Stack", "IndexAdd", "IndexPut", "ScatterAdd"},
    MOVES | {"Maximum", "Minimum", "Where"},
    MOVES | {"Mul", "Div"},
)


def loops_without_weight(
    graph: Unrolled, uses: Iterable[Uses], taken: Set[int], scanned: Set[int]
) -> list[tuple[int, Recurrence]]:
    """The loops over cuts of one tensor, each with the place of that tensor, oldest first.

    What a weight makes of every step's input alone (uses) is to a loop what cuts are. taken are places
    of states of tracks and of weights that follow one another: what goes through them is known; scanned
    are those of all states of a track at once.
    """
    cuts = _cuts(graph)
    for one in uses:
        if len(one.nodes) >= CUT_USES and not taken & set(one.nodes):
            made = sorted(one.nodes, key=graph.numbers.__getitem__)
            cuts |= {(place, 0): (one.weight, number) for number, place in enumerate(made)}
    return _Walk(graph, cuts, taken, scanned).loops() if cuts else []


def _cuts(graph: Unrolled) -> dict[tuple[int, int], tuple[int, int]]:
    """Every cut of a tensor that is cut often -> (the tensor's place, which of its cuts it is)."""
    # -> the tensor and the axis that are cut; which cut of these
    of: dict[tuple[int, int], tuple[tuple[object, ...], object]] = {}
    first: dict[tuple[tuple[object, ...], object], int] = {}  # number of the first operation on it
    for place, inputs in enumerate(graph.inputs):
        node, kind = graph.nodes[place], graph.kind(place) if len(inputs) == 1 else ""
        if kind in ("Select", "Slice", "Narrow"):
            which = [getattr(node, f"_saved_{name}", None) for name in ("index", "start", "end")]
            of[place, 0] = (*inputs[0], getattr(node, "_saved_dim", 0)), repr(which)
        for edge in inputs:
            if edge not in of and graph.kind(edge[0]) in ("Unbind", "Split", "SplitWithSizes"):
                of[edge] = (*graph.inputs[edge[0]][0], edge[0]), edge[1]
            if edge in of:
                number = graph.numbers[place]
                first[of[edge]] = min(first.get(of[edge], number), number)
    often = Counter(tensor for tensor, _ in first)
    numbers: dict[object, int] = {}
    counts = Counter[object]()
    for cut in sorted(first, key=first.__getitem__):
        numbers[cut] = counts[cut[0]]
        counts[cut[0]] += 1
    found: dict[tuple[int, int], tuple[int, int]] = {}
    for edge, cut in of.items():
        if cut in numbers and often[cut[0]] >= CUT_USES:
            tensor = cut[0][0]
            assert isinstance(tensor, int)
            found[edge] = tensor, numbers[cut]
    return found


class _Walk:
    """One walk through a graph: what each operation knows of the cuts."""

    def __init__(
        self,
        graph: Unrolled,
        cuts: dict[tuple[int, int], tuple[int, int]],
        taken: Set[int],
        scanned: Set[int],
    ) -> None:
        self.graph, self.cuts, self.taken, self.scanned = graph, cuts, taken, scanned
        self.newest = [-1] * len(graph)  # number of the newest cut that an operation comes from
        self.tensor = [-1] * len(graph)  # of which tensor that is
        self.step = [-1] * len(graph)  # the newest beginning of a step that it comes from
        self.before: dict[int, tuple[int, int]] = {}  # beginning -> (the one before, how many)
        for place, inputs in enumerate(graph.inputs):
            self._look(place, inputs)

    def _look(self, place: int, inputs: list[tuple[int, int]]) -> None:
        known = []
        for edge in inputs:
            tensor, number = self.cuts.get(edge, (self.tensor[edge[0]], self.newest[edge[0]]))
            if number >= 0:
                step = -1 if edge in self.cuts else self.step[edge[0]]
                # of several places where a step begins, the one that was made first
                early = -self.graph.numbers[step] if step >= 0 else 0
                known.append((number, self.before.get(step, (-1, 0))[1], early, step, tensor))
        if not known:
            return
        newest = max(known)
        self.newest[place], self.step[place], self.tensor[place] = newest[0], newest[3], newest[4]
        older = [one for one in known if one[0] < newest[0]]
        if older:
            _, count, _, step, _ = max(older)
            self.before[place] = step, count + 1
            self.step[place] = place

    def _number(self, edge: tuple[int, int]) -> int:
        return self.cuts[edge][1] if edge in self.cuts else self.newest[edge[0]]

    def loops(self) -> list[tuple[int, Recurrence]]:
        """One for every line of enough steps."""
        found: list[tuple[int, Recurrence]] = []
        done: set[int] = set()
        numbers, before = self.graph.numbers, self.before
        for last in sorted(before, key=lambda place: (-before[place][1], numbers[place])):
            line, place = list[int](), last
            while place >= 0 and place not in done:
                line.append(place)
                place = self.before[place][0]
            done.update(line)
            if place < 0 and len(line) + 1 >= CUT_USES:
                found += self._loop(line[::-1])
        return found[::-1]

    def _loop(self, line: list[int]) -> list[tuple[int, Recurrence]]:
        """The loop whose steps begin at these places; [] where they only pool, or are layers."""
        bodies = [self._between(*pair) for pair in pairwise(line)]
        if self._is_known(line) or any(
            self.taken & between(self.graph, *pair) for pair in pairwise(line)
        ):
            return []
        kinds = {self.graph.kind(place) for body in bodies for place in body}
        entries = math.prod(self.graph.nodes[line[-1]]._input_metadata[0].shape)
        read = [
            {child for place in body for child, _ in self.graph.inputs[place]} for body in bodies
        ]
        weights = [set(filter(self.graph.is_leaf, some)) for some in read]
        # a single number is a loss that adds up; steps of weights of their own are layers
        pooled = entries == 1 or any(kinds <= pool for pool in POOLS)
        if pooled or any(some != weights[0] for some in weights):
            return []
        first = self._first(line[0])
        line = line if first is None else [first, *line]
        depth = {place: number for number, place in enumerate(line, start=1)}
        tensor = self.tensor[line[-1]]
        return [(tensor, Recurrence([WeightChain(Uses(tensor, line), depth, len(line))]))]

    def _is_known(self, line: list[int]) -> bool:
        """Whether its states, joined, are those of a track: `scan` was given what it made."""
        joined = [self.graph.inputs[place] for place in self.scanned]
        return any(len({self.step[p] for p, _ in some} & {*line}) > 1 for some in joined)

    def _between(self, start: int, end: int) -> list[int]:
        """What leads from one beginning to the next, the next one among it."""
        found, stack = {end}, [end]
        while stack:
            for child, _ in self.graph.inputs[stack.pop()]:
                if child != start and self.step[child] == start and child not in found:
                    found.add(child)
                    stack.append(child)
        return list(found)

    def _first(self, second: int) -> int | None:
        """What does in the first step, on states that are constant, what begins the second one."""
        kind, seen, stack = self.graph.kind(second), {second}, [second]
        numbers = {self._number(edge) for edge in self.graph.inputs[second]} - {-1}
        start = max(numbers - {max(numbers)})
        while stack:
            for child, _ in self.graph.inputs[stack.pop()]:
                if child in seen or self.newest[child] != start or self.step[child] >= 0:
                    continue
                given = self.graph.constants[child] or any(
                    self._number(edge) < 0 for edge in self.graph.inputs[child]
                )
                if given and self.graph.kind(child) == kind:
                    return child
                seen.add(child)
                stack.append(child)
        return None
