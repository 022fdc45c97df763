"""The state of an unrolled loop: what crosses from step to step, the same at every step.

A step runs from one use of the weight to the next, and within it there are several places to cut:
after h = tanh(…), after a mask on h, before h is concatenated with the next input. The state is cut
where least crosses; of equal places at the last one that the last step has too, as what the next
step would begin with is not there any more.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

from gradflow.hooks.axes import Axis
from gradflow.hooks.graph import LEAF, Edge
from gradflow.hooks.unrolled.chains import Recurrence, WeightChain
from gradflow.hooks.unrolled.whole_graph import Unrolled, earliest, edges_between, latest
from gradflow.limits import CUT_PLACES, LOOP_STEPS, PERIODS

FROZEN = "its weight needs no gradient, so the graph does not tell where it begins"
TREE = (
    "its uses are the nodes of a tree, several of which lead into one, and not steps of one line; tapped at "
    "every node, with all that a node hands on, it is a track for each line, the others held fixed"
)
EARLY = "its last step is not shown: the loss does not depend on all states that the loop ends with"
NO_VALUE = "its last step is not shown: no operation keeps the values of the states that the loop ends with"
UNLIKE = "its first step is not shown: it does not do what the others do"
SAME_NOT = "not every step does the same"


class NoState(Exception):
    """The state cannot be told; the text says why."""


class NoRows(NoState):
    """Its states have more axes than a batch of rows."""

    def __init__(self, text: str, shape: tuple[int, ...]) -> None:
        super().__init__(text)
        self.shape = shape  # of one of them


class NotAlike(NoState):
    """The steps are not made of the same operations."""


@dataclass(frozen=True)
class LoopStates:
    """The states of a loop, T steps of edges in the order in which a step makes them."""

    edges: list[list[Edge]]
    axes: tuple[Axis, ...] = ()  # of every state: which is the batch
    notes: tuple[str, ...] = ()  # that its first step, or its last one, is not among them

    @property
    def begins(self) -> bool:
        """Whether its first step is among them."""
        return UNLIKE not in self.notes

    @property
    def ends(self) -> bool:
        """Whether its last step is among them."""
        return EARLY not in self.notes and NO_VALUE not in self.notes


def steps_of(graph: Unrolled, found: Recurrence) -> LoopStates:
    """The states after each step of a loop.

    Raises:
        NoState: what crosses is not the same at every step.
    """
    if found.frozen:
        raise NoState(FROZEN)
    if found.tree:
        raise NoState(TREE)
    chain = _first_in_a_step(graph, found)
    if chain.length < LOOP_STEPS:
        raise NoState(f"it has fewer than {LOOP_STEPS} steps")
    for period in PERIODS:
        # several uses to a step are shown by two steps that can be compared
        if chain.length % period or chain.length // period < LOOP_STEPS + (period > 1):
            continue
        try:
            marks = {place: (depth - 1) // period for place, depth in chain.depth.items()}
            return _Loop(graph, marks, found).steps(period)
        except NotAlike:
            continue
    raise NotAlike(SAME_NOT)


def _first_in_a_step(graph: Unrolled, found: Recurrence) -> WeightChain:
    """The weight that is used first, of those that are used once in every step."""
    chains = [c for c in found.chains if c.length == found.steps]
    chains = [c for c in chains if c.uses.product] or chains
    return min(chains, key=lambda c: c.numbers(graph))


class _Loop:
    """One loop, cut into steps at the uses of one weight."""

    def __init__(self, graph: Unrolled, marks: dict[int, int], found: Recurrence) -> None:
        self.graph = graph
        self.length = max(marks.values()) + 1
        numbers: list[list[int]] = [[] for _ in range(self.length)]
        for place, step in marks.items():
            numbers[step].append(graph.numbers[place])
        self.first = [min(some) for some in numbers]
        last = [max(some) for some in numbers]
        if any(a >= b for a, b in zip(last, self.first[1:], strict=False)):
            raise NoState("several loops over its weights run at the same time")
        self.marks = dict(marks)
        for place in (place for chain in found.chains for place in chain.depth):
            step = bisect_right(self.first, graph.numbers[place]) - 1
            self.marks[place] = max(step, 0)
        self.since = earliest(graph, self.marks)
        self.until = latest(graph, self.marks)
        self.body = self._bodies()

    def _bodies(self) -> list[list[int]]:
        """Of every step what was made between its use and the next one's, in that order.

        Only what leads on; of the last two steps whatever there is, as part of it leads to the last
        state alone.
        """
        found: list[list[int]] = [[] for _ in range(self.length)]
        numbers = self.graph.numbers
        for place, number in enumerate(numbers):
            if number >= LEAF or number < self.first[0]:
                continue
            step = bisect_right(self.first, number) - 1
            final = step >= self.length - 2
            if self.since[place] <= step and (final or self.until[place] > step):
                found[step].append(place)
        for some in found:
            some.sort(key=numbers.__getitem__)
        return found

    def steps(self, period: int) -> LoopStates:
        middle = (self.length - 1) // 2
        model = self.body[middle]
        kinds = [self.graph.kind(place) for place in model]
        if period > 1 and kinds == kinds[: len(kinds) // period] * period:
            raise NotAlike(SAME_NOT)  # several steps, of which not all are alike
        for step in range(1, self.length - 2):
            if [self.graph.kind(place) for place in self.body[step]] != kinds:
                raise NotAlike(SAME_NOT)
        shown = [self._matched(model, step) for step in range(self.length)]
        cuts, tried = self._cuts(model, middle), None
        for cut in cuts:
            wanted = self._parts(model, middle, cut)
            if wanted is None:
                continue
            edges = self._everywhere(wanted, shown)
            if edges is not None and self._is_all(edges, shown, cut):
                return LoopStates(edges)
            tried = tried or wanted
        for first, last, notes in _SHORTER if tried is not None else ():
            edges = self._everywhere(tried or [], shown[first:last])
            if edges is not None and self._is_all(edges, shown[first:last], cuts[0], first):
                return LoopStates(edges, notes=notes)
        raise NoState("what crosses from step to step is not the same at every step")

    def _matched(self, model: list[int], step: int) -> list[int | None]:
        """The counterparts of a middle step's operations in another step."""
        body = self.body[step]
        if 0 < step < self.length - 2:
            return list(body)
        place_of = {place: index for index, place in enumerate(model)}
        found: list[int | None] = []
        start, within = 0, set(body)
        for place in model:
            own = [place_of[child] for child, _ in self.graph.inputs[place] if child in place_of]
            needed = {found[index] for index in own}
            if not step:  # of a constant start there are no operations
                needed.discard(None)
            kind, hit = self.graph.kind(place), None
            if None not in needed:
                for index in range(start, len(body)):
                    candidate = body[index]
                    inputs = {child for child, _ in self.graph.inputs[candidate]}
                    if step == 0 and inputs & within != needed:
                        continue  # made from more of this step than its counterpart
                    if self.graph.kind(candidate) == kind and needed <= inputs:
                        hit, start = candidate, index + 1
                        break
            found.append(hit)
        return found

    def _cuts(self, model: list[int], middle: int) -> list[int]:
        """How many operations of the middle step come before the cut, best places first."""
        numbers, nodes = self.graph.numbers, self.graph.nodes
        bounds = [numbers[place] for place in model] + [self.first[middle + 1]]
        size = [0] * len(model)
        made: dict[tuple[int, int], int] = {}  # an edge -> the last operation that uses it
        for user, inputs in enumerate(self.graph.inputs):
            if self.until[user] <= middle or numbers[user] <= self.first[middle]:
                continue
            for place, output in inputs:
                if self.since[place] <= middle and numbers[place] < LEAF:
                    made[place, output] = max(made.get((place, output), 0), numbers[user])
        for (place, output), last in made.items():
            shape = nodes[place]._input_metadata[output].shape
            entries = 1
            for length in shape:
                entries *= length
            for index in range(len(model)):  # cut after model[index]
                if numbers[place] < bounds[index] + 1 and last >= bounds[index + 1]:
                    size[index] += entries
        least = min(size, default=0)
        best = [index for index in range(len(model)) if size[index] == least and least]
        return best[::-1][:CUT_PLACES]

    def _parts(self, model: list[int], middle: int, cut: int) -> list[tuple[int, int]] | None:
        """Which operations of a step, by their place in it, made what crosses, and which output."""
        boundary = self._after(model, cut, middle)
        marks = {place: int(step > middle) for place, step in self.marks.items()}
        edges = edges_between(self.graph, marks, [boundary])[0]
        place_of = {self.graph.nodes[place]: index for index, place in enumerate(model)}
        if not edges or any(node not in place_of for node, _ in edges):
            return None
        return [(place_of[node], output) for node, output in edges]

    def _after(self, body: list[int], cut: int, step: int) -> int:
        return self.graph.numbers[body[cut]] + 1

    def _everywhere(
        self, wanted: list[tuple[int, int]], shown: list[list[int | None]]
    ) -> list[list[Edge]] | None:
        found: list[list[Edge]] = []
        for counterparts in shown:
            edges: list[Edge] = []
            for index, output in wanted:
                place = counterparts[index]
                if place is None:
                    return None
                edges.append((self.graph.nodes[place], output))
            found.append(edges)
        first = [_shape(edge) for edge in found[0]]
        if any([_shape(edge) for edge in edges] != first for edges in found):
            raise NoState("its states change their shape from step to step")
        return found

    def _is_all(
        self, edges: list[list[Edge]], shown: list[list[int | None]], cut: int, first: int = 0
    ) -> bool:
        """Whether exactly these edges cross at every step; the last of them lead out of the loop."""
        boundaries = []
        for step in range(len(edges) - 1):
            numbers = [node._sequence_nr() for node, _ in edges[step]]
            place = shown[step][cut]
            boundaries.append((max(numbers) if place is None else self.graph.numbers[place]) + 1)
        ends = {node for node, _ in edges[-1]}
        marks = {place: max(step - first, 0) for place, step in self.marks.items()}
        for place, node in enumerate(self.graph.nodes):
            if node in ends:
                marks[place] = len(edges)
        found = edges_between(self.graph, marks, boundaries)
        return all(set(some) == set(edges[step]) for step, some in enumerate(found))


_SHORTER = (
    # from which step, to which, and what to say of it
    (0, -1, (EARLY,)),
    (1, None, (UNLIKE,)),
    (1, -1, (UNLIKE, EARLY)),
)


def _shape(edge: Edge) -> tuple[object, ...]:
    known = edge[0]._input_metadata[edge[1]]
    return tuple(known.shape), known.dtype
