"""Where the joint state of a closed loop stands in the graph at the end of one of its steps.

A state of a fused call is a part of a tensor (one layer of the last h), and h of its top layer is carried by
the output too; what else crosses may be any tensor with a batch axis. A `View` says how the rows of a
state lie in such a tensor.

Letters: B sequences, S the width of all states side by side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from gradflow.hooks.call import Call
from gradflow.hooks.dense import Place
from gradflow.hooks.graph import Edge


@dataclass(frozen=True)
class View:
    """One state in one tensor."""

    name: str
    put: Callable[[Tensor], Tensor]  # rows (B, width) -> a tensor that is zero elsewhere
    take: Callable[[Tensor], Tensor]  # the tensor -> rows (B, width)
    rest: Callable[[Tensor], Tensor] | None = None  # what of the tensor is no known state


@dataclass(eq=False)
class Standing(Place):
    """A `Place` whose states may be parts of tensors, or be carried by several.

    Where the sequences are one system, `batch` is their number and like is (1, B·S).
    """

    views: dict[Edge, list[View]] = field(default_factory=dict)
    roots: dict[str, tuple[Edge, View]] = field(default_factory=dict)
    batch: int = 0  # 0: every sequence has rows of its own

    @staticmethod
    def holding(views: dict[Edge, list[View]], rows: dict[str, Tensor], *, one: bool) -> Standing:
        """The place of states seen at these edges, with their values (B, width)."""
        batch = len(next(iter(rows.values())))
        if one:
            rows = {name: row.reshape(1, -1) for name, row in rows.items()}
        roots: dict[str, tuple[Edge, View]] = {}
        for edge, each in views.items():
            for view in each:
                roots.setdefault(view.name, (edge, view))
        plain = Place.at(
            {name: edge for name, (edge, _) in roots.items()},
            {name: row.shape for name, row in rows.items()},
            rows,
        )
        return Standing(**vars(plain), views=views, roots=roots, batch=batch if one else 0)

    @property
    def nodes(self) -> set[Any]:
        """The nodes of everything that carries a state."""
        return {node for node, _ in self.views}

    def seeds(self, seed: Tensor, names: list[str]) -> list[tuple[Edge, Tensor]]:
        """Columns of a seed (B, S) at one edge of each named state."""
        found = []
        for name in names:
            if name in self.roots:
                edge, view = self.roots[name]
                rows = seed[:, self.parts[name]].to(self.dtypes[name])
                if self.batch:
                    rows = rows.reshape(self.batch, -1)
                found.append((edge, view.put(rows)))
        return found

    def gathered(self, found: dict[Edge, Tensor]) -> tuple[Tensor, list[Tensor]]:
        """(B, S) of the gradients at all that carries a state, and those at other results of these nodes."""
        columns = {name: self.like[:, part] for name, part in self.parts.items()}
        beside = []
        for edge, grad in found.items():
            if edge not in self.views:
                beside.append(grad)
            for view in self.views.get(edge, []):
                zero = columns[view.name]
                columns[view.name] = zero + view.take(grad).reshape(zero.shape).to(zero.dtype)
                if view.rest is not None:
                    beside.append(view.rest(grad))
        return torch.cat([columns[name] for name in self.parts], dim=1), beside

    def apart_from(self, name: str) -> Standing | None:
        """The other states, those that lie in the same node left out; None where there is none."""
        own = {edge[0] for edge, each in self.views.items() if any(v.name == name for v in each)}
        views = {edge: each for edge, each in self.views.items() if edge[0] not in own}
        edges = {n: e for n, e in self.edges.items() if any(e == edge for edge in views)}
        return replace(self, views=views, edges=edges) if views else None


def views_of_call(
    call: Call, edges: dict[Edge, str], names: list[dict[str, str]]
) -> dict[Edge, list[View]]:
    """The states of one call; names gives for each layer the joint names of its h and c."""
    found: dict[Edge, list[View]] = {}
    for edge, what in sorted(edges.items(), key=lambda item: (item[1] == "output", item[1])):
        if call.single:
            found[edge] = [_whole(names[0][what])]
        elif what == "output":
            found[edge] = _outputs(names[-1], call)
        else:
            found[edge] = [_layer(each[what], n, len(names)) for n, each in enumerate(names)]
    return found


def _whole(name: str) -> View:
    return View(name, put=lambda rows: rows, take=lambda tensor: tensor)


def _layer(name: str, number: int, layers: int) -> View:
    def put(rows: Tensor) -> Tensor:
        zero = torch.zeros_like(rows)
        return torch.stack([rows if n == number else zero for n in range(layers)])

    return View(name, put, take=lambda tensor: tensor[number])


def _outputs(names: dict[str, str], call: Call) -> list[View]:
    """The last output, which is h, and those before it, where they are known to go on."""
    axis = 1 if call.batch_first else 0
    steps = call.data.shape[axis]

    def put(rows: Tensor) -> Tensor:
        zero = torch.zeros_like(rows)
        return torch.stack([zero] * (steps - 1) + [rows], dim=axis)

    def put_before(rows: Tensor) -> Tensor:
        each = rows.unflatten(1, (steps - 1, -1))
        each = torch.cat([each, torch.zeros_like(each[:, :1])], dim=1)
        return each if call.batch_first else each.transpose(0, 1)

    before = names.get("output")
    last = View(
        names["h"],
        put,
        take=lambda tensor: tensor.select(axis, steps - 1),
        rest=(lambda tensor: tensor.narrow(axis, 0, steps - 1))
        if steps > 1 and before is None
        else None,
    )
    if before is None:
        return [last]
    return [last, View(before, put_before, take=lambda tensor: before_last(call, tensor))]


def before_last(call: Call, output: Tensor) -> Tensor:
    """(B, (t − 1)·P): all but the last step of what is laid out as the output of a call."""
    rows = output if call.batch_first else output.transpose(0, 1)
    return rows[:, :-1].flatten(1)


def view_of_tensor(name: str, shape: tuple[int, ...], batch: int) -> View | None:
    """All of a tensor that has a batch axis, its first or second; None of any other."""
    if shape and shape[0] == batch:
        return View(name, lambda rows: rows.reshape(shape), lambda t: t.reshape(batch, -1))
    if len(shape) > 1 and shape[1] == batch:
        turned = (shape[1], shape[0], *shape[2:])
        return View(
            name,
            lambda rows: rows.reshape(turned).transpose(0, 1),
            lambda t: t.transpose(0, 1).reshape(batch, -1),
        )
    return None


def view_in_place(place: Place, state: str, name: str) -> View:
    """A marked state, which lies in its tensor as its place says."""
    part, edge = place.parts[state], place.edges[state]

    def put(rows: Tensor) -> Tensor:
        before = rows.new_zeros(len(rows), part.start)
        after = rows.new_zeros(len(rows), place.like.shape[1] - part.stop)
        seed = torch.cat([before, rows, after], dim=1)
        return place.seeds(seed, [state])[0][1]

    return View(name, put, take=lambda tensor: place.gathered({edge: tensor})[0][:, part])
