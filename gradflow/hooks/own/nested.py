"""Leaves: the tensors in what a module was given and in what it returned, and what they are called."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from gradflow.limits import LEAF_COUNT, LEAF_DEPTH

Path = tuple[str | int, ...]  # keyword, parameter, dict or field name, or place in a tuple or list


def leaves(value: Any) -> dict[Path, Tensor]:
    """Path -> tensor, in order, of tensors in tuples, lists, dicts, named tuples and dataclasses."""
    found: dict[Path, Tensor] = {}
    for path, tensor in _walk(value, ()):
        found[path] = tensor
        if len(found) >= LEAF_COUNT:
            break
    return found


def _walk(value: Any, path: Path) -> Iterator[tuple[Path, Tensor]]:
    if isinstance(value, Tensor):
        if not value.is_nested:  # its components have other shapes than itself
            yield path, value
        return
    if len(path) < LEAF_DEPTH:
        for key, part in _parts(value):
            yield from _walk(part, (*path, key))


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
