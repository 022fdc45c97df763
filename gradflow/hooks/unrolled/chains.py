"""Weights whose uses follow one another: each on what came of the one before.

A use of a weight is an operation on it and on something else; what is made from weights alone (a
transpose, a mask, a norm) is still the weight. A chain is a line of uses of which each descends from
the one before and no recorded state lies between. Chains of several weights that descend from one
another are one loop; loops that share a weight and do not are several.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

from gradflow.hooks.graph import ELEMENTWISE, MOVES
from gradflow.hooks.unrolled.whole_graph import Unrolled
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
class WeightChain:
    """Uses of one weight that follow one another."""

    uses: Uses
    # place of a use -> how many uses lie on the way to it, itself too
    depth: dict[int, int]
    length: int
    tree: bool = False  # whether other uses of the weight run into it
    frozen: bool = False  # whether it needs no gradient: a use on a constant start is not seen

    @property
    def weight(self) -> int:
        """The place of the weight."""
        return self.uses.weight

    def numbers(self, graph: Unrolled) -> tuple[int, int]:
        """Numbers of its first and of its last use."""
        every = [graph.numbers[place] for place in self.depth]
        return min(every), max(every)


def uses_of(graph: Unrolled, weights: Mapping[int, object]) -> list[Uses]:
    """The uses of every weight, a leaf at one of these places, that has enough of them."""
    made_of = _Labels(graph, weights)
    found: dict[int, Uses] = {}
    alone = made_of.places
    for place, inputs in enumerate(graph.inputs):
        if place in alone:
            continue
        product = None
        for child, output in inputs:
            if child not in alone:
                continue
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

    def __init__(self, graph: Unrolled, weights: Mapping[int, object]) -> None:
        self.graph = graph
        self.places: dict[int, tuple[int, ...]] = {place: (place,) for place in weights}
        self._parts: dict[tuple[object, ...], int] = {}
        self._leaves: list[int] = []
        self._kinds: dict[int, tuple[object, ...]] = {}  # of places that take a part: which
        known = self.places
        for place, inputs in enumerate(graph.inputs):
            if not inputs or inputs[0][0] not in known:
                continue
            if len(inputs) == 1 or all(child in known for child, _ in inputs):
                kind = graph.kind(place)
                if kind in SAME:
                    self._note(place, kind, inputs)

    def _note(self, place: int, kind: str, inputs: list[tuple[int, int]]) -> None:
        if len(inputs) == 1:
            self.places[place] = self.at(*inputs[0])
        else:
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


def chains_of(graph: Unrolled, uses: Uses, states: Collection[int]) -> list[WeightChain]:
    """The uses of a weight, in lines: each use follows the newest of those that it descends from.

    Uses of which neither descends from the other are of different lines: those of two sequences, of
    two directions, or of two layers that share the weight. A chain ends at a node at one of the places
    where states of some track were made.
    """
    first, last = uses.nodes[0], uses.nodes[-1]
    own = set(uses.nodes)
    newest = [-1] * (last + 1)  # of every place: the newest use that it comes from, or -1
    chains: dict[int, WeightChain] = {}  # a use -> the chain that it is in
    inputs, numbers = graph.inputs, graph.numbers
    for place in range(first, last + 1):
        found = -1
        for child, _ in inputs[place]:
            use = newest[child]
            if use >= 0 and (found < 0 or numbers[use] > numbers[found]):
                found = use
        if place in own:
            chain = chains[place] = chains[found] if found >= 0 else WeightChain(uses, {}, 0)
            chain.depth[place] = chain.depth[found] + 1 if found >= 0 else 1
            chain.length = max(chain.length, chain.depth[place])
            found = place
        if place not in states:
            newest[place] = found
    return list({id(chain): chain for chain in chains.values()}.values())


def chains(graph: Unrolled, every: Iterable[Uses], states: Collection[int]) -> list[WeightChain]:
    """All lines of enough uses of one weight, of these; see `uses_of` and `chains_of`.

    A weight that only enters elementwise (a bias, a gain, a shared activation) counts if all matrices
    between two of its uses repeat as well: a PReLU shared by the layers of a stack is no recurrence.
    """
    found: list[WeightChain] = []
    known: dict[tuple[int, ...], list[WeightChain]] = {}
    for uses in every:
        key = tuple(uses.nodes)
        if key not in known:
            lines = chains_of(graph, uses, states)
            long = [line for line in lines if line.length >= RECURRENCE_USES]
            known[key] = not_within(graph, long) if states else long
            tree = bool(known[key]) and is_tree(graph, lines)
            for line in known[key]:
                line.tree = tree
        found += [replace(line, uses=uses) for line in known[key]]
    repeated = {place for chain in found if chain.uses.product for place in chain.depth}
    return [c for c in found if c.uses.product or is_without_other_products(graph, c, repeated)]


def not_within(graph: Unrolled, found: list[WeightChain]) -> list[WeightChain]:
    """Those that do not go on behind a recorded state, and so are no part of each step of its loop."""
    whole = [] if not found else chains_of(graph, found[0].uses, ())
    length = {place: chain.length for chain in whole for place in chain.depth}
    return [chain for chain in found if length[next(iter(chain.depth))] == chain.length]


def is_without_other_products(
    graph: Unrolled, chain: WeightChain, repeated: Collection[int]
) -> bool:
    """Whether no matrix of its own lies between the uses of an elementwise weight."""
    first, last = chain.numbers(graph)
    found = between(graph, min(chain.depth), max(chain.depth))
    own = [p for p in found if first <= graph.numbers[p] <= last]
    return all(graph.kind(p) not in PRODUCTS or p in repeated for p in own)


def between(graph: Unrolled, start: int, end: int) -> set[int]:
    """The places of all ways from one place to another, both among them where there is one."""
    reach = {start}
    for place in range(start + 1, end + 1):
        if any(child in reach for child, _ in graph.inputs[place]):
            reach.add(place)
    leads = {end}
    for place in range(end, start, -1):
        if place in leads:
            leads.update(child for child, _ in graph.inputs[place])
    return reach & leads


@dataclass(eq=False)
class Recurrence:
    """Chains that descend from one another: the weights of one loop."""

    chains: list[WeightChain]

    @property
    def frozen(self) -> bool:
        """Whether none of its weights needs a gradient."""
        return all(chain.frozen for chain in self.chains)

    @property
    def tree(self) -> bool:
        """Whether its uses are the nodes of a tree."""
        return any(chain.tree for chain in self.chains)

    @property
    def steps(self) -> int:
        """How often its weights are used in a row, most of them."""
        chains = [c for c in self.chains if c.uses.product] or self.chains
        # where each of two states feeds the other, every other use of a weight is a line of its own
        of_weight: Counter[int] = Counter()
        for chain in chains:
            of_weight[chain.weight] += chain.length
        lengths = [chain.length for chain in chains]
        lengths = [n for n in of_weight.values() if n in lengths] or lengths
        return max(lengths, key=lambda n: (lengths.count(n), n))


def recurrences(graph: Unrolled, found: list[WeightChain]) -> list[Recurrence]:
    """Chains that descend from one another, together: the weights of one loop; oldest loop first."""
    own: dict[int, int] = {}  # a use -> one bit for each chain that it is in
    for bit, chain in enumerate(found):
        for place in chain.depth:
            own[place] = own.get(place, 0) | 1 << bit
    reached = _reached(graph, own)
    often = [Counter[int]() for _ in found]  # of every chain: uses that come from another one
    for chain, counter in zip(found, often, strict=True):
        masks = Counter(reached[place] for place in chain.depth)
        for bits, count in masks.items():
            counter.update({bit: count for bit in range(len(found)) if bits >> bit & 1})

    def mutual(one: int, other: int) -> bool:
        halves = ((one, other), (other, one))
        return all(2 * often[a][b] > len(found[a].depth) for a, b in halves)

    groups: list[list[int]] = []
    for bit in range(len(found)):
        both = [group for group in groups if any(mutual(bit, other) for other in group)]
        groups = [group for group in groups if group not in both]
        groups.append([bit, *(other for group in both for other in group)])
    loops = [Recurrence(_trained([found[bit] for bit in sorted(group)])) for group in groups]
    return sorted(loops, key=lambda loop: min(c.numbers(graph) for c in loop.chains))


def _trained(chains: list[WeightChain]) -> list[WeightChain]:
    return [chain for chain in chains if not chain.frozen] or chains


def _reached(graph: Unrolled, own: Mapping[int, int], ends: Collection[int] = ()) -> list[int]:
    """Of every node the bits of the nodes that it comes from, itself included; ends are not passed."""
    found = [0] * len(graph)
    for place in range(min(own, default=len(graph)), len(graph)):
        bits = 0
        for child, _ in graph.inputs[place]:
            bits |= own.get(child, 0) if child in ends else found[child]
        found[place] = bits | own.get(place, 0)
    return found


def is_tree(graph: Unrolled, lines: list[WeightChain]) -> bool:
    """Whether lines of one weight run into one another: its uses are the nodes of a tree.

    One that reads from its first steps on where another has ended is a loop of its own.
    """
    lines = [line for line in lines if line.length > 1]
    if len(lines) < 2:
        return False
    every = {place for line in lines for place in line.depth}
    last = {
        place: 1 << bit
        for bit, line in enumerate(lines)
        for place, depth in line.depth.items()
        if depth == line.length
    }
    reached = _reached(graph, last, every)
    for bit, line in enumerate(lines):
        since: dict[int, int] = {}  # another line -> where it runs into this one
        for place, depth in line.depth.items():
            bits = 0
            for child, _ in graph.inputs[place]:
                bits |= last.get(child, 0) if child in every else reached[child]
            while bits:
                other = bits.bit_length() - 1
                bits ^= 1 << other
                if other != bit:
                    since[other] = min(since.get(other, depth), depth)
        if any(depth > 2 for depth in since.values()):
            return True
    return False
