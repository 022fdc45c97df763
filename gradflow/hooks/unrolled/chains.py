"""Weights whose uses follow one another: each on what came of the one before.

A use of a weight is an operation on it and on something else; what is made from weights alone (a
transpose, a mask, a norm) is still the weight. A chain is the longest line of uses of which each
descends from the one before and no recorded state lies between.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from gradflow.hooks.own.comeback import ELEMENTWISE, MOVES
from gradflow.hooks.unrolled.order import Unrolled
from gradflow.limits import RECURRENCE_USES

_PRODUCTS = (
    "Mm Addmm Bmm Baddbmm Addbmm Mv Addmv Dot Addr Convolution ConvolutionOverrideable Linear "
    "MkldnnLinear SlowConvDilated2D Trilinear ThnnFusedGruCell ThnnFusedLstmCell"
)
_NORMS = (
    "WeightNormInterface LinalgVectorNorm Norm Sum Mean Softmax LogSoftmax Amax Std Var Prod Tril Triu "
    "Reciprocal Pow"
)
PRODUCTS = frozenset(_PRODUCTS.split())
LOOKED_UP = frozenset(("Index", "IndexSelect", "Gather", "Take", "IndexPut"))  # as an embedding is
SAME = (MOVES | ELEMENTWISE | frozenset(_NORMS.split())) - LOOKED_UP
# part of a weight is a weight of its own: a parameter may hold those of all layers
PARTS = {
    "Select": ("dim", "index"),
    "Slice": ("dim", "start", "end", "step"),
    "Narrow": ("dim", "start", "length"),
    "Diagonal": ("offset", "dim1", "dim2"),
    **dict.fromkeys(("Unbind", "Split", "SplitWithSizes", "UnsafeSplit", "Chunk"), ("dim",)),
}


@dataclass(eq=False)
class Uses:
    """One weight, and the operations that use it."""

    weight: int  # place of its leaf, or of the node that made it
    nodes: list[int] = field(default_factory=list)  # places
    products: int = 0  # uses as a factor of a matrix product or a convolution

    @property
    def product(self) -> bool:
        """Whether it is a matrix: not a vector that is added to what enters one product."""
        return self.products >= RECURRENCE_USES


@dataclass(eq=False)
class Chain:
    """Uses of one weight that follow one another."""

    uses: Uses
    # place of a use -> how many uses lie on the longest way to it, itself too
    depth: dict[int, int]
    length: int

    @property
    def weight(self) -> int:
        """The place of the weight."""
        return self.uses.weight

    def numbers(self, graph: Unrolled) -> tuple[int, int]:
        """Numbers of its first and of its last use."""
        every = [graph.numbers[place] for place in self.depth]
        return min(every), max(every)


def uses_of(graph: Unrolled, weights: Mapping[int, int]) -> list[Uses]:
    """The uses of every weight that has at least `LEAST` of them.

    Args:
        graph: a whole graph.
        weights: place of a leaf -> anything; the leaves that are the model's parameters.
    """
    made_of = _Labels(graph, weights)
    found: dict[int, Uses] = {}
    for place, inputs in enumerate(graph.inputs):
        if place in made_of.places:
            continue
        product = None
        for child, output in inputs:
            for weight in made_of.at(child, output):
                uses = found.setdefault(weight, Uses(made_of.leaf(weight)))
                if product is None:
                    product = graph.kind(place) in PRODUCTS
                if not uses.nodes or uses.nodes[-1] != place:
                    uses.nodes.append(place)
                    uses.products += product
    return [uses for uses in found.values() if len(uses.nodes) >= RECURRENCE_USES]


class _Labels:
    """Everything that is made from weights alone, and from which: places of leaves, or parts of them.

    A part has a negative number of its own.
    """

    def __init__(self, graph: Unrolled, weights: Mapping[int, int]) -> None:
        self.graph = graph
        self.places: dict[int, tuple[int, ...]] = {place: (place,) for place in weights}
        self._parts: dict[tuple[object, ...], int] = {}
        self._leaves: list[int] = []
        self._kinds: dict[int, tuple[object, ...]] = {}  # of places that take a part: which
        for place, inputs in enumerate(graph.inputs):
            if inputs and all(child in self.places for child, _ in inputs):
                kind = graph.kind(place)
                if kind in SAME:
                    self._note(place, kind, inputs)

    def _note(self, place: int, kind: str, inputs: list[tuple[int, int]]) -> None:
        every = {weight for child, output in inputs for weight in self.at(child, output)}
        self.places[place] = tuple(sorted(every))
        if kind in PARTS:
            node = self.graph.nodes[place]
            which = [repr(getattr(node, f"_saved_{name}", None)) for name in PARTS[kind]]
            self._kinds[place] = (kind, *which)

    def at(self, place: int, output: int) -> tuple[int, ...]:
        """What one output of an operation is made from; () where not from weights alone."""
        made = self.places.get(place, ())
        which = self._kinds.get(place)
        if which is None:
            return made
        return tuple(self._part((weight, output, *which)) for weight in made)

    def _part(self, key: tuple[object, ...]) -> int:
        if key not in self._parts:
            weight = key[0]
            assert isinstance(weight, int)
            self._leaves.append(self.leaf(weight))
            self._parts[key] = -len(self._leaves)
        return self._parts[key]

    def leaf(self, weight: int) -> int:
        """The place of the leaf that a weight, or a part of one, is of."""
        return weight if weight >= 0 else self._leaves[-weight - 1]


def chain_of(graph: Unrolled, uses: Uses, states: Collection[int]) -> Chain:
    """The uses of a weight in the order in which they follow one another.

    Args:
        graph: the graph they are of.
        uses: of one weight.
        states: places of nodes that made states of some track: a chain ends there.
    """
    first, last = uses.nodes[0], uses.nodes[-1]
    own = set(uses.nodes)
    count = [0] * (last + 1)
    depth: dict[int, int] = {}
    inputs = graph.inputs
    for place in range(first, last + 1):
        most = 0
        for child, _ in inputs[place]:
            if count[child] > most:
                most = count[child]
        if place in own:
            most += 1
            depth[place] = most
        if most and place not in states:
            count[place] = most
    return Chain(uses, depth, max(depth.values()))


def chains(graph: Unrolled, weights: Mapping[int, int], states: Collection[int]) -> list[Chain]:
    """All weights of at least `LEAST` uses in a row; see `chain_of`.

    A weight that only enters elementwise (a bias, a gain, a shared activation) counts if all matrices
    between two of its uses repeat as well: a PReLU shared by the layers of a stack is no recurrence.
    """
    found: list[Chain] = []
    every = uses_of(graph, weights)
    known: dict[tuple[int, ...], Chain] = {}
    for uses in every:
        key = tuple(uses.nodes)
        chain = known.get(key)
        chain = chain_of(graph, uses, states) if chain is None else chain
        known[key] = chain
        if chain.length >= RECURRENCE_USES and not (states and _is_within(graph, chain)):
            found.append(Chain(uses, chain.depth, chain.length))
    repeated = {place for chain in found if chain.uses.product for place in chain.depth}
    return [c for c in found if c.uses.product or _alone(graph, c, repeated)]


def _is_within(graph: Unrolled, chain: Chain) -> bool:
    """Whether its uses go on behind a recorded state: they are several in every step of that loop."""
    return chain_of(graph, chain.uses, ()).length > chain.length


def _alone(graph: Unrolled, chain: Chain, repeated: Collection[int]) -> bool:
    """Whether no matrix of its own lies between the uses of an elementwise weight."""
    first, last = chain.numbers(graph)
    every = sorted(chain.depth)
    reach = {every[0]}
    for place in range(every[0] + 1, every[-1] + 1):
        if any(child in reach for child, _ in graph.inputs[place]):
            reach.add(place)
    leads = {every[-1]}
    for place in range(every[-1], every[0] - 1, -1):
        if place in leads:
            leads.update(child for child, _ in graph.inputs[place])
    between = [p for p in reach & leads if first <= graph.numbers[p] <= last]
    return all(graph.kind(p) not in PRODUCTS or p in repeated for p in between)


@dataclass(eq=False)
class Recurrence:
    """Chains that run at the same time: the weights of one loop."""

    chains: list[Chain]

    @property
    def steps(self) -> int:
        """How often its weights are used in a row, most of them."""
        lengths = [c.length for c in self.chains if c.uses.product]
        lengths = lengths or [c.length for c in self.chains]
        return max(lengths, key=lambda n: (lengths.count(n), n))


def recurrences(graph: Unrolled, found: list[Chain]) -> list[Recurrence]:
    """Chains that overlap in time, together."""
    groups: list[tuple[int, int, list[Chain]]] = []
    for chain in sorted(found, key=lambda c: c.numbers(graph)):
        first, last = chain.numbers(graph)
        if groups and first <= groups[-1][1]:
            start, end, members = groups.pop()
            groups.append((start, max(end, last), [*members, chain]))
        else:
            groups.append((first, last, [chain]))
    return [Recurrence(members) for _, _, members in groups]
