"""Which of a module's outputs come back as arguments of its next call.

An output comes back directly or after only elementwise operations of the same shape, slicing,
splitting, concatenation or detaching. Where no path in the graph tells, equal values do.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from gradflow.hooks.axes import Axis, alike, as_rows
from gradflow.hooks.graph import ELEMENTWISE, MOVES, Edge, edge_of, kind_of
from gradflow.hooks.loops.rows import equal_rows
from gradflow.hooks.own.nested import Path
from gradflow.limits import BY_VALUE, LINK_DEPTH, LINK_NODES


@dataclass(frozen=True)
class Memory:
    """Where the numbers of a tensor lie, without holding them; known also after they are let go."""

    storage: StorageWeakRef
    offset: int
    strides: tuple[int, ...]

    @staticmethod
    def of(tensor: Tensor) -> Memory:
        """The memory of a tensor."""
        storage = StorageWeakRef(tensor.untyped_storage())
        return Memory(storage, int(tensor.storage_offset()), tensor.stride())

    def is_that_of(self, tensor: Tensor) -> bool:
        """Whether a tensor of the same shape is the same numbers: a detached one is."""
        return self == Memory.of(tensor)


@dataclass(frozen=True)
class Output:
    """A tensor that a call returned, without holding it."""

    edge: Edge | None
    row: Tensor  # (B, width), a copy
    shape: torch.Size
    axis: Axis  # which of its axes is the batch
    memory: Memory

    @staticmethod
    def of(tensor: Tensor, row: Tensor, axis: Axis) -> Output:
        """The output that a tensor is, given a copy of it as rows."""
        return Output(edge_of(tensor), row, tensor.shape, axis, Memory.of(tensor))


def came_back(
    inputs: dict[Path, Tensor], ends: list[tuple[dict[Path, Output], set[Path]]], not_at: set[Path]
) -> list[dict[Path, Path]]:
    """Of every earlier call: output -> the argument it came back as.

    The nearest; of equally near ones one that is no new member of a container that grows, then that
    of the same name or place in its container, or the later.

    inputs are what a call is given; ends, of every earlier call, what it returned, and where the first of
    its loop was given tensors; the last ones are also looked for by their values. No state comes back at
    the places not_at.
    """
    known: dict[Edge, list[tuple[int, Path]]] = {}
    for number, (outputs, _) in enumerate(ends):
        for path, out in outputs.items():
            if out.edge is not None:
                known.setdefault(out.edge, []).append((number, path))
    nearest: list[dict[Path, tuple[tuple[int, bool, bool, int], Path]]] = [{} for _ in ends]
    for place, (where, tensor) in enumerate(inputs.items()):
        if not tensor.is_floating_point() or tensor.layout != torch.strided or where in not_at:
            continue
        edge = edge_of(tensor)
        hits: list[tuple[int, Path, int]] = []
        if edge is not None and known:
            walked = _walk(edge, known.keys())
            hits = [(n, path, far) for end, far in walked.items() for n, path in known[end]]
        for number, path, far in hits or _by_value(tensor, ends):
            grown = _is_new_member(where, ends[number][1])
            order = (far, grown, path[-1:] != where[-1:], -place)
            best = nearest[number].get(path)
            if best is None or order < best[0]:
                nearest[number][path] = (order, where)
    return [
        {path: found[path][1] for path in outputs if path in found}
        for found, (outputs, _) in zip(nearest, ends, strict=True)
    ]


def _is_new_member(where: Path, known: set[Path]) -> bool:
    """Whether this place is one of a container that had others, but not this one, at first."""
    return where not in known and any(
        len(other) == len(where) > 1 and other[:-1] == where[:-1] for other in known
    )


def _by_value(
    tensor: Tensor, ends: list[tuple[dict[Path, Output], set[Path]]]
) -> list[tuple[int, Path, int]]:
    first = max(0, len(ends) - BY_VALUE)
    return [
        (number, path, 0)
        for number in range(first, len(ends))
        for path, out in ends[number][0].items()
        if _is_equal(tensor, out)
    ]


def _walk(root: Edge, ends: Collection[Edge]) -> dict[Edge, int]:
    """The ends that are reached, and over how many operations."""
    found: dict[Edge, int] = {}
    seen: set[Edge] = set()
    queue: deque[tuple[Edge, int]] = deque([(root, 0)])
    while queue and len(seen) < LINK_NODES:
        edge, distance = queue.popleft()
        if edge in seen:
            continue
        seen.add(edge)
        if edge in ends:
            found[edge] = distance
            continue
        node = edge[0]
        passes = kind_of(node) in MOVES or kind_of(node) in ELEMENTWISE
        own = isinstance(node, torch.autograd.function.BackwardCFunction)
        if distance < LINK_DEPTH and (passes or own):
            queue.extend((child, distance + 1) for child in node.next_functions if child[0])
    return found


def _is_equal(tensor: Tensor, out: Output) -> bool:
    """Whether every sequence of a tensor is one of the output's, or zeros.

    One must tell, unless the tensor lies where the output lay and that was not let go in between.
    """
    if tensor.device != out.row.device or not alike(tensor.shape, out.shape, out.axis):
        return False
    given = as_rows(tensor.detach(), out.axis)
    if tensor.shape == out.shape and out.memory.is_that_of(tensor):
        return True
    if given.dtype != out.row.dtype:
        return False
    if given.shape == out.row.shape:
        same = (given == out.row).all(1)
        if bool((same | (given == 0).all(1)).all()):
            telling = _telling(given)
            return bool((same & telling).any()) or (
                bool(telling.any()) and equal_rows(given, out.row) is not None
            )
    return equal_rows(given, out.row) is not None and bool(_telling(given).any())


def _telling(rows: Tensor) -> Tensor:
    """(B,) whether a sequence holds something that is not to be met by chance."""
    large = rows.isfinite() & (rows.abs() >= 1.0 / torch.finfo(rows.dtype).eps)  # all are whole
    sizes = rows.masked_fill(~large, 0.0)
    different = large & (sizes != sizes.amax(1, keepdim=True))
    return ((rows != 0) & (rows != rows.round())).any(1) | different.any(1)


def handed_on(edge: Edge | None, tensor: Tensor, inner: dict[str, list[Tensor]]) -> set[str]:
    """The inner modules whose results this tensor is, unchanged but for its place in another."""
    known: dict[Edge, set[str]] = {}
    storages: dict[int, set[str]] = {}
    for name, results in inner.items():
        for result in results:
            if (there := edge_of(result)) is not None:
                known.setdefault(there, set()).add(name)
            elif result.layout == torch.strided:
                pointer = result.untyped_storage().data_ptr()
                storages.setdefault(pointer, set()).add(name)
    if edge is None:
        return storages.get(tensor.untyped_storage().data_ptr(), set())
    return _sources(edge, known, LINK_DEPTH)


def _sources(edge: Edge, known: dict[Edge, set[str]], depth: int) -> set[str]:
    if edge in known:
        return known[edge]
    node = edge[0]
    if not depth or kind_of(node) not in MOVES:
        return set()
    found: set[str] = set()
    for child in node.next_functions:
        if child[0] is None:
            continue
        below = _sources(child, known, depth - 1)
        if not below:
            return set()
        found |= below
    return found
