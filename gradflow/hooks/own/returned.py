"""The tensors that a module was given and returned, their names, and which of them may be states.

Tensors are found in whatever holds them. An output comes back as an argument of the next call directly
or after only elementwise operations of the same shape, slicing, splitting, concatenation or detaching.
Where no path in the graph tells, equal values do. States lie as (B, width).
"""

from __future__ import annotations

import copy
import dataclasses
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from gradflow.hooks.axes import Axis, alike, as_rows
from gradflow.hooks.by_value import equal_rows, storage
from gradflow.hooks.dense import Place
from gradflow.hooks.graph import ELEMENTWISE, MOVES, Edge, edge_of, kind_of
from gradflow.limits import BY_VALUE, LEAF_COUNT, LEAF_DEPTH, LINK_DEPTH, LINK_NODES, STATE_ENTRIES

Path = tuple[str | int, ...]  # keyword, parameter, dict or field name, or place in a tuple or list


def leaves(value: Any) -> dict[Path, Tensor]:
    """Path -> tensor, in order, of tensors in tuples, lists, dicts, named tuples and dataclasses."""
    found: dict[Path, Tensor] = {}
    for path, tensor in _leaves(value, ()):
        found[path] = tensor
        if len(found) >= LEAF_COUNT:
            break
    return found


def _leaves(value: Any, path: Path) -> Iterator[tuple[Path, Tensor]]:
    if isinstance(value, Tensor):
        if not value.is_nested:  # its components have other shapes than itself
            yield path, value
        return
    if len(path) < LEAF_DEPTH:
        for key, part in _parts(value):
            yield from _leaves(part, (*path, key))


def _parts(value: Any) -> list[tuple[str | int, Any]]:
    if isinstance(value, Mapping):
        return [(str(key), part) for key, part in value.items()]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return list(zip(value._fields, value, strict=True))
    if isinstance(value, tuple | list):
        return list(enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(f.name, getattr(value, f.name, None)) for f in dataclasses.fields(value)]
    return []


def replaced(value: Any, tensors: Mapping[Path, Tensor], path: Path = ()) -> Any:
    """The same containers with other tensors in them, by path."""
    if isinstance(value, Tensor):
        return tensors.get(path, value)
    parts = {} if len(path) >= LEAF_DEPTH else dict(_parts(value))
    if not any(found[: len(path)] == path for found in tensors) or not parts:
        return value
    new = {key: replaced(part, tensors, (*path, key)) for key, part in parts.items()}
    if isinstance(value, tuple):
        return type(value)(*new.values()) if hasattr(value, "_fields") else tuple(new.values())
    if isinstance(value, list):
        return list(new.values())
    copied = copy.copy(value)
    if isinstance(value, Mapping):
        for key in value:
            copied[key] = new[str(key)]
        return copied
    for key, part in new.items():
        object.__setattr__(copied, str(key), part)
    return copied


def arguments(names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Parameter or keyword -> argument; arguments beyond the names go by their place, as "*2"."""
    given = {
        names[place] if place < len(names) else f"*{place}": value
        for place, value in enumerate(args)
    }
    return {**given, **kwargs}


def named(places: list[Path]) -> list[str]:
    """Names of states by where they are among the arguments.

    The last name on the way: a dict key, a field, a keyword or parameter; else h, c for a pair, else
    s0, s1, and so on.

    >>> named([("h",), ("c",)]), named([("state", 0), ("state", 1)]), named([("s", "fast"), ("m",)])
    (['h', 'c'], ['h', 'c'], ['fast', 'm'])
    >>> named([("state", 0), ("state", 1), ("state", 2)])
    ['s0', 's1', 's2']
    """
    own = [_own_name(place) for place in places]
    twice = {name for name in own if name is not None and own.count(name) > 1}
    full = ["_".join(str(key) for key in place) for place in places]
    names = [name if name is None or name not in twice else full[i] for i, name in enumerate(own)]
    if len(set(names) - {None}) < len([name for name in names if name is not None]):
        names = [None] * len(names)
    nameless = names.count(None)
    fresh = iter(["h", "c"] if nameless == 2 else [f"s{i}" for i in range(nameless)])
    taken = set(names)
    found = []
    for name in names:
        new = name if name is not None else next(fresh)
        found.append(f"{new}_" if name is None and new in taken else new)
    return found


def _own_name(place: Path) -> str | None:
    last = place[-1]
    if isinstance(last, str) and not last.startswith("*"):
        return last
    return None


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
    of the same name or place in its container, or the later. ends are of every earlier call what it
    returned, and where the first of its loop was given tensors; the last `BY_VALUE` are also looked for
    by their values. not_at are places that are known to be inputs, where no state comes back.
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
            elif (place := storage(result)) is not None:
                storages.setdefault(place, set()).add(name)
    if edge is None:
        return storages.get(storage(tensor) or 0, set())
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


def possible_states(
    returned: dict[Path, Tensor], given: Iterable[Tensor], unchanged: set[int], *, open_end: bool
) -> dict[Path, Tensor]:
    """What may be a state: each tensor once, arguments that were returned as they are left out.

    given are the arguments, unchanged the ids of those that the call did not change; with open_end an
    argument was left out, and a state may have any shape.
    """
    arguments = list(given)
    edges = {edge for tensor in arguments if (edge := edge_of(tensor)) is not None}
    shapes = [tensor.shape for tensor in arguments]
    found: dict[Path, Tensor] = {}
    known: set[object] = set()
    for path, tensor in returned.items():
        edge = edge_of(tensor)
        handed_through = edge in edges if edge is not None else id(tensor) in unchanged
        key = edge if edge is not None else id(tensor)
        flat = tensor.dim() <= 2 or (tensor.dim() == 3 and tensor.shape[0] == 1)
        fits = flat or tensor.shape in shapes or open_end
        if fits and not handed_through and key not in known and _can_be_marked(tensor):
            known.add(key)
            found[path] = tensor
    return found


def _can_be_marked(tensor: Tensor) -> bool:
    return (
        tensor.is_floating_point()
        and tensor.layout == torch.strided
        and 0 < tensor.numel() <= STATE_ENTRIES
        and tensor.dim() > 0
    )


def likely_states(outputs: dict[Path, Output], given: Iterable[Tensor]) -> Place:
    """The place of the outputs that have the shape of some argument, by their paths as text."""
    shapes = [tensor.shape for tensor in given]
    found = {path: out for path, out in outputs.items() if out.shape in shapes} or outputs
    batch = len(next(iter(found.values())).row)
    likely = {key_of(path): out for path, out in found.items() if len(out.row) == batch}
    return Place.at(
        {key: out.edge for key, out in likely.items() if out.edge is not None},
        {key: out.shape for key, out in likely.items()},
        {key: out.row for key, out in likely.items()},
        {key: out.axis for key, out in likely.items()},
    )


def row_of(tensor: Tensor, axis: Axis) -> Tensor:
    """A copy (B, width) of a state whose batch is that axis."""
    return as_rows(tensor.detach(), axis).clone(memory_format=torch.contiguous_format)


def version_of(tensor: Tensor) -> int | None:
    """How often a tensor was changed in place, where torch tells."""
    return None if tensor.is_inference() else tensor._version


def key_of(path: Path) -> str:
    """A path as text."""
    return repr(path)
