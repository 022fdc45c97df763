"""Steps: many calls of one loop as few calls with many sequences, so that they are replayed at once.

Calls that differ only in their data are put side by side along the batch: K calls of (T, B, ·) are
one of (T, K·B, ·). A loop of a thousand single steps is so replayed by one matrix product.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace

import torch
from torch import Tensor

from gradflow.hooks.call import Call, Inner
from gradflow.hooks.replay import Replay, Scans


class Group:
    """Calls of one kind and equal weights, side by side; `members` are their places in the loop."""

    def __init__(self, calls: list[Call], members: list[int]) -> None:
        self.members = members
        self.calls = [calls[place] for place in members]
        self.call = self.calls[0] if len(members) == 1 else _side_by_side(self.calls)
        self.replay = Replay(self.call)
        self.scans = Scans(self.replay)

    def refresh(self) -> None:
        """Take over the gradients that came since."""
        if len(self.calls) == 1:
            return
        self.call.lost = next((call.lost for call in self.calls if call.lost), "")
        tasks = set().union(*(call.graph_tasks for call in self.calls))
        if tasks == self.call.graph_tasks:
            return
        self.call.graph_tasks = tasks
        self.call.grads = {
            name: torch.cat([_grad(call, name) for call in self.calls], dim=1)
            for name in self.call.returned
            if any(name in call.grads for call in self.calls)
        }
        self.call.inner = _inner(self.calls)
        self.scans = Scans(self.replay)

    def each(self, array: Tensor) -> list[Tensor]:
        """One (T, B, ...) per member of an array (T, K·B, ...)."""
        return list(array.chunk(len(self.members), dim=1))

    def by_member(self, array: Tensor) -> dict[int, Tensor]:
        """The same by their places in the loop."""
        return dict(zip(self.members, self.each(array), strict=True))

    def columns(self, position: int) -> slice:
        """The sequences of one member, by its position in the group."""
        batch = self.replay.mask.shape[1] // len(self.members)
        return slice(position * batch, (position + 1) * batch)


def grouped(calls: list[Call]) -> list[Group]:
    """The calls of a loop in as few groups as can be, in the order of their first members."""
    if len(calls) == 1:
        return [Group(calls, [0])]
    members: dict[Hashable, list[int]] = {}
    for place, call in enumerate(calls):
        members.setdefault(_kind(call, place), []).append(place)
    return [Group(calls, places) for places in members.values()]


def _kind(call: Call, place: int) -> Hashable:
    if call.rng is not None or call.batch_sizes is not None:
        return place  # every call drew its own dropout, is packed in its own way
    shape = _time_first(call, call.data).shape
    weights = tuple(id(weight) for weight in call.weights)  # equal values share one copy
    return (shape, weights, call.weight_keys, call.autocast, call.totals, call.data.dtype)


def _side_by_side(calls: list[Call]) -> Call:
    first = calls[0]

    def joined(part: Callable[[Call], Tensor]) -> Tensor:
        return torch.cat([part(call) for call in calls], dim=1)

    def returned(name: str) -> Tensor:
        return joined(lambda call: _laid_out(call, name, call.returned[name]))

    return replace(
        first,
        data=joined(lambda call: _time_first(call, call.data)),
        initial={name: joined(lambda call, n=name: call.initial[n]) for name in first.initial},  # type: ignore[misc]
        batch_first=False,
        returned={name: returned(name) for name in first.returned},
        grad_enabled=any(call.grad_enabled for call in calls),
        differentiable=any(call.differentiable for call in calls),
        grads={},
        graph_tasks=set(),
        lost="",
        entering={},
        inner=(),
    )


def _inner(calls: list[Call]) -> tuple[Inner, ...]:
    """What phantom inputs brought, side by side; nothing where it is not known of every call."""
    if not all(call.graph_tasks and call.inner_known for call in calls):
        return ()
    tasks = set().union(*(call.graph_tasks for call in calls))

    def joined(each: list[Tensor]) -> Tensor:
        laid = [_time_first(call, one) for call, one in zip(calls, each, strict=True)]
        return torch.cat(laid, dim=1)

    found = []
    for layers in zip(*(call.inner for call in calls), strict=True):
        outputs = [one.output for one in layers if one.output is not None]
        grads = {name: joined([one.grads[name] for one in layers]) for name in layers[0].grads}
        found.append(Inner(layers[0].inputs, joined(outputs) if outputs else None, grads, tasks))
    return tuple(found)


def _grad(call: Call, name: str) -> Tensor:
    grad = call.grads.get(name)
    if grad is None:
        grad = torch.zeros_like(call.returned[name])
    return _laid_out(call, name, grad)


def _laid_out(call: Call, name: str, tensor: Tensor) -> Tensor:
    return _time_first(call, tensor) if name == "output" else tensor


def _time_first(call: Call, tensor: Tensor) -> Tensor:
    return tensor.transpose(0, 1) if call.batch_first else tensor
