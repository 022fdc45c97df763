"""Inputs of calls that ran without a graph: whether they were surely there before the calls.

Without a graph nothing tells whether an input was made from an earlier state. Slices of one tensor that
is not written to were there before; so were the results of another layer whose input are such slices.
Of any other input it is not known.

A checkpoint with use_reentrant=True runs without a graph, too, and makes its calls again in the backward,
then with a graph of its own: what that shows of their inputs counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from gradflow.hooks.by_value import storage
from gradflow.hooks.call import Call
from gradflow.hooks.graph import LEAF, edge_of
from gradflow.hooks.loops.links import End
from gradflow.hooks.loops.loop_source import LoopSource
from gradflow.hooks.loops.stitch import Chain
from gradflow.recording import Track

AGAIN = (
    "it ran in a checkpoint with use_reentrant=True, in which its inputs depend, or may depend, on its own "
    "earlier states; record one step without the checkpoint"
)


class GivenInputs:
    """What the inputs of every chain without a graph have in common."""

    def __init__(self) -> None:
        self.unsure: dict[int, Chain] = {}  # chains of which it cannot be told
        self._first: dict[int, tuple[Tensor, int | None]] = {}  # id of a chain -> its first input
        self._last: dict[int, tuple[Tensor, ...]] = {}  # id of a chain -> what it returned last
        self._calls: dict[int, Chain] = {}  # id of a call of which it cannot be told -> its chain
        self._again: set[int] = set()  # numbers of nodes of what calls made again returned

    def saw(self, chain: Chain, end: End, data: Tensor) -> None:
        """One more call of a chain."""
        if end.edges:
            return
        key = id(chain)
        first = self._first.setdefault(key, (data, _version(data)))
        known = storage(data) == storage(first[0]) and first[1] == _version(data)
        if len(chain.calls) > 1 and not known and not self._from_below(key, data):
            self.unsure[key] = self._calls[id(end.call)] = chain
        self._last[key] = tuple(end.returned.values())

    def made_again(
        self,
        call: Call,
        data: Tensor,
        results: Iterable[Tensor],
        is_weight: Callable[[Tensor], bool],
    ) -> None:
        """A call of a checkpoint is made again, now with a graph."""
        chain = self._calls.pop(id(call), None)
        if chain is not None and not self._is_given(data, is_weight):
            chain.unread = AGAIN
            chain.changes += 1
        if chain is not None and chain not in self._calls.values():
            del self.unsure[id(chain)]
        nodes = [edge[0] for result in results if (edge := edge_of(result))]
        self._again.update(node._sequence_nr() for node in nodes)

    def _is_given(self, data: Tensor, is_weight: Callable[[Tensor], bool]) -> bool:
        """Whether an input is made of weights and of what needs no gradient, and of no earlier call."""
        edge = edge_of(data)
        stack, seen = [edge[0]] if edge else [], set()
        while stack:
            node = stack.pop()
            leaf = node._sequence_nr() >= LEAF
            if node._sequence_nr() in self._again or (leaf and not is_weight(node.variable)):
                return False
            seen.add(node)
            stack += [child for child, _ in node.next_functions if child and child not in seen]
        return True

    def unknown(self, track: Track) -> str:
        """Why it cannot be told whether the inputs of a track depend on its own states, or nothing."""
        source = track.source
        if not isinstance(source, LoopSource) or id(source.loop.chain) not in self.unsure:
            return ""
        if source.loop.chain.closed is not None:
            return "steps that ran without a graph are taken with their inputs held fixed"
        return (
            "its inputs held fixed: without a graph it cannot be told whether they depend on its own "
            "earlier states; record it with gradients enabled"
        )

    def _from_below(self, key: int, data: Tensor) -> bool:
        """Whether the input is what another chain just returned, whose own inputs are given."""
        return any(
            other != key and other not in self.unsure and storage(data) == storage(result)
            for other, results in self._last.items()
            for result in results
        )

    def close(self) -> None:
        """Release the user's tensors."""
        self._first.clear()
        self._last.clear()
        self._calls.clear()
        self._again.clear()


def _version(tensor: Tensor) -> Any:
    return None if tensor.is_inference() else tensor._version
