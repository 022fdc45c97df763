"""Whether any weight can be used three times in a row at all: asked before a graph is looked at closely.

Most graphs hold no recurrence beside those that are recorded. A walk that keeps little, and a bound on
how many uses of repeated tensors lie on one path, shows that of them at a fraction of the cost.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from gradflow.hooks.graph import LEAF, Edge, kind_of
from gradflow.hooks.unrolled.chains import PRODUCTS, SAME
from gradflow.hooks.unrolled.weights import HANDED_ON
from gradflow.limits import BACKWARD_NODES, RECURRENCE_USES


class _Perhaps(Exception):
    """It cannot be told at this price."""


def without_repeats(
    roots: Iterable[Any], given: Mapping[int, Sequence[Edge]], fused: Collection[str]
) -> set[int] | None:
    """The numbers of all nodes of a graph in which surely nothing is used three times in a row, else None.

    given is as in `Unrolled`; fused are kinds of nodes that hold a whole recurrence, none may be unseen.

    >>> import torch
    >>> w = torch.ones(2, 2, requires_grad=True)
    >>> side_by_side = torch.stack([torch.ones(1, 2) @ w for _ in range(9)]).sum()
    >>> in_a_row = torch.ones(1, 2) @ w @ w @ w
    >>> without_repeats([in_a_row.grad_fn], {}, ()) is None
    True
    >>> len(without_repeats([side_by_side.grad_fn], {}, ()))    # 9 products, stack, sum, and the leaf
    12
    """
    try:
        return _Bound(roots, given, fused).numbers
    except _Perhaps:
        return None


class _Bound:
    """How many uses of repeated tensors lie on one path, at most; raises where these may be too many."""

    def __init__(
        self, roots: Iterable[Any], given: Mapping[int, Sequence[Edge]], fused: Collection[str]
    ) -> None:
        self.given = given
        every = self._walked(list(roots))
        numbers = [node._sequence_nr() for node in every]
        end = bisect_left(numbers, LEAF)
        self.numbers = set(numbers)
        self.order = list(zip(numbers[:end], every[:end], strict=True))
        # what is made of one leaf alone -> that leaf
        self.made_of: dict[Any, Any] = {leaf: leaf for leaf in every[end:]}
        self._check_depth(self._repeated(fused))

    def _below(self, node: Any, number: int) -> Sequence[Edge]:
        edges: Sequence[Edge] = self.given.get(number, node.next_functions)
        return edges

    def _walked(self, stack: list[Any]) -> list[Any]:
        """All nodes in the order of their numbers."""
        seen = set(stack)
        while stack:
            node = stack.pop()
            for child, _ in self._below(node, node._sequence_nr()):
                if child is not None and child not in seen:
                    seen.add(child)
                    stack.append(child)
            if len(seen) > BACKWARD_NODES:
                raise _Perhaps
        return sorted(seen, key=lambda node: int(node._sequence_nr()))

    def _repeated(self, fused: Collection[str]) -> set[Any]:
        """Leaves, and computed tensors, that are used often enough to be used in a row."""
        uses: dict[Any, int] = {}
        for number, node in self.order:
            if kind_of(node) in fused and number not in self.given:
                raise _Perhaps
            leaves, alone = set(), True
            for child, _ in self._below(node, number):
                if child is None:
                    continue
                leaf = self.made_of.get(child)
                if leaf is not None:
                    leaves.add(leaf)
                    continue
                if child._sequence_nr() >= number:  # made in another thread
                    raise _Perhaps
                alone = False
                uses[child] = uses.get(child, 0) + 1
            if leaves and alone and kind_of(node) in SAME:
                if len(leaves) > 1:
                    raise _Perhaps
                (self.made_of[node],) = leaves
                continue
            for leaf in leaves:
                uses[leaf] = uses.get(leaf, 0) + 1
        return {thing for thing, count in uses.items() if count >= RECURRENCE_USES}

    def _check_depth(self, repeated: set[Any]) -> None:
        if not repeated:
            return
        depths: dict[Any, int] = {}
        for number, node in self.order:
            if node in self.made_of:
                continue
            depth, of_leaf, of_computed, inputs = 0, False, False, 0
            for child, _ in self._below(node, number):
                if child is None:
                    continue
                inputs += 1
                depth = max(depth, depths.get(child, 0))
                leaf = self.made_of.get(child)
                of_leaf |= leaf is not None and leaf in repeated
                of_computed |= child in repeated
            kind = kind_of(node)
            if of_computed and inputs == 1 and kind in HANDED_ON:
                repeated.add(node)
            if of_leaf or (of_computed and kind in PRODUCTS):
                depth += 1
                if depth >= RECURRENCE_USES:
                    raise _Perhaps
            if depth:
                depths[node] = depth
