"""Which calls depend on which: from the graph, never from what a model looks like.

Every call of a stock layer is a knot: walks through the graph end at the tensors that a call
returned, and go on from what that call was given. Nodes carry the numbers in which they were made,
so a walk passes no node that is older than the first state: what lies on a path is younger than
where the path ends. An input that is given, or embedded, is left after a node or two.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gradflow.hooks.call import Call
from gradflow.hooks.graph import Edge
from gradflow.hooks.loops.links import End
from gradflow.hooks.loops.stitch import Chain

LEAF = 2**63  # numbers from here on are those of leaves, which were not made by an operation
NOTHING: frozenset[Seen] = frozenset()


@dataclass(eq=False)
class Seen:
    """One call of a chain, with the nodes of what it was given and returned."""

    call: Call
    chain: Chain
    place: int  # of the call in its chain
    edges: dict[Edge, str]  # of what it returned -> output, h_n or c_n
    starts: list[Any]  # nodes of its initial states
    input: Any  # node of its input, or None
    number: int  # of its newest node; 0 without a graph
    since: int  # of its oldest

    @staticmethod
    def of(chain: Chain, end: End, data: Tensor) -> Seen:
        """The last call of a chain."""
        numbers = [node._sequence_nr() for node, _ in end.edges]
        return Seen(
            call=end.call,
            chain=chain,
            place=len(chain.calls) - 1,
            edges=end.edges,
            starts=[edge[0] for edge in end.entry.values() if edge is not None],
            input=data.grad_fn,
            number=max(numbers, default=0),
            since=min(numbers, default=0),
        )

    @property
    def nodes(self) -> set[Any]:
        """The nodes of what it returned."""
        return {node for node, _ in self.edges}


class Dependence:
    """What each of some calls, given in the order in which they were made, depends on.

    A set of chains is a whole number, one bit for each.
    """

    def __init__(self, calls: Sequence[Seen]) -> None:
        self._owner = {node: seen for seen in calls for node, _ in seen.edges}
        self._since = min((seen.since for seen in calls if seen.edges), default=LEAF)
        self._near: dict[Any, frozenset[Seen]] = {}
        chains = list(dict.fromkeys(seen.chain for seen in calls))
        self.bit = {id(chain): 1 << number for number, chain in enumerate(chains)}
        self._above: dict[int, int] = {}  # id of a call -> the chains it descends from
        self.into: dict[int, int] = {}  # id of a call -> the chains that its input descends from
        feeds = dict.fromkeys(self.bit.values(), 0)
        for seen in calls:
            own, starts = self.bit[id(seen.chain)], self._chains(seen.starts)
            into = self.into[id(seen)] = self._chains([] if seen.input is None else [seen.input])
            self._above[id(seen)] = starts | into
            feeds[own] |= into | (starts & ~own)
        self._feeds = feeds
        self._known = {self.bit[id(chain)]: chain for chain in chains}

    def _chains(self, nodes: Iterable[Any]) -> int:
        found = 0
        for node in nodes:
            for seen in self._nearest(node):
                found |= self.bit[id(seen.chain)] | self._above.get(id(seen), 0)
        return found

    def _nearest(self, root: Any) -> frozenset[Seen]:
        """The calls that a node descends from with no other call in between."""
        stack = [root]
        while stack:
            node = stack[-1]
            if node in self._near:
                stack.pop()
                continue
            if node in self._owner:
                self._near[node] = frozenset((self._owner[node],))
            elif not self._since <= node._sequence_nr() < LEAF:
                self._near[node] = NOTHING
            else:
                below = [child for child, _ in node.next_functions if child is not None]
                waiting = [child for child in below if child not in self._near]
                if waiting:
                    stack += waiting
                    continue
                self._near[node] = NOTHING.union(*(self._near[child] for child in below))
            stack.pop()
        return self._near[root]

    def closed(self) -> list[list[Chain]]:
        """The chains of every closed loop: those that feed each other, or themselves by their input."""
        found, left = [], list(self._known)
        while left:
            one = left.pop(0)
            others = [two for two in left if self._feeds[one] & two and self._feeds[two] & one]
            if others or self._feeds[one] & one:
                found.append([self._known[bit] for bit in (one, *others)])
            left = [bit for bit in left if bit not in others]
        return found

    def depends(self, seen: Seen, chains: Iterable[Chain]) -> bool:
        """Whether a call's input descends from one of the chains."""
        return any(self.into[id(seen)] & self.bit[id(chain)] for chain in chains)
