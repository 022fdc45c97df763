"""Which calls depend on which: from the graph, never from what a model looks like.

Every step of a part, such as a call of a stock layer, is a knot: walks through the graph end at the
tensors that a step returned, and go on from what it was given. Nodes are numbered as they are made, so
a walk passes no node that is older than the first state: what lies on a path is younger than
where the path ends. An input that is given, or embedded, is left after a node or two.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

from gradflow.hooks.closed.parts import MarkedPart, Seen, StockPart
from gradflow.hooks.graph import LEAF, descended

Part = StockPart | MarkedPart

NOTHING: frozenset[Seen] = frozenset()


class Dependence:
    """What each of some calls, given in the order in which they were made, depends on.

    A set of parts is a whole number, one bit for each. Of the parts with these ids it is known already
    from which of their calls each sequence comes.
    """

    def __init__(self, calls: Sequence[Seen], rests: Collection[int] = ()) -> None:
        self._owner = {node: seen for seen in calls for node, _ in seen.edges}
        self._since = min((seen.since for seen in calls if seen.edges), default=LEAF)
        self._near: dict[Any, frozenset[Seen]] = {}
        parts = list(dict.fromkeys(seen.part for seen in calls))
        self.bit = {id(part): 1 << number for number, part in enumerate(parts)}
        self._above: dict[int, int] = {}  # id of a call -> the parts it descends from
        self.into: dict[int, int] = {}  # id of a call -> the parts that its input descends from
        self.further: dict[Part, None] = {}  # whose calls start from states of several calls ago
        feeds = dict.fromkeys(self.bit.values(), 0)
        before: dict[int, Seen] = {}
        for seen in calls:
            own, starts = self.bit[id(seen.part)], self._parts(seen.starts)
            last = before.get(id(seen.part))
            if id(seen.part) not in rests and self._reaches_further(seen, last):
                feeds[own] |= own
                self.further[seen.part] = None
            before[id(seen.part)] = seen
            into = self.into[id(seen)] = self._parts(seen.inputs)
            self._above[id(seen)] = starts | into
            feeds[own] |= into | (starts & ~own)
        self._feeds = feeds
        self._known = {self.bit[id(part)]: part for part in parts}

    def _parts(self, nodes: Iterable[Any]) -> int:
        found = 0
        for node in nodes:
            for seen in self._nearest(node):
                found |= self.bit[id(seen.part)] | self._above.get(id(seen), 0)
        return found

    def nearest(self, nodes: Iterable[Any]) -> frozenset[Seen]:
        """The calls that some nodes descend from with no other call in between."""
        return NOTHING.union(*(self._nearest(node) for node in nodes))

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

    def _reaches_further(self, seen: Seen, before: Seen | None) -> bool:
        """Whether a call starts from more of its part than what the call before returned or was given."""
        if seen.call is None or before is None or before.place != seen.place - 1:
            return False
        ends = before.nodes | set(before.starts)
        for node, _ in descended(
            seen.entry.values(), lambda node: self._is_old(node) or node in ends
        ):
            owner = self._owner.get(node)
            if node not in ends and owner is not None and owner.part is seen.part:
                return True
        return False

    def _is_old(self, node: Any) -> bool:
        return node in self._owner or not self._since <= node._sequence_nr() < LEAF

    def closed(self) -> list[list[Part]]:
        """The parts of every closed loop: those that feed each other, or themselves by their input.

        Also those whose calls start from the states of several calls ago.
        """
        found, left = [], list(self._known)
        while left:
            one = left.pop(0)
            others = [two for two in left if self._feeds[one] & two and self._feeds[two] & one]
            if others or self._feeds[one] & one:
                found.append([self._known[bit] for bit in (one, *others)])
            left = [bit for bit in left if bit not in others]
        return found

    def depths(self) -> dict[Part, int]:
        """Of every part how many of the same layer it came through, itself included."""
        found: dict[Part, int] = {}
        earlier: dict[object, int] = {}  # a layer -> the parts of it so far
        for bit, part in self._known.items():
            # loops of one name may be over weights of their own
            layer = part.path, *(track.code for track in part.tracks)
            below = self._feeds[bit] & earlier.get(layer, 0)
            come = [found[self._known[b]] for b in self._bits(below)]
            found[part] = 1 + max(come, default=0)
            earlier[layer] = earlier.get(layer, 0) | bit
        return found

    @staticmethod
    def _bits(number: int) -> Iterator[int]:
        while number:
            yield number & -number
            number &= number - 1

    def depends(self, seen: Seen, parts: Iterable[Part]) -> bool:
        """Whether a call's input descends from one of the parts."""
        return any(self.into[id(seen)] & self.bit[id(part)] for part in parts)
