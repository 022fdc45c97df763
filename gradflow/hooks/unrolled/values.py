"""The values of tensors of the user's graph, from what its operations saved for their backward.

An operation that saved a tensor tells which operation made it, so what it saved is that very value.
Sums and products of such values are computed as the forward pass did. What lies in a checkpoint, or
under any other hook on saved tensors, is not touched: reading it would run the code of that hook.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from gradflow.hooks.graph import Edge, edge_of, is_hooked, kind_of, saved_by
from gradflow.hooks.unrolled.whole_graph import Unrolled
from gradflow.limits import VALUE_DEPTH


class Values:
    """Values of edges of one graph, nothing of which is freed; held are tensors that were seen, by edges."""

    def __init__(self, graph: Unrolled, held: Mapping[Edge, Tensor]) -> None:
        self.graph = graph
        self.held = held
        self._places = graph.places()
        self._known: dict[Edge, Tensor] = {}
        self._read: set[int] = set()
        self._users: list[list[int]] | None = None

    def of(self, edge: Edge) -> Tensor | None:
        """The value, detached, or None where it is not to be had."""
        found = self._value(edge, VALUE_DEPTH)
        if found is None:
            found = self._from_zeros(edge)
        return None if found is None else found.detach()

    def _value(self, edge: Edge, depth: int, zeros: bool = False) -> Tensor | None:
        held = self.held.get(edge)
        if held is not None:
            return held
        if edge in self._known:
            return self._known[edge]
        if hasattr(edge[0], "variable"):
            leaf: Tensor = edge[0].variable
            return leaf
        place = self._places.get(edge[0])
        if place is None:
            return None
        self._note(place)
        if edge not in self._known:
            for user in self.users[place]:
                self._note(user)
                if edge in self._known:
                    break
        if edge not in self._known:
            self._note_part(place, edge)
        if edge in self._known or not depth:
            return self._known.get(edge)
        again = self._computed(edge, depth, zeros)
        if again is not None and not zeros:
            self._known[edge] = again.detach()
        return again

    @property
    def users(self) -> list[list[int]]:
        """Of every node the places of those that were made from it."""
        if self._users is None:
            self._users = [[] for _ in self.graph.nodes]
            for place, inputs in enumerate(self.graph.inputs):
                for child, _ in inputs:
                    self._users[child].append(place)
        return self._users

    def _note(self, place: int) -> None:
        """Take in what one operation saved, each under the edge that it came from."""
        if place in self._read:
            return
        self._read.add(place)
        for tensor in saved_by(self.graph.nodes[place]):
            edge = edge_of(tensor)
            if edge is not None:
                self._known.setdefault(edge, tensor)

    def _note_part(self, place: int, edge: Edge, deep: int = 3) -> bool:
        """Find a value as the part of what was only put together from it and others, and saved there."""
        for user in self.users[place]:
            node = self.graph.nodes[user]
            if kind_of(node) not in ("Cat", "Stack", *_RESHAPED) or is_hooked(node):
                continue
            whole, below = (node, 0), self.users[user]
            for later in [user, *below]:
                self._note(later)
            if whole in self._known or (deep and self._note_part(user, whole, deep - 1)):
                found = _part(node, self._known[whole].detach(), edge)
                if found is not None and _fits(found, edge):
                    self._known[edge] = found
                    return True
        return False

    def _computed(self, edge: Edge, depth: int, zeros: bool) -> Tensor | None:
        """The value by the rule of its operation; with zeros for what a sum adds from outside the graph."""
        node = edge[0]
        rule = _RULES.get(kind_of(node))
        if rule is None or is_hooked(node):
            return None
        below = node.next_functions
        values = [None if n is None else self._value((n, i), depth - 1, zeros) for n, i in below]
        try:
            with torch.no_grad():
                found = rule(node, values)
                if isinstance(found, tuple):
                    found = found[edge[1]]
                if found is None and zeros and kind_of(node) in ("Add", "Sub"):
                    found = values[0] if below[1][0] is None else values[1]
        except RuntimeError:  # saved tensors that are gone, shapes that do not fit
            return None
        return found if found is not None and _fits(found, edge) else None

    def _from_zeros(self, edge: Edge) -> Tensor | None:
        """The value if constants that the graph does not hold are zero: what was made of it tells."""
        found = self._computed(edge, VALUE_DEPTH, zeros=True)
        if found is None:
            return None
        for user in self.users[self._places[edge[0]]]:
            node = self.graph.nodes[user]
            shown = _SHOWN.get(kind_of(node))
            if shown is None or is_hooked(node):
                continue
            result = node._saved_result
            if bool((result != 0).any()) and torch.equal(shown(found), result):
                self._known[edge] = found.detach()
                return found
        return None


_RESHAPED = ("View", "ReshapeAlias", "UnsafeView", "Unsqueeze", "Squeeze", "Alias")


def _part(node: Any, whole: Tensor, edge: Edge) -> Tensor | None:
    """What one edge gave to a tensor that was put together; None where it cannot be told."""
    below = [(child, output) for child, output in node.next_functions]
    if kind_of(node) in _RESHAPED:
        return whole.reshape(tuple(edge[0]._input_metadata[edge[1]].shape))
    if below.count(edge) != 1:
        return None
    place, dim = below.index(edge), signed(node._saved_dim)
    if kind_of(node) == "Stack":
        return whole.select(dim, place)
    sizes = [None if n is None else n._input_metadata[i].shape[dim] for n, i in below]
    before, after = sizes[:place], sizes[place + 1 :]
    if None not in before:
        start = sum(size for size in before if size is not None)
    elif None not in after:
        rest = sum(size for size in sizes[place:] if size is not None)
        start = whole.shape[dim] - rest
    else:
        return None
    length = sizes[place]
    return None if length is None else whole.narrow(dim, start, length)


def _fits(value: Tensor, edge: Edge) -> bool:
    known = edge[0]._input_metadata[edge[1]]
    return tuple(value.shape) == tuple(known.shape) and value.dtype == known.dtype


Rule = Callable[[Any, list[Tensor | None]], Any]  # a tensor, all that come of it, or None


def _known(operation: Callable[[Any, Any], Any]) -> Rule:
    """The rule of an operation on values that must all be known; given these and the node."""
    return lambda node, values: None if any(v is None for v in values) else operation(values, node)


def _of_two(operation: Callable[[Tensor, Tensor], Tensor]) -> Rule:
    """The rule of an operation that keeps its operands."""

    def rule(node: Any, values: list[Tensor | None]) -> Tensor | None:
        one, other = values
        one = node._saved_self if one is None else one
        other = node._saved_other if other is None else other
        return None if one is None or other is None else operation(one, other)

    return rule


def signed(number: int) -> int:
    """An axis or index as it was given, which the graph keeps without its sign."""
    return number - 2**64 if number >= 2**63 else number


def _mm(node: Any, values: list[Tensor | None]) -> Tensor | None:
    one, other = _either(node._saved_self, values[0]), _either(node._saved_mat2, values[1])
    return None if one is None or other is None else one @ other


def _addmm(node: Any, values: list[Tensor | None]) -> Tensor | None:
    one, other = _either(node._saved_mat1, values[1]), _either(node._saved_mat2, values[2])
    if one is None or other is None or values[0] is None:
        return None
    scales = {"alpha": node._saved_alpha, "beta": node._saved_beta}
    return torch.addmm(values[0], one, other, **scales)


def _either(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return other if one is None else one


_RULES: dict[str, Rule] = {
    "Add": _known(lambda v, n: torch.add(*v, alpha=getattr(n, "_saved_alpha", 1))),
    "Sub": _known(lambda v, n: torch.sub(*v, alpha=getattr(n, "_saved_alpha", 1))),
    "Mul": _of_two(torch.mul),
    "Neg": _known(lambda v, _: -v[0]),
    "Cat": _known(lambda v, n: torch.cat(v, signed(n._saved_dim))),
    "Stack": _known(lambda v, n: torch.stack(v, signed(n._saved_dim))),
    "Unbind": _known(lambda v, n: v[0].unbind(signed(n._saved_dim))),
    "Select": _known(lambda v, n: v[0].select(signed(n._saved_dim), signed(n._saved_index))),
    "Permute": _known(lambda v, n: v[0].permute([*map(signed, n._saved_dims)])),
    "Transpose": _known(lambda v, n: v[0].transpose(signed(n._saved_dim0), signed(n._saved_dim1))),
    **dict.fromkeys(
        _RESHAPED, _known(lambda v, n: v[0].reshape(tuple(n._input_metadata[0].shape)))
    ),
    "Expand": _known(lambda v, n: v[0].expand(tuple(n._input_metadata[0].shape))),
    "Div": _of_two(torch.div),
    "Maximum": _of_two(torch.maximum),
    "Minimum": _of_two(torch.minimum),
    "T": _known(lambda v, _: v[0].t()),
    "Abs": _known(lambda v, _: v[0].abs()),
    "Mm": _mm,
    "Addmm": _addmm,
}
_SHOWN: dict[str, Callable[[Tensor], Tensor]] = {
    "Tanh": torch.tanh,
    "Sigmoid": torch.sigmoid,
    "Relu": torch.relu,
}
